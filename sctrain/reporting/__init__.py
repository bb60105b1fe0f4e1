"""What a person or a browser sees of a run: status lines, scalars, image grids."""
