"""The bucket to test against: SCTRAIN_TEST_S3_URL=s3://bucket/prefix, with AWS_* variables."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.storage import delete, join_url, list_url

BASE = os.environ.get("SCTRAIN_TEST_S3_URL", "")


@contextmanager
def bucket_folder() -> Iterator[str]:
    """A new folder of the bucket, which is empty again in the end."""
    folder = join_url(BASE, uuid.uuid4().hex)
    yield folder
    _delete_below(folder)
    assert list_url(folder) == []


def _delete_below(folder: str) -> None:
    below = [url for url in list_url(folder) if url != folder]
    for url in below:
        _delete_below(url)
    delete(below)
