"""Takes documents that come with the source."""

from collections.abc import Mapping
from typing import Annotated, Any

from labelers.protocol import LabelerSpec
from manifests.errors import LabelError


class Text:
    """Makes modality `text`: the source column `column` unchanged; a row without it, or with an empty one, has no text.

    Raises LabelError if the column holds anything but a string.
    """

    spec = LabelerSpec(name="text", version=1, scope="image", inputs=("columns",), outputs=("text",), batch=256)

    def __init__(self, column: Annotated[str, "the source column that holds documents"] = "text") -> None:
        self.column = column

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[str | None]]:
        return {"text": [self._document(columns.get(self.column)) for columns in batch["columns"]]}

    def _document(self, value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            raise LabelError(f"column {self.column!r} holds a {type(value).__name__}; expected the text of a document")
        return value or None


LABELER = Text
