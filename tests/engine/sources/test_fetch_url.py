"""URLs from data: what is fetched from a real server on the loopback, what never is, and how little is asked of anyone."""

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ingest import ingest
from engine.pipeline.config import CorpusConfig
from engine.pipeline.sections import FetchConfig
from engine.sources import fetch_url
from engine.sources.fetch_url import Fetcher, forbidding_tag, is_public
from engine.sources.read import SourceBytes
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, FetchError, FetchRefused
from manifests.formats.shards import read_samples
from manifests.log import entries as log
from manifests.store.storage import Storage, open_storage

JPEG = b"\xff\xd8\xff" + bytes(2000)


class Server(ThreadingHTTPServer):
    """Answers by path; counts what is asked, and how much at once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.files: dict[str, bytes] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is no news."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.headers[self.path] = dict(self.headers)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self._answer()
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        count = self.server.asked[self.path]
        if path in self.server.files:
            return self._send(200, self.server.files[path])
        match path.split("/")[1:]:
            case ["to", target]:
                return self._send(302, b"", Location=bytes.fromhex(target).decode())
            case ["loop"]:
                return self._send(302, b"", Location="/loop")
            case ["noai"]:
                return self._send(200, JPEG, **{"X-Robots-Tag": "noindex, NoAI"})
            case ["busy"] if count == 1:
                return self._send(503, b"", **{"Retry-After": "1"})
            case ["flaky"] if count < 3:
                return self._send(500, b"")
            case ["gone"]:
                return self._send(404, b"no")
            case ["html"]:
                return self._send(200, b"<html>not here</html>", **{"Content-Type": "image/jpeg"})
            case ["big"]:
                return self._send(200, bytes(3_000_000))
            case ["endless"]:
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(bytes(100_000))
            case ["short"]:
                self.send_response(200)
                self.send_header("Content-Length", "5000")
                self.end_headers()
                self.wfile.write(JPEG)
            case ["drip"] | ["drip_head"] | ["drip_on"]:
                if path != "/drip_head":
                    self.send_response(200)
                    if path == "/drip":
                        self.send_header("Content-Length", "5000")
                    self.end_headers()
                else:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            case ["gzip"]:
                self._send(200, JPEG, **{"Content-Encoding": "gzip"})
            case ["slow", *_]:
                time.sleep(0.2)
                self._send(200, JPEG)
            case _:
                self._send(200, JPEG)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.05,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def fetcher(**options: Any) -> Fetcher:
    return Fetcher(FetchConfig(**{"allow_private": True, "tries": 1, **options}))


def redirect(server: Server, target: str) -> str:
    return server.url(f"/to/{target.encode().hex()}")


def test_an_image_and_who_asks(server: Server) -> None:
    assert fetcher().fetch(server.url("/a/é b.jpg?size=1&x=%20y")) == JPEG
    (path, headers) = next(iter(server.headers.items()))
    assert path == "/a/%C3%A9%20b.jpg?size=1&x=%20y"
    assert headers["User-Agent"].startswith("modmill/")
    assert headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert headers["Accept-Encoding"] == "identity"
    fetcher(user_agent="mine (mail@example.org)").fetch(server.url("/b"))
    assert server.headers["/b"]["User-Agent"] == "mine (mail@example.org)"
    assert fetcher().fetch(redirect(server, "/c")) == JPEG
    assert fetcher().fetch(server.url("/d").replace("127.0.0.1", "localhost")) == JPEG


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f000001:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://127.1:{port}/",
        "http://0.0.0.0:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://[fd00:ec2::254]/",
        "http://[fe80::1]/",
        "http://[64:ff9b::7f00:1]/",
    ],
)
def test_private_addresses_are_never_asked(server: Server, url: str) -> None:
    with pytest.raises(FetchRefused, match="private network"):
        fetcher(allow_private=False).fetch(url.format(port=server.server_port))
    assert not server.asked


def test_a_name_that_resolves_to_private_addresses(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    original = socket.getaddrinfo
    answers = {"rebind.example": ["93.184.216.34", "127.0.0.1"], "inside.example": ["10.1.2.3"]}

    def resolve(host: Any, port: Any, *args: Any, **more: Any) -> Any:
        if host not in answers:
            return original(host, port, *args, **more)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in answers:
        with pytest.raises(FetchRefused, match=f"{name} is "):
            fetcher(allow_private=False).fetch(f"http://{name}:{server.server_port}/")
    assert not server.asked
    # The connection goes to the address that was checked, whatever the name gives the next time.
    asked = []
    answers["once.example"] = ["127.0.0.1"]

    def resolve_once(host: Any, *args: Any, **more: Any) -> Any:
        asked.append(host)
        return resolve(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_once)
    assert fetcher().fetch(f"http://once.example:{server.server_port}/x") == JPEG
    assert asked.count("once.example") == 1
    assert server.headers["/x"]["Host"] == f"once.example:{server.server_port}"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "scheme 'file'"),
        ("gopher://x/", "scheme 'gopher'"),
        ("ftp://x/a.jpg", "scheme 'ftp'"),
        ("//x/a.jpg", "scheme ''"),
        ("http:///a.jpg", "no host"),
        ("http://user:secret@example.org/", "user name or password"),
        ("http://example.org:22/", "port 22"),
        ("http://example.org:99999/", "no URL"),
        ("http://exam\nple.org/", "no URL"),
        ("http://example.org/a b\r\nX: y", "no URL"),
        ("http://a..b/x.jpg", r"no host can be called 'a\.\.b'"),
        (f"http://{'a' * 64}.com/x.jpg", "no host can be called"),
        (f"http://{'a.' * 2000}com/", "more than 253 characters"),
        ("http://\ud800.org/", "no host can be called"),
        ("http://[::1", "no URL"),
    ],
)
def test_what_is_no_url_of_the_web(url: str, message: str) -> None:
    with pytest.raises(FetchRefused, match=message) as caught:
        fetcher().fetch(url)
    assert "secret" not in str(caught.value)


def test_redirects_are_checked_again(server: Server) -> None:
    for target, message in (
        ("file:///etc/passwd", "scheme 'file'"),
        ("http://user:x@127.0.0.1/", "user name"),
    ):
        with pytest.raises(FetchRefused, match=rf"{message}.*\(redirected to"):
            fetcher().fetch(redirect(server, target))
    with pytest.raises(FetchError, match="redirected more than 5 times"):
        fetcher().fetch(server.url("/loop"))
    assert server.asked["/loop"] == 6
    for target in ("http://[::1", "//[", "http://a..b/"):
        with pytest.raises(FetchError, match="no URL"):
            fetcher().fetch(redirect(server, target))


def test_a_redirect_into_the_private_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # A public server cannot be had here: its address is the only one that counts as public.
    monkeypatch.setattr("engine.sources.fetch_url.is_public", lambda address: address == "127.0.0.1")
    for target in ("http://169.254.169.254/latest/", "http://[::1]/", "http://10.0.0.1/x", "http://167772161/"):
        with pytest.raises(FetchRefused, match=r"private network.*\(redirected to"):
            fetcher(allow_private=False).fetch(redirect(server, target))


def test_robots_headers_are_honored(server: Server) -> None:
    with pytest.raises(FetchRefused, match="X-Robots-Tag: noindex, NoAI"):
        fetcher().fetch(server.url("/noai"))
    assert fetcher(ignore_x_robots_tag=True).fetch(server.url("/noai")) == JPEG


@pytest.mark.parametrize(
    ("values", "forbids"),
    [
        (["noai"], True),
        (["noindex", "noimageai, nofollow"], True),
        (["modmill: noai"], True),
        (["*: noai"], True),
        (["otherbot: noai"], False),
        (["otherbot: noindex, noai"], False),
        (["otherbot: none, modmill: noimageai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], True),
        (["max-image-preview: large, noai"], True),
        (["noindex, nofollow"], False),
        ([], False),
    ],
)
def test_tags(values: list[str], forbids: bool) -> None:
    assert (forbidding_tag(values) is not None) == forbids


def test_sizes_and_times_are_bounded(server: Server) -> None:
    for path in ("/big", "/endless"):
        with pytest.raises(FetchError, match=r"fetch\.max_mb = 1 allows"):
            fetcher(max_mb=1).fetch(server.url(path))
    began = time.monotonic()
    for path in ("/drip", "/drip_head", "/drip_on"):
        with pytest.raises(FetchError, match=r"took more than 0\.5 s"):
            fetcher(timeout_s=0.5).fetch(server.url(path))
    assert time.monotonic() - began < 5
    with pytest.raises(FetchError, match=r"2,003 of 5,000 bytes|IncompleteRead"):
        fetcher().fetch(server.url("/short"))
    with pytest.raises(FetchError, match="coding 'gzip'"):
        fetcher().fetch(server.url("/gzip"))


def test_busy_servers_are_asked_again(server: Server) -> None:
    began = time.monotonic()
    assert fetcher(tries=2).fetch(server.url("/busy")) == JPEG
    assert time.monotonic() - began >= 1
    with pytest.raises(FetchError, match="404 Not Found"):
        fetcher(tries=3).fetch(server.url("/gone"))
    assert server.asked["/gone"] == 1
    with pytest.raises(FetchError, match=r"500 .*; tried 2 times"):
        fetcher(tries=2).fetch(server.url("/flaky"))
    with pytest.raises(FetchError, match="ConnectionRefused"):
        fetcher().fetch("http://127.0.0.1:1024/")


def test_no_server_is_waited_for_longer_than_a_try_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def busy(*_: Any) -> bytes:
        raise fetch_url._Again("503", wait_s=3600)

    monkeypatch.setattr(Fetcher, "_get", busy)
    with pytest.raises(FetchError, match="tried 3 times"):
        fetcher(tries=3, timeout_s=2).fetch("http://example.org/")
    assert slept == [2, 2]


def test_few_at_once_from_one_host(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    asking = fetcher(per_host=2, parallel=8)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(asking.fetch, [server.url(f"/slow/{number}") for number in range(8)])) == [JPEG] * 8
    assert server.most_at_once == 2


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Writes a self-signed certificate of a host and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - day, now + day)
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False).sign(key, hashes.SHA256())
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def test_tls_holds_the_server_to_the_name_in_the_url(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate(tmp_path, "pictures.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    original = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **more: original("127.0.0.1" if host.endswith(".example") else host, *args, **more),
    )
    url = f"https://pictures.example:{server.server_port}/a"
    with pytest.raises(FetchError, match=r"certificate of pictures\.example is not good: self.signed"):
        fetcher().fetch(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    assert fetcher().fetch(url) == JPEG
    assert server.headers["/a"]["Host"] == f"pictures.example:{server.server_port}"
    with pytest.raises(FetchError, match=r"certificate of other\.example is not good: Hostname mismatch"):
        fetcher().fetch(url.replace("pictures", "other"))


def test_a_handshake_that_never_ends_is_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(FetchError, match=r"took more than 0\.3 s"):
            fetcher(timeout_s=0.3).fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/")
    assert time.monotonic() - began < 5


def test_addresses() -> None:
    public = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"]
    private = [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "2002:7f00:1::"),
        *("64:ff9b::a9fe:a9fe", "fec0::1", "192.0.2.1", "198.18.0.1", "240.0.0.1"),
        *(
            "192.0.0.192",
            "192.0.0.8",
            "168.63.129.16",
            "::ffff:168.63.129.16",
            "64:ff9b::a83f:8110",
            "2002:a83f:8110::",
        ),
        *("100.100.100.200", "fd00:ec2::254", "fd20:ce::254", "64:ff9b:1::808:808", "3fff::1", "5f00::1"),
    ]
    assert [address for address in public if not is_public(address)] == []
    assert [address for address in private if is_public(address)] == []


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "::ffff:a9fe:a9fe"]
)
def test_secrets_of_a_cloud_are_never_asked_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, address)
    for allow_private in (False, True):
        with pytest.raises(FetchRefused, match="tells machines their secrets"):
            fetcher(allow_private=allow_private).fetch("http://metadata.example/latest/")


# -- what any URL does ------------------------------------------------------------------------------------------------


def resolve_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda _, port, **__: [(family, socket.SOCK_STREAM, 6, "", (address, port))]
    )


_HOSTS = st.one_of(
    st.text(max_size=80),
    st.text("ab-._[]:%@０１²ßİ℀。\u200d\ud800", max_size=80),
    st.ip_addresses().map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
URLS = st.one_of(
    st.text(max_size=60),
    st.builds(
        "{}://{}{}{}".format,
        st.sampled_from(["http", "https", "HTTP", "ftp", "file", ""]),
        _HOSTS,
        st.one_of(st.just(""), st.integers(-1, 10**6).map(":{}".format), st.text(max_size=5).map(":{}".format)),
        st.text(max_size=20).map("/{}".format),
    ),
)


@cache
def _strict() -> Fetcher:
    return fetcher(allow_private=False)


def check_any_url(urls: list[str]) -> None:
    """Follows redirects from one URL to the next: each is refused in words or asked at an address that was checked."""
    left = list(urls[1:])
    asked: list[str] = []

    def get(self: Fetcher, parts: Any, name: str, deadline: float) -> bytes:
        asked.append(self._address(name, parts.port or 80))
        if left:
            raise fetch_url._Redirect(left.pop(0))
        return JPEG

    with pytest.MonkeyPatch.context() as patch:
        resolve_to(patch, "93.184.216.34")
        patch.setattr(Fetcher, "_get", get)
        with contextlib.suppress(FetchError):
            assert _strict().fetch(urls[0]) == JPEG
    assert set(asked) <= {"93.184.216.34"}


_any_urls = given(st.lists(URLS, min_size=1, max_size=3))
test_any_url_is_fetched_or_refused = settings(max_examples=300, deadline=None)(_any_urls(check_any_url))


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@_any_urls
def test_ten_thousand_urls(urls: list[str]) -> None:
    check_any_url(urls)


# -- lists of URLs ----------------------------------------------------------------------------------------------------


def created(path: Path) -> Storage:
    storage = open_storage(path)
    log.create_workspace(storage)
    return storage


def config(source: Path, **options: Any) -> CorpusConfig:
    fetch = {"allow_private": True, "tries": 1}
    return CorpusConfig.model_validate({"source": str(source), "url": "url", "fetch": fetch, **options})


def test_a_list_becomes_a_packed_corpus(
    server: Server, tmp_path: Path, make_photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [photo.read_bytes() for photo in sorted(make_photos(tmp_path / "made", 3).glob("*.jpg"))]
    server.files = {f"/{number}.jpg": photo for number, photo in enumerate(photos)}
    urls = [server.url(path) for path in ("/0.jpg", "/gone", "/1.jpg", "/noai", "/html", "/2.jpg")]
    urls.insert(2, "http://user:x@example.org/")
    table = pa.table({"id": range(9), "url": [*urls, None, urls[0]], "text": [f"t{number}" for number in range(9)]})
    pq.write_table(table, tmp_path / "urls.parquet")
    asked = config(tmp_path / "urls.parquet", part_rows=4, key="id")
    storage = created(tmp_path / "work")
    with Catalog(storage) as catalog:
        found = ingest.ingest(catalog, "web", asked, run="r")
        assert (found.new, found.new_parts, found.root) == (7, 2, "")
        assert found.notes == [
            "1 row of urls.parquet without a URL, passed over: 7",
            f"1 URL that stands twice, taken once: {urls[0]}",
        ]
        parts = catalog.parts("web")
        rows = [row for part in parts for row in read_samples(storage.read(part.path))]
        assert [row.key for row in rows] == [str(number) for number in range(7)]
        assert [row.source for row in rows] == urls
        assert [row.columns["text"] for row in rows] == [f"t{number}" for number in range(7)]
        assert [(row.source_error or "ok").partition(":")[0] for row in rows] == [
            *("ok", "FetchError", "FetchRefused", "ok", "FetchRefused", "FetchError", "ok")
        ]
        errors = catalog.sql("SELECT source_error FROM samples WHERE source_error LIKE '%no JPEG%'").to_pylist()
        assert len(errors) == 1
        # Nothing is asked again.
        before = server.asked.total()
        assert ingest.ingest(catalog, "web", asked, run="r").new == 0
        assert server.asked.total() == before
        # The bytes lie in the workspace, whatever becomes of the list.
        (tmp_path / "urls.parquet").unlink()
        gone = ingest.ingest(catalog, "web", asked, run="r")
        assert (gone.samples, gone.new) == (7, 0)
        assert "its 2 parts are packed" in gone.notes[0]
        assert ingest.root_of(catalog, "web", asked) == ""
    source = SourceBytes("", asked, rows, storage)
    assert [source.read(place) for place in (0, 3, 6)] == photos
    with pytest.raises(FetchRefused, match="user name or password"):
        source.read(2)
    with pytest.raises(FetchError, match="404"):
        source.read(1)
    assert all(storage.exists(part.pack_path or "") for part in parts)


def test_text_and_csv_lists(server: Server, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text(f"# two\n{server.url('/a')}\n\n  {server.url('/b')}\n")
    (tmp_path / "urls.csv").write_text(f"url,n\n{server.url('/c')},3\n")
    with Catalog(created(tmp_path / "work")) as catalog:
        assert ingest.ingest(catalog, "lines", config(tmp_path / "urls.txt"), run="r").new == 2
        assert ingest.ingest(catalog, "table", config(tmp_path / "urls.csv"), run="r").new == 1
        rows = catalog.sql("SELECT source, n FROM samples ORDER BY source").to_pylist()
    assert rows == [
        {"source": server.url("/a"), "n": None},
        {"source": server.url("/b"), "n": None},
        {"source": server.url("/c"), "n": 3},
    ]
    with pytest.raises(ConfigError, match="no column 'link'"):
        with Catalog(created(tmp_path / "work2")) as catalog:
            ingest.ingest(catalog, "table", config(tmp_path / "urls.csv", url="link"), run="r")


def test_one_bad_row_or_list_costs_no_other(server: Server, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    rows = [("a", "/a"), (None, "/b"), ("a", "/c"), *((str(number), f"/{number}") for number in range(5))]
    table = pa.table({"url": [server.url(path) for _, path in rows], "id": [key for key, _ in rows]})
    pq.write_table(table, lists / "a.parquet")
    (lists / "b.parquet").write_bytes(b"PAR1 cut")
    (lists / "c.csv").write_text("url,id\nhttp://a..b/x.jpg,p\nhttp://[::1,q\n")
    with Catalog(created(tmp_path / "work")) as catalog:
        found = ingest.ingest(catalog, "web", config(lists, key="id"), run="r")
        rows = catalog.sql("SELECT key, source_error FROM samples ORDER BY key").to_pylist()
        assert catalog.sql("SELECT source FROM dropped")["source"].to_pylist() == ["b.parquet"]
    assert [row["key"] for row in rows] == ["0", "1", "2", "3", "4", "a", "p", "q"]
    assert [(row["source_error"] or "").partition(":")[0] for row in rows[-2:]] == ["FetchRefused", "FetchRefused"]
    told = "\n".join(found.notes)
    assert "1 row without a key, passed over: a.parquet, row 1: the key is None" in told
    assert "1 sample with a key that stands earlier, passed over" in told
    assert "1 list that cannot be used, passed over: table" in told


def test_the_loopback_is_refused_without_an_explicit_option(server: Server, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text(server.url("/a"))
    with Catalog(created(tmp_path / "work")) as catalog:
        assert ingest.ingest(catalog, "lines", config(tmp_path / "urls.txt", fetch={}), run="r").new == 1
        error = catalog.sql("SELECT source_error FROM samples")["source_error"][0].as_py()
    assert error.startswith("FetchRefused: 127.0.0.1 is 127.0.0.1, an address of this machine")
    assert not server.asked
