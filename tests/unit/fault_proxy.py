"""Between a client and a real store: passes requests on, signatures included, and fails in every way that stores do."""

import http.client
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

from range_server import STALL_S, Handler, listening

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
READING = ("slowdown", "500", "stall", "reset", "cut", "short", "slow")  # faults of any request that brings something
WRITING = ("slowdown", "500", "stall", "reset", "lost")  # "lost": done, but the answer never arrives
ANOTHER = "another"  # the whole answer that another object gave before
BODY = "body"  # the right headers with a wrong body
_HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server"}  # headers that are of one connection only


class _Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultProxy:
    """How it fails, and what it saw."""

    def __init__(self, endpoint: str):
        self.upstream = urlsplit(endpoint).netloc
        self.url = ""
        self.share = 0.0  # of requests that fail
        self.reading: tuple[str, ...] = READING
        self.writing: tuple[str, ...] = WRITING
        self.lost: set[str] = set()  # names that are gone
        self.failed: Counter[str] = Counter()  # by fault
        self.answers: dict[tuple[str, str], _Answer] = {}  # the last of each (method, path)
        self._random = random.Random(0)
        self._lock = threading.Lock()

    def next_fault(self, method: str) -> str:
        with self._lock:
            if self._random.random() >= self.share:
                return ""
            fault = self._random.choice(self.reading if method in ("GET", "HEAD") else self.writing)
            self.failed[fault] += 1
            return fault

    def of_another(self, method: str, path: str, answer: _Answer) -> _Answer:
        """What another object answered to the same method; the true answer as long as none did."""
        with self._lock:
            self.answers[method, path] = answer
            others = [found for key, found in self.answers.items() if key[0] == method and key[1] != path]
            return self._random.choice(others) if others else answer


@contextmanager
def proxied(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy on this machine in front of the store at `endpoint` (http)."""
    proxy = FaultProxy(endpoint)
    with listening(partial(_Handler, proxy), quiet=True) as proxy.url:
        yield proxy


class _Handler(Handler):
    def __init__(self, proxy: FaultProxy, *arguments: object):
        self.proxy = proxy
        super().__init__(*arguments)  # pyright: ignore

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _pass_on(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = self.path.partition("?")[0].rpartition("/")[2]
        fault = self.proxy.next_fault(self.command)
        if fault == "slowdown":
            self._send(_Answer(503, [("Content-Type", "application/xml"), ("Retry-After", "1")], SLOW_DOWN))
        elif fault == "500":
            self._send(_Answer(500, [], b""))
        elif fault == "reset":
            self.break_off()
        elif name in self.proxy.lost:
            self._send(_Answer(404, [], b""))
        else:
            self._relay(self._asked(content), fault)

    def _asked(self, content: bytes) -> _Answer:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():  # Host too, which is signed
                connection.putheader(key, value)
            connection.endheaders(content)
            answer = connection.getresponse()
            headers = [(key, value) for key, value in answer.getheaders() if key.lower() not in _HOP]
            return _Answer(answer.status, headers, answer.read())
        finally:
            connection.close()

    def _relay(self, answer: _Answer, fault: str) -> None:
        if fault == "lost":
            self.break_off()
            return
        if answer.status in (200, 206) and re.search(r"\.(tar|npz|json)$", self.path):
            another = self.proxy.of_another(self.command, self.path, answer)
            answer = another if fault == ANOTHER else answer
        if fault == BODY:
            answer = answer._replace(body=bytes(byte ^ 1 for byte in answer.body[:1000]) + answer.body[1000:])
        if fault in ("stall", "slow") and not answer.body:
            time.sleep(STALL_S if fault == "stall" else 0.1)
        self._send(answer, fault)

    def _send(self, answer: _Answer, fault: str = "") -> None:
        self.send_response(answer.status)
        sized = any(key.lower() == "content-length" for key, _ in answer.headers)
        for key, value in answer.headers:
            self.send_header(key, value)
        if not sized and answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD" or not answer.body:
            return
        self.write_body(answer.body, fault)
