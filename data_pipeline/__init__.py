"""Storage to batches: sharded webdataset folders, their index, an exact order of samples. Imports nothing else of the project."""
