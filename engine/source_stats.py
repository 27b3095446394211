"""What size and time of change each local source had when it was last hashed."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import sources
from manifests.storage import cache_folder


class SourceStats:
    """What size and modification time each local source had when it was last hashed; in the user's cache, so never in
    the workspace, whose files hold no times."""

    def __init__(self, workspace_id: str, corpus: str) -> None:
        self._path = cache_folder() / workspace_id / f"sources-{corpus}.json"
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads(self._path.read_text())

    def get(self, listed: sources.Listed) -> str | None:
        """The hash that was last seen, as hex."""
        entry = self._known.get(listed.source)
        return entry[2] if entry else None

    def is_touched(self, listed: sources.Listed) -> bool:
        """Whether a file that was hashed before has another size or modification time now."""
        entry = self._known.get(listed.source)
        return entry is not None and entry[:2] != [listed.size_bytes, listed.mtime_ns]

    def put(self, listed: sources.Listed, sha256: bytes) -> None:
        self._known[listed.source] = [listed.size_bytes, listed.mtime_ns, sha256.hex()]

    def save(self, listed: Sequence[sources.Listed]) -> None:
        """Keeps what is known of the sources that are there; losing it costs a change that goes unseen until work."""
        present = {item.source for item in listed}
        kept = {source: entry for source, entry in self._known.items() if source in present}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(f"{self._path}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(kept))
            os.replace(temporary, self._path)
        except OSError:
            pass
