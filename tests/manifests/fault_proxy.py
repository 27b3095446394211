"""A network and a store that misbehave: an HTTP server in front of moto's that spoils a seeded share of the requests.

Every request is passed on or not, answered or not, as FAULTS says; what a PUT sent and what came of it is kept, so that a
test can ask how often something was written and whether its checksum was sent and true.
"""

import base64
import hashlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "conflict": (409, "ConditionalRequestConflict", "The conditional request cannot succeed due to a conflict."),
}
# slow: applied, and answered when the client has given up. truncated: half of the body, then the end of the connection.
# dropped: applied, and the connection reset instead of an answer. reset: the same, and nothing applied.
FAULTS = (*ANSWERS, "reset", "slow", "truncated", "dropped")


@dataclass
class Spoiled:
    """What the proxy does and has seen; a test may change `share` and `kinds` at any time."""

    seed: int = 0
    share: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    slow_s: float = 1.0
    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    puts: list[tuple[str, int, str]] = field(default_factory=list)  # path, status, fault
    wrong_checksums: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # Every request: its method and what it is for.

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def draw(self, method: str, conditional: bool) -> str:
        """The fault of the next request, '' for none."""
        with self._lock:
            self.requests += 1
            chance, kind = self._random.random(), self._random.choice(self.kinds)
            if chance >= self.share:
                return ""
            if kind == "conflict" and not conditional:
                kind = "internal"
            if kind == "truncated" and method != "GET":
                kind = "dropped"
            self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FaultProxy"

    def _pass_on(self) -> None:
        spoiled = self.server.spoiled
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        spoiled.asked.append(f"{self.command} {unquote(self.path)}")
        fault = spoiled.draw(self.command, "If-None-Match" in self.headers)
        if fault == "reset":
            self._reset()
            return
        if fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, text)
            self._note(body, status, fault)
            return
        status, headers, answer = self._ask(body)
        self._note(body, status, fault)
        if fault == "slow":
            time.sleep(spoiled.slow_s)
        if fault in ("slow", "dropped"):
            self._reset()
        else:
            self._answer(status, headers, answer, cut=fault == "truncated")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.behind, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], answer: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(answer))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer[: len(answer) // 2] if cut else answer)
        self.close_connection = self.close_connection or cut

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _note(self, body: bytes, status: int, fault: str) -> None:
        url = urlsplit(self.path)
        self.server.spoiled.queries.append(f"{self.command} {url.query}")
        if self.command != "PUT":
            return
        self.server.spoiled.puts.append((unquote(url.path), status, fault))
        if self.headers.get("x-amz-checksum-sha256") != base64.b64encode(hashlib.sha256(body).digest()).decode():
            self.server.spoiled.wrong_checksums.append(unquote(url.path))

    def log_message(self, format: str, *args: Any) -> None:
        pass


class FaultProxy(ThreadingHTTPServer):
    """Listens on the loopback until it is closed; `url` is where clients send what is for the store behind it."""

    daemon_threads = True

    def __init__(self, behind: tuple[str, int], spoiled: Spoiled) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.spoiled = spoiled
        self.url = "http://{}:{}".format(*self.server_address[:2])
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # A client that hung up.

    def close(self) -> None:
        self.shutdown()
        self.server_close()
