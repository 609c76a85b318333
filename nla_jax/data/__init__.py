"""From documents to training batches: corpora, extraction, labels."""
