"""A web server that answers ranges and can fail in every way that stores do; it counts what it is asked for."""

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from range_server import STALL_S, Handler, listening

MIXED = "mixed"  # the right headers with a wrong body, which only checksums tell
FAULTS = ("503", "500", "429", "stall", "reset", "cut", "short", "fewer", "longer", "other", "slow")


class FaultyStore:
    """What the server has, how it fails, and what it saw."""

    def __init__(self, **objects: bytes):
        self.objects = dict(objects)  # by name
        self.url = ""
        self.plan: list[str] = []  # faults of the next requests; "" for none
        self.share = 0.0  # of later requests that fail
        self.kinds: tuple[str, ...] = FAULTS
        self.asked: list[tuple[str, str, int, int]] = []  # (method, name, first byte, last byte)
        self.failed = 0
        self.head_is_refused = False
        self._random = random.Random(0)
        self._lock = threading.Lock()

    def next_fault(self, asked: tuple[str, str, int, int]) -> str:
        with self._lock:
            self.asked.append(asked)
            if self.plan:
                fault = self.plan.pop(0)
            else:
                fault = self._random.choice(self.kinds) if self._random.random() < self.share else ""
            self.failed += fault != ""
            return fault

    def gets(self) -> list[tuple[int, int]]:
        """(first byte, last byte) of every GET."""
        return [(first, last) for method, _, first, last in self.asked if method == "GET"]


@contextmanager
def served(**objects: bytes) -> Iterator[FaultyStore]:
    """Serve the objects on this machine."""
    store = FaultyStore(**objects)
    with listening(partial(_Handler, store), quiet=True) as store.url:
        yield store


class _Handler(Handler):
    def __init__(self, store: FaultyStore, *arguments: object):
        self.store = store
        super().__init__(*arguments)  # pyright: ignore

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        content = self.store.objects.get(name)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]) if asked else len(content or b"") - 1, len(content or b"") - 1)
        fault = self.store.next_fault((self.command, name, first, last))
        if content is None or (self.store.head_is_refused and self.command == "HEAD"):
            self._send(404 if content is None else 403, b"")
        elif fault.isdigit():
            self._send(int(fault), b"slow down")
        elif fault == "reset":
            self.break_off()
        elif fault == "stall" and self.command == "HEAD":
            time.sleep(STALL_S)
        else:
            if fault == "other":
                content = bytes(byte ^ 1 for byte in content[:1000]) * (len(content) // 1000 + 1)
            if fault == "fewer" and self.command == "GET":
                last = (first + last) // 2
            self._object(content, first, last, fault, partial_answer=bool(asked))

    def _object(self, content: bytes, first: int, last: int, fault: str, *, partial_answer: bool) -> None:
        body = content[first : last + 1]
        if fault == MIXED:
            body = bytes(byte ^ 1 for byte in body[:1000]) + body[1000:]
        self.send_response(206 if partial_answer else 200)
        self.send_header("ETag", f'"{hash(content)}"')
        if partial_answer:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if fault == "longer" and self.command == "GET":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n4\r\nmore\r\n0\r\n\r\n" % (len(body), body))
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.write_body(body, fault)

    def _send(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
