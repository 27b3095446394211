"""Reads labels that come with the source: files beside the photographs, or source columns."""

import json
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import fsspec

from labelers.protocol import LabelerSpec, check_label
from manifests.errors import ConfigError, DecodeError, LabelError
from manifests.modality import Modality, get

if TYPE_CHECKING:
    import numpy as np

_COORDINATES = ("x0", "y0", "x1", "y1")
_ROUNDING = 1e-3  # how far over 0 and 1 a coordinate may be, as writers round; it is clipped


class Files:
    """Makes any modality from one file a photograph (`path`) or one source column (`column`).

    A missing file, or a row without the column, is an absent label.

    Maps (`.npy`, PNG, TIFF; for a modality of photographs everything that `manifests/pixels/images.py` decodes) show the
    upright photograph, at any resolution, and are cast to the modality's dtype. Integer normals without `scale` are
    n / largest * 2 - 1 with the middle (128, 128, 128) as null; normals are scaled to length 1. Values that are not
    finite become null if the null marker is NaN.
    Boxes are a JSON list of {"class", "score", "x0", "y0", "x1", "y1"} in fractions of the photograph, or 4M's
    {"instances": [{"boxes": [x0, y0, x1, y1], "class_name", "score"}]}; a missing score is 1.
    Raises LabelError if a label cannot be read or does not fit the modality.
    """

    spec = LabelerSpec(
        name="files",
        version=1,
        scope="image",
        inputs=("source", "columns"),
        outputs=None,
        batch=16,
        requires=("cv2", "numpy", "PIL"),
    )

    def __init__(
        self,
        modality: Annotated[str, "the name of the modality to make; set by the engine"],
        path: Annotated[
            str | None,
            "a file relative to the photograph's folder, with {stem} and {name} of the photograph: ../depth/{stem}.png",
        ] = None,
        column: Annotated[
            str | None, "a source column that holds a path as above, JSON text, the text itself, or the value"
        ] = None,
        scale: Annotated[float | None, "label = number * scale + offset; default: numbers as they are"] = None,
        offset: Annotated[float | None, "see scale"] = None,
        null: Annotated[
            float | None, "the number that stands for no value in the source; becomes the modality's null marker"
        ] = None,
        names: Annotated[
            Sequence[str] | Mapping[str, str] | None,
            "class names by class index, a list or a mapping, if boxes give their class as an integer",
        ] = None,
        boxes_path: Annotated[
            str | None,
            "for an index map of instances (0 none): a boxes file whose record i has class and score of instance i",
        ] = None,
    ) -> None:
        self.modality = get(modality)
        if (path is None) == (column is None):
            raise ConfigError(f"files for {modality!r}: give one of path={path!r} and column={column!r}")
        if null is not None and self.modality.null is None:
            raise ConfigError(f"files for {modality!r}: null={null}, but the modality has no null marker")
        for template in (path, boxes_path):
            if template is not None:
                _fill(template, "photo.jpg")
        self.path, self.column, self.boxes_path = path, column or "", boxes_path
        self.scale, self.offset, self.null = scale, offset, null
        pairs = names.items() if isinstance(names, Mapping) else enumerate(names or ())
        self.names = {str(index): name for index, name in pairs}

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        rows = zip(batch["source"], batch["columns"], strict=True)
        return {self.modality.name: [self._label(source, columns) for source, columns in rows]}

    def _label(self, source: str, columns: Mapping[str, Any]) -> Any:
        if self.path is not None:
            where = _beside(source, _fill(self.path, source))
            found = _read(where)
        else:
            where = f"column {self.column!r} of {source}"
            found = columns.get(self.column)
            if isinstance(found, str) and self.modality.kind != "text" and not found.lstrip().startswith(("{", "[")):
                where = _beside(source, found) if found else where
                found = _read(where) if found else None
        if found is None:
            return None
        try:
            label = self._convert(found, source)
            if label is not None:
                check_label(self.modality, label, any_size=True)
        except (DecodeError, LabelError) as error:
            raise LabelError(f"{where}: {error}") from error
        return label

    def _convert(self, found: Any, source: str) -> Any:
        """Returns the label in the bytes of a file or in the value of a column."""
        modality = self.modality
        if modality.kind == "text":
            return _text(found) or None
        if isinstance(found, str) or (isinstance(found, bytes) and found.lstrip()[:1] in (b"{", b"[")):
            found = _json(found)
        if modality.kind != "structured":
            from manifests.pixels.raw_labels import fit_array

            return fit_array(modality, _numbers(modality, found), self.scale, self.offset, self.null)
        if isinstance(found, bytes):
            if modality.crop_rule != "instances":
                raise LabelError(f"the file's {len(found)} bytes are no JSON; expected a JSON list or object")
            return self._instances(found, source)
        if modality.crop_rule in ("boxes", "instances"):
            return [self._box(record) for record in _box_records(found)]
        return found

    def _box(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns one record of boxes or instances, with exactly the modality's fields."""
        corners = record.get("boxes") or [record.get(name) for name in _COORDINATES]
        box: dict[str, Any] = {name: record[name] for name in self.modality.fields if name in record}
        box["class"] = self._class_name(record.get("class", record.get("class_name")))
        box["score"] = 1.0 if record.get("score") is None else _fraction("score", record["score"])
        if len(corners) != len(_COORDINATES):
            raise LabelError(f"a box has {len(corners)} coordinates, expected x0, y0, x1, y1")
        for name, value in zip(_COORDINATES, corners, strict=True):
            box[name] = _fraction(name, value)
        if box["x1"] < box["x0"] or box["y1"] < box["y0"]:
            raise LabelError(f"the box {corners} ends before it starts; expected x0 <= x1 and y0 <= y1, not a width")
        return box

    def _class_name(self, value: Any) -> str:
        name = self.names.get(str(value), value)
        if not isinstance(name, str):
            raise LabelError(f"the class {value!r} has no name; expected a string, or an index into names={self.names}")
        return name

    def _instances(self, data: bytes, source: str) -> list[dict[str, Any]] | None:
        """Returns the instances of an index map, None if the file of their boxes is missing."""
        import numpy as np

        from manifests.pixels.crops import mask_box, rle_encode
        from manifests.pixels.images import decode_map

        index = decode_map(data)
        if index.ndim != 2 or index.dtype.kind not in "ui":
            raise LabelError(f"an index map of instances is {index.dtype} {index.shape}; expected integers (h, w)")
        facts: list[Mapping[str, Any]] | None = None
        if self.boxes_path is not None:
            content = _read(_beside(source, _fill(self.boxes_path, source)))
            if content is None:
                return None
            facts = _box_records(_json(content))
        instances = []
        for number in np.unique(index[index != 0]).tolist():
            if facts is not None and not 1 <= number <= len(facts):
                raise LabelError(f"the index map holds instance {number}, but {self.boxes_path} {len(facts)} records")
            fact = {"class": "instance"} if facts is None else facts[number - 1]
            mask = index == number
            runs = {"rle_height": mask.shape[0], "rle_width": mask.shape[1], "rle_counts": rle_encode(mask)}
            instances.append(self._box({**fact, **runs, "boxes": list(mask_box(mask).values())}))
        return instances


def _fill(template: str, source: str) -> str:
    """Returns the template's path for a photograph."""
    name = posixpath.basename(source)
    try:
        return template.format(name=name, stem=posixpath.splitext(name)[0])
    except (LookupError, ValueError, AttributeError) as error:
        raise ConfigError(f"path template {template!r}: {error!r}; expected {{stem}} and {{name}} only") from error


def _beside(source: str, relative: str) -> str:
    """Returns the URI of a path relative to the folder of a photograph's URI, without '..'."""
    if "://" in relative or relative.startswith("/"):
        raise LabelError(f"the label's path {relative!r} is not relative to the folder of {source}")
    scheme, separator, place = source.rpartition("://")
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(place), relative))
    if separator and joined.startswith(".."):
        raise LabelError(f"the label's path {relative!r} leads out of {source}")
    return f"{scheme}{separator}{joined}"


def _read(uri: str) -> bytes | None:
    """Returns the bytes of a file, None if it is missing."""
    try:
        if "://" not in uri:
            return Path(uri).read_bytes()
        fs, path = fsspec.core.url_to_fs(uri)
        return fs.cat_file(path)
    except FileNotFoundError:
        return None
    except (OSError, ImportError, ValueError) as error:
        raise LabelError(f"{uri}: the label cannot be read: {error}") from error


def _numbers(modality: Modality, found: Any) -> "np.ndarray":
    """Returns the array in the bytes of a file or in the value of a column."""
    import numpy as np

    from manifests.formats.codecs import decode_file

    if isinstance(found, bytes):
        return decode_file(modality, found)
    try:
        array = np.asarray(found)
    except ValueError as error:
        raise LabelError(f"the value is no array: {error}") from error
    if array.dtype.kind not in "buif":
        raise LabelError(f"the value is a {type(found).__name__} of {array.dtype}; expected numbers")
    return array


def _text(found: Any) -> str:
    """Returns the text in the bytes of a file or in the value of a column."""
    try:
        text = found.decode("utf-8-sig") if isinstance(found, bytes) else found
    except UnicodeDecodeError as error:
        raise LabelError(f"the file is not UTF-8: {error}") from error
    if not isinstance(text, str):
        raise LabelError(f"the value is a {type(found).__name__}; expected text")
    return text


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"no JSON: {error}") from error


def _box_records(found: Any) -> list[Mapping[str, Any]]:
    records = found.get("instances") if isinstance(found, Mapping) else found
    if not isinstance(records, list | tuple) or not all(isinstance(record, Mapping) for record in records):
        raise LabelError(f'the value is a {type(found).__name__}; expected a list of boxes, or {{"instances": [...]}}')
    return list(records)


def _fraction(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -_ROUNDING <= value <= 1 + _ROUNDING:
        raise LabelError(f"{name} is {value!r}; expected a fraction from 0 to 1 (of the photograph, not pixels)")
    return min(max(float(value), 0.0), 1.0)


LABELER = Files
