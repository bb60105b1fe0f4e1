"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake the user can mend: one sentence that names the file, key or node and the mend. Exit code 2."""
