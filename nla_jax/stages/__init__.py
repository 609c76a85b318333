"""The stages of a study, from `pretrain` to `report`; table.py lists them."""
