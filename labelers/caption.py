"""Takes captions that come with the source."""

from collections.abc import Mapping
from typing import Annotated, Any

from labelers.protocol import LabelerSpec
from manifests.errors import LabelError


class Caption:
    """Makes modality `caption`: the text of the source column `column`, without white space around it.

    From a list of captions (strings, or dicts with the entry "caption") it takes the first that is not empty. A row
    without the column, or with an empty one, has no caption. Raises LabelError if the column holds anything else.
    """

    spec = LabelerSpec(name="caption", version=1, scope="image", inputs=("columns",), outputs=("caption",), batch=256)

    def __init__(self, column: Annotated[str, "the source column that holds captions"] = "caption") -> None:
        self.column = column

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[str | None]]:
        return {"caption": [self._caption(columns.get(self.column)) for columns in batch["columns"]]}

    def _caption(self, value: Any) -> str | None:
        candidates = value if isinstance(value, list | tuple) else [value]
        for candidate in candidates:
            text = candidate.get("caption") if isinstance(candidate, Mapping) else candidate
            if text is not None and not isinstance(text, str):
                raise LabelError(
                    f"column {self.column!r} holds a {type(text).__name__}; expected a caption, or a list of captions "
                    'as strings or as {"caption": ...}'
                )
            if text and text.strip():
                return text.strip()
        return None


LABELER = Caption
