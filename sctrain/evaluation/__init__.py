"""Scores published snapshots beside training, never inside it: extractor, metrics, queue, worker, report."""
