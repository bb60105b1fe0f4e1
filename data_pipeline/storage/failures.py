"""What a failed request means: whether asking again can help, and what to tell.

The transport's own messages quote URLs with their signatures, so they are looked at here and never passed on.
"""

import re
from math import inf
from typing import NamedTuple

from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError

from data_pipeline.errors import PREPARE_AGAIN, DataError, DeniedError, MissingError
from data_pipeline.storage.urls import shown

TRANSPORT_ERRORS = (BaseError, FileNotFoundError, ValueError, OSError)
TEMPORARY = {408, 425, 429}  # besides 5xx
# Whom the transport asks where the environment and the profile have no keys.
CREDENTIAL_SERVICES = ("/latest/api/token", "/latest/meta-data/iam", "//169.254.170.2", "AssumeRoleWithWebIdentity")
GONE = {404, 410, 416}
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and check what they may read"
LATER = "check the network and the store, and start the run again"


class Failure(NamedTuple):
    """Why one request failed."""

    reason: str
    mend: str = LATER
    most: float = inf  # in a row; then asking again is in vain
    kind: type[DataError] = DataError

    def error(self, url: str, after_s: float = 0.0, *, done: str = "read") -> DataError:
        """The sentence; `after_s`: seconds of trying."""
        tried = f" after {after_s:.0f} s of trying" if after_s >= 1 else ""
        return self.kind(f"{shown(url)} cannot be {done}{tried} ({self.reason}): {self.mend}.")


# A store that mixes up its answers now and then does not give a wrong one so many times in a row.
REPLACED = Failure("it was replaced by another object", "keep data sets unchanged while runs read them", most=8)
TRUNCATED = Failure("the answer was cut short")
OVERLONG = Failure("the answer was longer than asked for")


def failure_of(error: Exception) -> Failure:
    """Classify an exception of the transport."""
    text = str(error)
    status = _status(text)
    if any(place in text for place in CREDENTIAL_SERVICES):
        return Failure("no credentials were found", CREDENTIALS, most=3)
    if isinstance(error, FileNotFoundError) or status in GONE:
        reason = "it ends too early" if status == 416 else f"it does not exist, HTTP {status or 404}"
        return Failure(reason, f"check the address, or {PREPARE_AGAIN}", most=1, kind=MissingError)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
        return Failure(f"access denied, HTTP {status or 403}", CREDENTIALS, most=1, kind=DeniedError)
    if isinstance(error, NotSupportedError):
        return Failure("the server does not answer byte ranges", "serve it from another server", most=1)
    if status is not None:
        temporary = (status >= 500 and status != 501) or status in TEMPORARY
        return Failure(
            f"HTTP {status}", LATER if temporary else "check the address and the store", inf if temporary else 1
        )
    if isinstance(error, ValueError):
        return Failure("its name is not valid", "check the address", most=1)
    return Failure(_broken(text))


def _status(text: str) -> int | None:
    found = re.search(r"non-2xx status code: (\d{3})", text)
    return int(found[1]) if found else None


def _broken(text: str) -> str:
    if "TimedOut" in text or "kind: Timeout" in text:
        return "the server did not answer in time"
    if "certificate" in text:
        return "its certificate is not trusted"
    if "dns error" in text or "lookup address" in text:
        return "the host's name is not known"
    if "ConnectionRefused" in text:
        return "no connection"
    return "the connection broke"
