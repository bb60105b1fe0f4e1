"""Where images come from: one file per kind of source, each of which describes its samples to `publish`."""
