"""One transformer for all families: layers, attention, adapters, and where arrays lie on devices."""
