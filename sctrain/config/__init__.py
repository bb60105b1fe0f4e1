"""The run description: its type, how it is read, what is refused, and what DeepSpeed is told."""
