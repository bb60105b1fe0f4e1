"""The one exception of this package, and the mend that most of its messages end with."""

PREPARE_AGAIN = "delete the data set's folder and run `sctrain prepare` again"


class DataError(Exception):
    """A mistake or damage the user can mend: one sentence that names the file and the mend."""
