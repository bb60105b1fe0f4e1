"""What several sources refuse in the same words."""

from data_pipeline.errors import DataError


def check_resolution(resolution: int) -> None:
    if not 1 <= resolution <= 8192:
        raise DataError(f"resolution is {resolution}: give a number of pixels between 1 and 8192.")


def check_share(test_share: float) -> None:
    if not 0 <= test_share < 1:
        raise DataError(
            f"test_share is {test_share}: give a share between 0 and 1, such as 0.1, or 0 for no test split."
        )
