"""Starting processes, and nothing else: imports nothing of the project."""
