"""Source columns of images: sidecar files beside them (`photo.txt`, `photo.json`), and a table joined by name.

All values are JSON values of Python; NaN and infinity become null.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from engine.listing import File, Notes, read_file, stem, suffix
from engine.tables import join, join_column, read_table
from engine.values import decoded, parsed
from manifests.errors import SourceError


def image_columns(
    root: str, files: Sequence[File], images: Sequence[File], table: str | None, key: str | None, notes: Notes
) -> Callable[[str], dict[str, Any]]:
    """A function that reads the source columns of the image at a path.

    `photo.txt` is the column `caption`, the keys of `photo.json` are columns, and the table's go over both. What cannot be
    read becomes a note. Raises ConfigError for a table that does not fit.
    """
    beside = {
        kind: {stem(file.path): file.path for file in files if suffix(file.path) == kind} for kind in (".txt", ".json")
    }
    joined: dict[str, int] = {}
    loaded, joined_by = None, ""
    if table is not None:
        loaded = read_table(table, key, notes)
        joined_by = join_column(loaded, key)
        joined = join(loaded, joined_by, [image.path for image in images], root, notes)

    def read(path: str) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        if name := beside[".txt"].get(stem(path)):
            columns.update(caption_of(partial(read_file, root, name), name, notes))
        if name := beside[".json"].get(stem(path)):
            columns.update(object_of(partial(read_file, root, name), name, notes))
        if loaded is not None and path in joined:
            columns.update(loaded.row(joined[path], joined_by))
        return columns

    return read


def caption_of(read: Callable[[], bytes], path: str, notes: Notes) -> dict[str, Any]:
    """The column that the text file `path` beside an image is; nothing and a note where it cannot be read."""
    try:
        text, exact = decoded(read())
    except SourceError as error:
        notes.add("caption", "that cannot be read", str(error))
        return {}
    if not exact:
        notes.add("caption", "not in UTF-8, read with replacement characters", path)
    return {"caption": text.strip()}


def object_of(read: Callable[[], bytes], path: str, notes: Notes) -> dict[str, Any]:
    """The columns that the JSON file `path` beside an image holds; nothing and a note where it cannot be read."""
    try:
        value = parsed(decoded(read())[0])
    except SourceError as error:
        notes.add("sidecar", "that cannot be read", str(error))
        return {}
    except ValueError as error:
        notes.add("sidecar", "without valid JSON, left out", f"{path} ({error})")
        return {}
    if not isinstance(value, dict):
        notes.add("sidecar", "without a JSON object, left out", path)
        return {}
    return value
