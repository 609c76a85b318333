"""Files in and out: model folders, adapters, tensors, pairs, Parquet, the hub, buckets."""
