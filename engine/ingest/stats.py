"""Remembers which size and time of change each local source had when it was last hashed."""

import contextlib
import json
from collections.abc import Collection, Sequence
from typing import Any

from engine.sources.listing import Listed
from manifests.store.storage import cache_folder, replace_file


class SourceStats:
    """Holds them in the user's cache: files of the workspace hold no times."""

    def __init__(self, workspace_id: str, corpus: str) -> None:
        self._path = cache_folder() / workspace_id / f"sources-{corpus}.json"
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads(self._path.read_text())

    def get(self, listed: Listed) -> str | None:
        """Returns the hash that was last seen, as hex."""
        entry = self._known.get(listed.source)
        return entry[2] if entry else None

    def is_touched(self, listed: Listed) -> bool:
        """Tells whether a file that was hashed before has another size or modification time now."""
        entry = self._known.get(listed.source)
        return entry is not None and entry[:2] != [listed.size_bytes, listed.mtime_ns]

    def put(self, listed: Listed, sha256: bytes) -> None:
        self._known[listed.source] = [listed.size_bytes, listed.mtime_ns, sha256.hex()]

    def save(self, listed: Sequence[Listed]) -> None:
        """Keeps what is known of the sources that are there; losing it costs a change that goes unseen until work."""
        present = {item.source for item in listed}
        self._write({source: entry for source, entry in self._known.items() if source in present})

    def forget(self, sources_sha256: Collection[str]) -> None:
        """Takes out the sources whose bytes have one of these sha256."""
        left = {source: entry for source, entry in self._known.items() if entry[2] not in sources_sha256}
        if len(left) < len(self._known):
            self._write(left)

    def _write(self, known: dict[str, list[Any]]) -> None:
        with contextlib.suppress(OSError):
            replace_file(self._path, json.dumps(known).encode())
