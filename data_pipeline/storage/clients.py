"""URL -> a client of its store, made at its first use in each process."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from data_pipeline.storage.credentials import ENDPOINTS, s3_options
from data_pipeline.storage.settings import StorageSettings
from data_pipeline.storage.urls import split_remote

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

Client = S3Store | GCSStore | AzureStore | HTTPStore
MOST_CLIENTS = 64
MOST_RETRIES = 1000  # the budget of time decides before
CONNECT_S = 10.0
_first_use: list[int] = []
_making = threading.Lock()


def client_of(url: str, settings: StorageSettings, *, writing: bool = False) -> Client:
    """The client of a URL's store; DataError for a URL that cannot be used."""
    _check_not_forked()
    scheme, place, _ = split_remote(url)
    if scheme.startswith("http"):
        query = urlsplit(url).query  # a signature, perhaps: it goes with every request of this client
        root = f"{scheme}://{place}/" + (f"?{query}" if query else "")
    else:
        root = f"{scheme}://{place}"
    with _making:
        return _client(root, settings, writing)


def forget_clients() -> None:
    """Make clients anew, with what the environment says then."""
    with _making:
        _client.cache_clear()


def _check_not_forked() -> None:
    """The transport's threads do not survive a fork, and the child would wait for them for ever."""
    with _making:
        if not _first_use:
            _first_use.append(os.getpid())
    if _first_use[0] != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had already read from a store: start it with the method 'spawn'"
        )


@lru_cache(maxsize=MOST_CLIENTS)
def _client(root: str, settings: StorageSettings, writing: bool) -> Client:
    scheme, _, place = root.partition("://")
    retry = _retry(settings.retry_budget_s if writing else 0.0)
    if scheme.startswith("http"):
        return HTTPStore(root, client_options=_options(settings, root), retry_config=retry)
    if scheme == "gs":
        return GCSStore(place, client_options=_options(settings), retry_config=retry)
    if scheme == "az":
        return AzureStore(place, client_options=_options(settings), retry_config=retry)
    extra = s3_options()
    endpoint = next((os.environ[name] for name in ENDPOINTS if name in os.environ), extra.get("endpoint", ""))
    return S3Store(place, config=extra, client_options=_options(settings, endpoint), retry_config=retry)  # pyright: ignore


def _options(settings: StorageSettings, endpoint: str = "") -> ClientConfig:
    """`timeout` bounds a server that dribbles, `read_timeout` one that stalls."""
    return {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=min(CONNECT_S, settings.timeout_s)),
        "read_timeout": timedelta(seconds=settings.timeout_s),
        "timeout": timedelta(seconds=max(settings.timeout_s, settings.retry_budget_s)),
    }


def _retry(budget_s: float) -> RetryConfig:
    """For writers: readers retry themselves, for they go on inside a body."""
    return {"max_retries": MOST_RETRIES if budget_s > 0 else 0, "retry_timeout": timedelta(seconds=budget_s)}
