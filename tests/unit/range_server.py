"""A web server that answers ranges, counts what it is asked for and can misbehave: a store for tests."""

import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL_S = 1.0


class Store:
    """What the server has, and what it saw."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = ""
        self.asked: Counter[tuple[str, int, int]] = Counter()  # (name, first byte, last byte)
        self.before: Callable[[str, int], None] | None = None  # called with (name, first byte) before an answer
        self.lost: set[str] = set()  # names that are gone


@contextmanager
def listening(handler: Callable[..., BaseHTTPRequestHandler], *, quiet: bool = False) -> Iterator[str]:
    """Answer by `handler` on this machine; yields the address. `quiet`: say nothing of clients that went away."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if quiet:
        server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def served(folder: Path) -> Iterator[Store]:
    """Serve the files of a folder on this machine."""
    store = Store(folder)
    with listening(partial(_Handler, store)) as store.url:
        yield store


class Handler(BaseHTTPRequestHandler):
    """Says nothing, and can break off in every way."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def write_body(self, body: bytes, fault: str) -> None:
        """All of it unless the fault is "stall", "cut", "short" or "slow"."""
        if fault not in ("stall", "cut", "short", "slow"):
            self.wfile.write(body)
            return
        half = 3 * len(body) // 4
        self.wfile.write(body[:half])
        self.wfile.flush()
        time.sleep({"stall": STALL_S, "slow": 0.1}.get(fault, 0.05))  # what was sent arrives before the end
        if fault == "cut":
            self.break_off()
        elif fault == "slow":
            self.wfile.write(body[half:])
        else:
            self.close_connection = True

    def break_off(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Handler(Handler):
    def __init__(self, store: Store, *arguments: object):
        self.store = store
        super().__init__(*arguments)  # pyright: ignore

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.store.folder / self.path.lstrip("/")
        if path.name in self.store.lost or not path.is_file():
            self._send(404, b"")
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, size - 1
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        if body:
            self.store.asked[path.name, first, last] += 1
            if self.store.before is not None:
                self.store.before(path.name, first)
        if first > last:
            self._send(416, b"")
            return
        extra = {"Content-Range": f"bytes {first}-{last}/{size}"} if asked else {}
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(last + 1 - first)
        self._send(206 if asked else 200, content, body=body, **extra)

    def _send(self, code: int, data: bytes, *, body: bool = True, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
