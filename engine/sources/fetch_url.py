"""Fetches URLs that come from data; nothing else does.

A URL may name anything, a server in this network or this machine among it. So only http and https are spoken, a name is
resolved once, every address it has is checked, and the connection goes to the address that was checked; each redirect is
checked like the first URL. Sizes and times are bounded, hosts are asked politely, and what their headers forbid is left alone.
"""

import contextlib
import http.client
import importlib.metadata
import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from urllib3 import BaseHTTPResponse, Retry
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from engine.pipeline.sections import FetchConfig
from manifests.errors import FetchError, FetchRefused

AGENT = "modmill"
_CONNECT_S = 10.0
_READ_S = 20.0
_REDIRECTS = 5
_CHUNK_BYTES = 64 << 10
_LONGEST_WAIT_S = 60.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_FORBIDDING = {"noai", "noimageai"}
_HOST_CHARACTERS = 253
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Where clouds tell a machine its secrets. Some are of the public internet, and no image is served by any.
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.42.42", "169.254.0.23"),
        *("168.63.129.16", "100.100.100.200", "192.0.0.192"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:42::42"),
    )
)
# Set apart by IANA, and public to `ipaddress` of some or all Pythons.
_SET_APART = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "3fff::/20", "5f00::/16")
]
# It warns of headers that are not well-formed, with the URL, into the table of a run.
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)


class _Again(Exception):
    """Tells that a try failed in a way that another may not; `wait_s` is what the server asks for, None if it says nothing."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Redirect(Exception):
    """Tells that the server names another URL."""


@dataclass
class _Host:
    """Holds how a host is treated: how many requests at once, and none before a time (monotonic seconds)."""

    slots: threading.Semaphore
    not_before: float = 0.0


class _Connection(HTTPConnection):
    """Connects to an address, and ends at a deadline (monotonic seconds) under whoever reads or writes."""

    deadline = 0.0
    _timer: threading.Timer | None = None

    def _new_conn(self) -> socket.socket:
        connected = super()._new_conn()
        # A duplicate: TLS takes the socket over before its handshake, which the deadline must be able to end too.
        self._duplicate = connected.dup()
        self._timer = threading.Timer(max(self.deadline - time.monotonic(), 0.001), self._end)
        self._timer.daemon = True
        self._timer.start()
        return connected

    @property
    def is_over(self) -> bool:
        """Tells whether the deadline is past."""
        return time.monotonic() >= self.deadline

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._duplicate.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Closes all; not `close`, which http.client calls before the body is read."""
        if self._timer is not None:
            self._timer.cancel()
            self._duplicate.close()
        self.close()


class _TlsConnection(_Connection, HTTPSConnection):
    """Connects so with TLS."""


class Fetcher:
    """Fetches URLs from any number of threads, within the bounds of a corpus's `fetch` section."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._all = threading.Semaphore(config.parallel)
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()
        self._agent = config.user_agent or f"{AGENT}/{_version()}"
        self._tls = ssl.create_default_context()

    def fetch(self, url: str) -> bytes:
        """Returns the bytes of a URL. Raises FetchRefused if it must not be asked, FetchError if it gives none."""
        wait_s = 1.0
        for left in range(self._config.tries - 1, -1, -1):
            try:
                return self._follow(url)
            except _Again as error:
                if not left:
                    tried = f"; tried {self._config.tries} times" if self._config.tries > 1 else ""
                    raise FetchError(f"{error}{tried}") from error
                time.sleep(self._allowed(wait_s if error.wait_s is None else error.wait_s))
                wait_s *= 2
        raise AssertionError("there is at least one try")

    def _allowed(self, wait_s: float) -> float:
        """Returns how long is waited for a server that asks for `wait_s`: no longer than a try of it may take."""
        return min(wait_s, self._config.timeout_s, _LONGEST_WAIT_S)

    def _follow(self, url: str) -> bytes:
        deadline: float | None = None
        seen = [url]
        for _ in range(_REDIRECTS + 1):
            try:
                parts, name = _checked(seen[-1])
                with self._turn(name):
                    # The wait for a turn is not the server's time.
                    deadline = deadline or time.monotonic() + self._config.timeout_s
                    return self._get(parts, name, deadline)
            except _Redirect as redirect:
                seen.append(_joined(seen[-1], str(redirect)))
            except FetchError as error:
                raise type(error)(_through(str(error), seen)) from error
        raise FetchError(f"redirected more than {_REDIRECTS} times, at last to {seen[-1][:200]}")

    @contextlib.contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """Waits for a place among all requests and those of the host."""
        with self._lock:
            host = self._hosts.setdefault(name, _Host(threading.Semaphore(self._config.per_host)))
        with host.slots:
            pause = host.not_before - time.monotonic()
            if pause > 0:
                time.sleep(self._allowed(pause))
            with self._all:
                yield

    def _get(self, parts: SplitResult, name: str, deadline: float) -> bytes:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        connection = self._connection(parts.scheme, self._address(name, port), name, port)
        connection.deadline = deadline
        try:
            connection.connect()
            connection.timeout = _READ_S
            data = self._exchange(connection, parts, name, port)
            if connection.is_over:
                # A body without a length ends where the connection does, and so does one that was cut off.
                raise _Again("")
            return data
        except (_Redirect, FetchError):
            raise
        except ssl.SSLCertVerificationError as error:
            raise FetchError(f"the certificate of {name} is not good: {error.verify_message}") from error
        except (_Again, OSError, http.client.HTTPException, HTTPError, ValueError) as error:
            if connection.is_over:
                raise _Again(f"took more than {self._config.timeout_s:g} s") from error
            if isinstance(error, _Again):
                raise
            cause = error.__cause__ or error
            raise _Again(f"{type(cause).__name__}: {str(cause)[:200] or 'the connection ended'}") from error
        finally:
            connection.finish()

    def _connection(self, scheme: str, address: str, name: str, port: int) -> _Connection:
        """Returns a connection to an address that was checked, on which TLS holds the server to the name in the URL."""
        timeout_s = min(_CONNECT_S, self._config.timeout_s)
        if scheme == "https":
            return _TlsConnection(address, port, timeout=timeout_s, ssl_context=self._tls, server_hostname=name)
        return _Connection(address, port, timeout=timeout_s)

    def _address(self, name: str, port: int) -> str:
        """Returns an address of a host, all of whose addresses may be asked. Raises FetchRefused if one may not."""
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise _Again(f"the name {name!r} cannot be resolved: {error}") from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if _carried(address) in _METADATA:
                raise FetchRefused(
                    f"{name} is {address}, where the private network of a cloud tells machines their secrets"
                )
            if not self._config.allow_private and not is_public(address):
                raise FetchRefused(
                    f"{name} is {address}, an address of this machine or of a private network; set fetch.allow_private "
                    "to fetch from it"
                )
        return addresses[0]

    def _exchange(self, connection: _Connection, parts: SplitResult, name: str, port: int) -> bytes:
        shown = f"[{name}]" if ":" in name else name
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
            f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?[]|')}" if parts.query else ""
        )
        headers = {
            "Host": shown if port in (80, 443) else f"{shown}:{port}",
            "User-Agent": self._agent,
            "Accept": "image/*, */*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        # No length is enforced: `_body` says of one that is short how much came.
        connection.request(
            "GET", target, headers=headers, preload_content=False, decode_content=False, enforce_content_length=False
        )
        with contextlib.closing(connection.getresponse()) as response:
            return self._answer(response, name)

    def _answer(self, response: BaseHTTPResponse, name: str) -> bytes:
        status = response.status
        if status in (301, 302, 303, 307, 308) and (location := response.headers.get("Location")):
            raise _Redirect(location)
        if status in _BUSY:
            wait_s = _retry_after(response.headers.get("Retry-After"))
            if wait_s is not None:
                with self._lock:
                    self._hosts[name].not_before = time.monotonic() + self._allowed(wait_s)
            raise _Again(f"the server answered {status} {response.reason}", wait_s)
        if status != 200:
            raise FetchError(f"the server answered {status} {response.reason}")
        if not self._config.ignore_x_robots_tag:
            tag = forbidding_tag(response.headers.getlist("X-Robots-Tag"))
            if tag is not None:
                raise FetchRefused(f"the server answered X-Robots-Tag: {tag[:100]}")
        if (coding := response.headers.get("Content-Encoding", "identity").strip().lower()) not in ("", "identity"):
            raise FetchError(f"the server sent the coding {coding[:50]!r}, which was not asked for")
        return self._body(response)

    def _body(self, response: BaseHTTPResponse) -> bytes:
        most = int(self._config.max_mb * 1e6)
        said = response.headers.get("Content-Length", "")
        if said.isdigit() and int(said) > most:
            raise FetchError(f"{int(said):,} bytes, more than fetch.max_mb = {self._config.max_mb:g} allows")
        received = bytearray()
        while chunk := response.read(min(_CHUNK_BYTES, most + 1 - len(received))):
            received += chunk
            if len(received) > most:
                raise FetchError(f"more bytes than fetch.max_mb = {self._config.max_mb:g} allows")
        if said.isdigit() and len(received) < int(said):
            raise _Again(f"the connection ended after {len(received):,} of {int(said):,} bytes")
        return bytes(received)


def is_public(address: str) -> bool:
    """Tells whether an IP address is of the public internet, and so is the IPv4 address that it may carry within."""
    ip = _carried(address)
    if ip in _METADATA or any(ip in network for network in _SET_APART):
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local:
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


def _carried(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns an IP address, or the IPv4 address that it carries within."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
    return inner or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip)


def forbidding_tag(values: list[str]) -> str | None:
    """Returns the `X-Robots-Tag` that forbids this use of an image, if any; tags that name another robot do not count."""
    for value in values:
        robot = ""
        for rule in value.split(","):
            head, colon, rest = rule.partition(":")
            # `unavailable_after: DATE` and the like are rules; any other name before a colon is a robot's.
            if colon and not re.fullmatch(r"\s*(unavailable_after|max-[a-z-]+)\s*", head, re.IGNORECASE):
                robot, rule = head.strip().lower(), rest
            if robot in ("", "*", AGENT) and rule.strip().lower() in _FORBIDDING:
                return value
    return None


def _checked(url: str) -> tuple[SplitResult, str]:
    """Splits a URL that may be asked, and returns its host as a resolver takes it too. Raises FetchRefused if it may not."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchRefused(f"no URL: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise FetchRefused(f"the scheme {parts.scheme!r} is not fetched, expected http or https")
    if not parts.hostname or " " in parts.netloc or any(ord(letter) < 32 for letter in url):
        raise FetchRefused("no URL: it has no host, or control characters")
    if parts.username is not None or parts.password is not None:
        raise FetchRefused("the URL has a user name or password in it, which is not sent")
    if port is not None and port < 1024 and port not in (80, 443):
        raise FetchRefused(f"port {port} is no web server's")
    return parts, _resolvable(parts.hostname)


def _resolvable(name: str) -> str:
    """Returns a host in ASCII. Raises FetchRefused if no host can be called so."""
    if ":" in name or (name.isascii() and name.replace(".", "").isdigit()):
        return name
    try:
        # Its time grows with the square of the length.
        if len(name) > _HOST_CHARACTERS:
            raise ValueError(f"more than {_HOST_CHARACTERS} characters")
        return name.encode("idna").decode()
    except ValueError as error:
        raise FetchRefused(f"no URL: no host can be called {name[:100]!r}: {error.__cause__ or error}") from error


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError(f"redirected to {location[:200]!r}, which is no URL: {error} (from {url[:200]})") from error


def _through(message: str, seen: list[str]) -> str:
    return message if len(seen) == 1 else f"{message} (redirected to {seen[-1][:200]})"


def _retry_after(value: str | None) -> float | None:
    """Returns the seconds that a server asks to be left alone, None if it does not say."""
    if value is None:
        return None
    try:
        return Retry().parse_retry_after(value)
    except (HTTPError, ValueError, OverflowError, TypeError, IndexError):
        return None


def _version() -> str:
    try:
        return importlib.metadata.version("modmill")
    except importlib.metadata.PackageNotFoundError:
        return "0"
