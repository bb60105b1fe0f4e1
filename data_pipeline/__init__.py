"""Storage to batches: webdataset shards, their index, an exact order. Imports nothing else of the project."""
