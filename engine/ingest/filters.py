"""Decides which new samples a corpus's filter leaves out: small, narrow, or seen before."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.pipeline.sections import FilterConfig
from engine.sources.listing import Notes, key_of
from manifests.errors import DecodeError
from manifests.queries.retention import NO_BYTES

if TYPE_CHECKING:
    from manifests.catalog.catalog import Catalog

_PREFIX_BYTES = 8
# The reason of files that no filter judged.
OTHER_KIND = "kind"
_NO_BYTES = bytes.fromhex(NO_BYTES)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Says why a sample is left out: a word to group by, and a sentence."""

    reason: str
    message: str


class Filter:
    """Judges samples one after the other, in the order of the corpus."""

    def __init__(self, config: FilterConfig, catalog: "Catalog", corpus: str) -> None:
        import numpy as np

        self._config = config
        self._seen: set[int] = set()
        # The first 8 bytes of a sha256 tell a billion samples apart but for a chance of 3 %, in 8 bytes each.
        self._known = np.empty(0, np.uint64)
        if config.duplicates != "none":
            query = "SELECT ('0x' || left(sha256, 16))::UBIGINT AS start FROM samples WHERE sha256 IS NOT NULL"
            if config.duplicates == "within":
                found = catalog.sql(f"{query} AND corpus = ?", [corpus])
            else:
                found = catalog.sql(query)
            self._known = np.unique(found["start"].to_numpy())

    def size_of(self, data: bytes) -> tuple[int, int] | None:
        """Returns width and height of an upright photograph, None if no filter asks or its header cannot be read."""
        from manifests.pixels import images

        if not self._config.needs_size:
            return None
        try:
            return images.size_of(data)
        except DecodeError:
            # It stays, and its row says what is wrong with it.
            return None

    def judge(self, sha256: bytes, size: tuple[int, int] | None) -> Reason | None:
        """Returns why a sample is left out, None if it is not."""
        if size is not None and (found := self._judge_size(*size)) is not None:
            return found
        if self._config.duplicates == "none" or sha256 == _NO_BYTES:
            return None
        start = int.from_bytes(sha256[:_PREFIX_BYTES], "big")
        if start in self._seen or self._is_known(start):
            where = "the corpus" if self._config.duplicates == "within" else "the workspace"
            return Reason(reason="duplicate", message=f"its bytes are those of an earlier sample of {where}")
        self._seen.add(start)
        return None

    def _judge_size(self, width: int, height: int) -> Reason | None:
        found = f"{width} x {height} px"
        for name, value in (("min_width", width), ("min_height", height), ("min_side", min(width, height))):
            least = getattr(self._config, name)
            if least is not None and value < least:
                return Reason(reason="small", message=f"{found}, below {name} {least}")
        if self._config.aspect is not None:
            least, most = self._config.aspect
            if not least <= width / height <= most:
                return Reason(reason="aspect", message=f"{found}: {width / height:.3f}, outside {least:g} to {most:g}")
        return None

    def _is_known(self, start: int) -> bool:
        import numpy as np

        place = int(np.searchsorted(self._known, np.uint64(start)))
        return place < len(self._known) and int(self._known[place]) == start


def other_kinds(notes: Notes) -> list[dict[str, Any]]:
    """Returns what was passed over for its kind when a source was listed, as rows of the view `dropped`."""
    return [
        {
            "key": key_of(file.path),
            "source": file.path,
            "size_bytes": file.size_bytes,
            "sha256": None,
            "reason": OTHER_KIND,
            "message": what,
        }
        for file, what in notes.passed_over
    ]
