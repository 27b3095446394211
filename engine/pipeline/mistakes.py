"""What pydantic found wrong with a pipeline file, in words: a line a mistake, with its place, value and remedy."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from engine.pipeline.file import KeyPath, Override, PipelineDocument, dotted
from manifests.errors import nearest

Sections = Mapping[KeyPath, type[BaseModel]]
_VALUE_LENGTH = 80
# Of an option that many sections have none can be guessed.
_MOST_PLACES = 2
# So alike, an option of the same section is meant, whatever others have.
_SURELY = 0.85


def explain(
    error: ValidationError, document: PipelineDocument, overrides: Sequence[Override], sections: Sections
) -> list[str]:
    """All mistakes, in the file's order of sections.

    `sections` holds the model of each section of the file, by key path with `*` for any name. A ValueError of one of
    its validators may have several lines; one that begins with the name of an option is about that option.
    """
    lines: list[str] = []
    for found in error.errors(include_url=False):
        location = tuple(str(name) for name in found["loc"] if name != "[key]")
        is_name = found["loc"][-1:] == ("[key]",)
        if found["type"] == "value_error":
            for message in found["msg"].removeprefix("Value error, ").splitlines():
                place, text = _about(location, message, _section(location, sections))
                lines.append(f"{document.where(place, overrides)}: {text}")
            continue
        text = _sentence(location, found["type"], found["msg"], found["input"], is_name, sections)
        lines.append(f"{document.where(location, overrides)}: {text}")
    return list(dict.fromkeys(lines))


def _about(location: KeyPath, message: str, model: type[BaseModel] | None) -> tuple[KeyPath, str]:
    """The key path that a validator's message is about, and the message with that path before it."""
    subject = message.split(" ")[0].rstrip(":")
    if model is not None and subject.split(".")[0] in model.model_fields:
        return (*location, *subject.split(".")), f"{dotted(location)}{'.' if location else ''}{message}"
    joint = " " if subject in ("is", "names", "holds") else ": "
    return location, f"{dotted(location)}{joint if location else ''}{message}"


def _sentence(location: KeyPath, kind: str, message: str, value: Any, is_name: bool, sections: Sections) -> str:
    name = dotted(location)
    if kind == "extra_forbidden":
        return f"{name} is no option; {_meant(location, sections)}"
    described = _described(location[:-1] if is_name else location, sections)
    if kind == "missing":
        return f"{name} is missing{described}"
    shown = "null" if value is None else repr(value)
    if len(shown) > _VALUE_LENGTH:
        shown = f"{shown[: _VALUE_LENGTH - 3]}..."
    subject = f"{dotted(location[:-1])} has the name {shown}" if is_name else f"{name} is {shown}"
    # Modalities may be a list too, which is read as a mapping before pydantic looks.
    is_list = kind == "dict_type" and location[-1] == "modalities"
    expected = "expected a list of names, or a mapping" if is_list else _expected(kind, message)
    return f"{subject}; {expected}{described}"


def _meant(location: KeyPath, sections: Sections) -> str:
    """What an unknown option may be: one of another section that was put into the wrong one, else the nearest here."""
    *above, option = location
    model = _section(tuple(above), sections)
    if model is not None and difflib.get_close_matches(option, model.model_fields, n=1, cutoff=_SURELY):
        return nearest(option, model.model_fields)
    elsewhere = [
        dotted(["NAME" if name == "*" else name for name in (*pattern, option)])
        for pattern, model in sections.items()
        if option in model.model_fields
    ]
    if 0 < len(elsewhere) <= _MOST_PLACES:
        return f"did you mean {' or '.join(elsewhere)}?"
    return nearest(option, model.model_fields) if model else ""


def _expected(kind: str, message: str) -> str:
    """What pydantic expected, in the words of YAML; a pattern says less than the option's description."""
    if kind in ("model_type", "dict_type"):
        return "expected a mapping"
    if kind == "tuple_type":
        return "expected a list"
    if kind == "string_type":
        return "expected text; put it in quotes"
    if kind == "string_pattern_mismatch":
        return "it is not one of those accepted"
    return message.replace("Input should", "it should").replace("String should", "it should")


def _section(location: KeyPath, sections: Sections) -> type[BaseModel] | None:
    for pattern, model in sections.items():
        if len(pattern) == len(location) and all(
            want in ("*", name) for want, name in zip(pattern, location, strict=True)
        ):
            return model
    return None


def _described(location: KeyPath, sections: Sections) -> str:
    model = _section(location[:-1], sections) if location else None
    field = model.model_fields.get(location[-1]) if model else None
    return f" ({field.description})" if field and field.description else ""
