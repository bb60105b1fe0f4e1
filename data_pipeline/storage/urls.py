"""What a URL of the data names: this machine or a store, one object or a list of them."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import DataError

MOST_URLS = 10**5  # of one list
SCHEMES = ("s3", "gs", "az", "http", "https")


def is_remote(url: str) -> bool:
    """Whether the URL names something that is not on this machine."""
    return "://" in url and not url.startswith("file://")


def join_url(base: str, name: str) -> str:
    """The URL of `name` inside the folder `base`."""
    return f"{base.rstrip('/')}/{name}"


def local_path(url: str) -> Path:
    """The path behind a plain path or a file:// URL; DataError for every other scheme."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) is None:
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise DataError(
            f"{shown(url)} is not on this machine: give a plain path or a file:///absolute/path URL instead."
        )
    return Path(unquote(parts.path))


def split_remote(url: str) -> tuple[str, str, str]:
    """(scheme, bucket or host, what follows) of a remote URL, checked; DataError for what cannot be used."""
    scheme, _, rest = url.partition("://")
    place, _, name = rest.partition("/")
    if scheme.startswith("http"):
        place = place.partition("?")[0]
    if scheme not in SCHEMES:
        raise DataError(f"{shown(url)} has an unknown scheme: use a path, file://, http(s)://, s3://, gs:// or az://.")
    if "@" in place:
        raise DataError(
            f"A {scheme}:// URL carries a user or password before its '@': take them out and use the environment "
            "or a profile in ~/.aws instead."
        )
    if not place:
        raise DataError(
            f"{shown(url)} names no {'host' if scheme.startswith('http') else 'bucket'}: add it after '://'."
        )
    return scheme, place, name


def shown(url: str) -> str:
    """The URL or list as people may see it: without users, passwords, or queries, which may be signatures."""
    return "::".join(_shown(part) for part in url.split("::"))


def _shown(url: str) -> str:
    if not is_remote(url):
        return url
    scheme, _, rest = url.partition("://")
    place, slash, name = rest.partition("/")
    if scheme.startswith("http"):
        place, name = place.partition("?")[0], re.split("[?#]", name, maxsplit=1)[0]
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{name}"


def object_name(url: str) -> str:
    """The name of an object inside its bucket or server; DataError if the URL names none."""
    scheme, _, name = split_remote(url)
    if scheme.startswith("http"):
        name = unquote(re.split("[?#]", name, maxsplit=1)[0])
    if not name or name.endswith("/"):
        raise DataError(f"{shown(url)} names no object: add its name.")
    return name


def expand(url: str) -> list[str]:
    """The URLs of a list joined by `::` whose parts may have braces; DataError where it is wrong."""
    parts = url.split("::")
    urls = list(islice((one for part in parts for one in _braces(part)), MOST_URLS + 1))
    if len(urls) > MOST_URLS:
        raise DataError(f"{shown(url)} names more than {MOST_URLS:,} objects: check its braces.")
    if len(set(urls)) != len(urls) or not all(urls):
        what = "an object twice" if all(urls) else "an empty URL"
        raise DataError(f"{shown(url)} names {what}: list each once.")
    return urls


def is_list(url: str) -> bool:
    """Whether the URL says by itself which objects it names."""
    return "{" in url or "}" in url or "::" in url


def _braces(url: str) -> Iterator[str]:
    """One by one, so that a list of billions is noticed before it is made."""
    found = re.search(r"\{([^{}]*)\}", url)
    before, rest = (url[: found.start()], url[found.end() :]) if found else (url, "")
    if "{" in before or "}" in before or (found and _choices(found[1]) is None):
        raise DataError(f"{shown(url)} has braces that name no list: write for example train-{{000..099}}.tar.")
    for choice in (_choices(found[1]) or ()) if found else ("",):
        for end in _braces(rest) if rest else ("",):
            yield f"{before}{choice}{end}"


def _choices(inside: str) -> Iterable[str] | None:
    """`000..099` or `a,b`; None for anything else."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",") if "," in inside else None
    first, last = int(numbers[1]), int(numbers[2])
    width = max(map(len, numbers.groups())) if any(text[0] == "0" for text in numbers.groups()) else 1
    return (f"{number:0{width}d}" for number in range(first, last + 1)) if first <= last else None
