"""Published weights of other projects, read without running anything of theirs, and turned into runs of ours."""
