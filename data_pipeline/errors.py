"""The exceptions of this package, and the mend that most of its messages end with."""

PREPARE_AGAIN = "delete the data set's folder and run `sctrain prepare` again"


class DataError(Exception):
    """A mistake or damage the user can mend: one sentence that names the file and the mend."""


class DamagedError(DataError):
    """An index, a description or a sample is not what it should be."""


class DeniedError(DataError):
    """The store does not let us do this with these credentials."""


class MissingError(DataError):
    """An object that the index names is not there, or ends too early: asking again does not help."""
