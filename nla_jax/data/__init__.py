"""From documents to training batches: corpora, chats, rows, batches, and the reference's datasets."""
