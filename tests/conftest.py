"""What tests share: a cache of their own, photographs, an S3 server on the loopback, one Ray cluster for the session."""

import logging
import os
import re
import shlex
import signal
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Shares tests out to several processes: those of a file stay together, and all files that use Ray, so it starts once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if "ray_cluster" in (config.rootpath / file).read_text() else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell that starts the tests in the background has Ctrl-C ignored, in them and in what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """No test touches the user's cache."""
    with tempfile.TemporaryDirectory(prefix="modmill-cache-") as folder:
        before = os.environ.get("MODMILL_CACHE")
        os.environ["MODMILL_CACHE"] = folder
        yield
        if before is None:
            del os.environ["MODMILL_CACHE"]
        else:
            os.environ["MODMILL_CACHE"] = before


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., Path]:
    """Writes JPEGs cut from photographs that ship inside scikit-image, each with a caption beside it."""

    def make(folder: Path, count: int, seed: int = 0) -> Path:
        import cv2
        import numpy as np
        import skimage.data

        folder.mkdir(parents=True, exist_ok=True)
        sources = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
        generator = np.random.default_rng(seed)
        for number in range(count):
            source = sources[number % len(sources)]
            height, width = (int(side) for side in generator.integers(180, 300, 2))
            top = int(generator.integers(0, source.shape[0] - height + 1))
            left = int(generator.integers(0, source.shape[1] - width + 1))
            window = source[top : top + height, left : left + width]
            cv2.imwrite(str(folder / f"photo{number:03d}.jpg"), cv2.cvtColor(window, cv2.COLOR_RGB2BGR))
            if number % 4:
                (folder / f"photo{number:03d}.txt").write_text(f"a photograph, number {number}, {height} rows high")
        return folder

    return make


@pytest.fixture(scope="session")
def hostile_files() -> Callable[[Path], list[str]]:
    """Adds what real folders hold to a folder of photographs; the relative paths of those that must fail."""

    def add(folder: Path) -> list[str]:
        whole = sorted(folder.glob("*.jpg"))[0].read_bytes()
        (folder / "zero.jpg").write_bytes(b"")
        (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / "text.jpg").write_text("this is a text file named .jpg")
        (folder / "bomb.png").write_bytes(_bomb(30_000))
        (folder / "not_utf8.jpg").write_bytes(whole)
        (folder / "not_utf8.txt").write_bytes(b"caf\xe9 \xff\xfe terrace")
        (folder / "empty_caption.jpg").write_bytes(whole)
        (folder / "empty_caption.txt").write_text("")
        for sub in ("one", "two"):
            (folder / sub).mkdir()
            (folder / sub / "same.jpg").write_bytes(whole)
        return ["bomb.png", "text.jpg", "truncated.jpg", "zero.jpg"]

    return add


def _bomb(side: int) -> bytes:
    """A PNG of side x side pixels, some kilobytes on disk: one bit a pixel, all zero."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def photos(tmp_path: Path, make_photos: Callable[..., Path]) -> Path:
    """A folder of nine photographs."""
    return make_photos(tmp_path / "photos", 9)


def _make_puts_atomic() -> None:
    """Has moto check `If-None-Match` and store as one step, as stores do: its threads may else both find a name free."""
    from moto.s3.responses import S3Response

    lock, put = threading.Lock(), S3Response.put_object

    def put_object(response: Any) -> Any:
        with lock:
            return put(response)

    S3Response.put_object = put_object


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """The URI of a bucket of moto's server, which is made known by the environment alone."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    _make_puts_atomic()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="session")
def readme_questions() -> list[list[str]]:
    """The arguments of the README's commands that ask a workspace, which is called W there."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    found = re.search(r"<!-- questions -->\n```bash\n(.*?)```", readme, re.DOTALL)
    assert found
    # In a shell a backslash at the end of a line joins it to the next.
    commands = re.split(r"\n+(?=modmill )", found[1].replace("\\\n", "").strip())
    return [shlex.split(command)[1:] for command in commands]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One Ray for all tests, starting it takes seconds: a `Cluster` of a node with 2 CPUs, to which tests may add.

    Its workers find the labelers of `tests/data/own_labelers`.
    """
    import ray
    from ray.cluster_utils import Cluster

    own = str(Path(__file__).parent / "data/own_labelers")
    with tempfile.TemporaryDirectory(prefix="modmill-ray-") as empty, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", own, prepend=os.pathsep)
        patch.syspath_prepend(own)
        for attempt in range(4):
            try:
                cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
                break
            except Exception:
                # On a busy machine a node takes longer to start than the 30 s that Ray gives it.
                if attempt == 3:
                    raise
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"working_dir": empty})
        yield cluster
        ray.shutdown()
        cluster.shutdown()
