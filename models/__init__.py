"""Networks: nn.Modules whose layers carry exact tangents. Imports nothing else of the project."""
