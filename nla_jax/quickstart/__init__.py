"""What the quickstart runs on without a network: corpora, a tokenizer, the shipped subject."""
