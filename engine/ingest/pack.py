"""Packs source bytes into the workspace: a tar beside each part's samples, from which they are read in place later."""

import tarfile
import tempfile
import threading
from collections.abc import Mapping
from typing import IO

from manifests.formats.shards import add_member
from manifests.pixels.containers import AVIF_BRANDS, HEIC_BRANDS, iso_brands
from manifests.recipe import sha256_of_stream
from manifests.store import paths
from manifests.store.storage import Storage, put_same

_STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}

_BRANDS = {**dict.fromkeys(AVIF_BRANDS, "avif"), **dict.fromkeys(HEIC_BRANDS, "heic")}


def image_suffix(data: bytes) -> str | None:
    """Returns the suffix of an image by how its bytes begin, whatever its name or server says; None if it is not one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    brands = iso_brands(data)
    if brands:
        # A film is an ISO media file as well.
        return next((suffix for brand, suffix in _BRANDS.items() if brand in brands), None)
    return next((suffix for start, suffix in _STARTS.items() if data.startswith(start)), None)


class Packing:
    """Holds bytes on this machine's disk, by number, until their part is known; closing it drops them."""

    def __init__(self) -> None:
        self._file = _scratch()
        self._end = 0
        self._places: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def put(self, number: int, data: bytes) -> None:
        """Keeps bytes under a number; from any thread."""
        with self._lock:
            self._file.seek(self._end)
            self._file.write(data)
            self._places[number] = (self._end, len(data))
            self._end += len(data)

    def drop(self, number: int) -> None:
        """Drops the bytes of a number."""
        del self._places[number]

    def close(self) -> None:
        """Drops all bytes."""
        self._file.close()

    def write(
        self, storage: Storage, corpus: str, part: int, rows: Mapping[int, int]
    ) -> tuple[str, str, dict[int, int]]:
        """Writes the tar of a part and drops its bytes. Returns its path, sha256, and where the bytes of each row begin.

        `rows` has the number of each row that has bytes. Members are named by row; equal bytes give an equal tar.
        """
        offsets = {}
        with _scratch() as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for row, number in rows.items():
                    data = self._take(number)
                    offsets[row] = tar.offset + tarfile.BLOCKSIZE
                    add_member(tar, f"{row:07d}.{image_suffix(data) or 'bin'}", data)
            file.seek(0)
            sha256 = sha256_of_stream(file)
            path = paths.pack(corpus, part, sha256)
            file.seek(0)
            put_same(storage, path, file, sha256)
        self._compact()
        return path, sha256, offsets

    def _take(self, number: int) -> bytes:
        begin, size = self._places.pop(number)
        self._file.seek(begin)
        return self._file.read(size)

    def _compact(self) -> None:
        """Frees disk that is not needed any more: what waits for the next part goes into a new file."""
        before, places = self._file, self._places
        self._file, self._end, self._places = _scratch(), 0, {}
        with before:
            for number, (begin, size) in places.items():
                before.seek(begin)
                self.put(number, before.read(size))


def _scratch() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="modmill-pack-")
