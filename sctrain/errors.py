"""Exceptions that mean "the user can mend this"."""


class UserError(Exception):
    """A mistake the user can mend: one sentence that names the file, key or node and the mend. Exit code 2."""


class OwnUserError(UserError):
    """One that only this rank has met. Of other mistakes, which all ranks find, rank 0 alone speaks."""
