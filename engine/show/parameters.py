"""Shows the parameters of labelers and tokenizers: type, default and meaning; `docs/parameters.md` is the page of them."""

import inspect
import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from engine.pipeline.sections import GridFit, TextFit
from labelers import protocol
from labelers.protocol import Labeler

COLUMNS = ("parameter", "type", "default", "meaning")
_TOKENIZERS = {
    "grid": (GridFit, "tokenizers.NAME of an image-like modality or a feature map"),
    "text": (TextFit, "tokenizers.text, the one of all sequences"),
}
_PAGE = """# Parameters of labelers and tokenizers

This page is written by `python docs/write_parameters.py`; `modmill labelers`, `modmill labelers NAME` and `modmill labelers
--tokenizers` show the same, also for a labeler of your own (`my_module:MyLabeler`). Parameters of a labeler are given as
`modalities: {edges: {parameters: {low: 50}}}`, for all corpora or in one; options of a tokenizer as
`tokenizers: {rgb: {codebook: 4096}}`. Parameters of a labeler are part of its recipe: other values make other shards.
"""

Row = tuple[str, str, str, str]


def labelers() -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Returns a row for each labeler: what it makes, and its parameters."""
    rows = []
    for name in protocol.names():
        labeler = protocol.find(name)
        given = ", ".join(parameter.name for parameter in protocol.described(labeler))
        rows.append((name, _makes(labeler), given, _first_line(labeler)))
    return ("labeler", "makes", "parameters", "what"), rows


def of_labeler(name: str) -> list[Row]:
    """Returns a row for each parameter of a labeler. Raises ConfigError if there is no such labeler."""
    return [
        _row(
            parameter.name,
            parameter.annotation,
            "must be given" if parameter.is_required else parameter.default,
            parameter.meaning,
        )
        for parameter in protocol.described(protocol.find(name))
    ]


def of_tokenizer(family: str) -> list[Row]:
    """Returns a row for each option of a family of tokenizers, `grid` or `text`."""
    section, _ = _TOKENIZERS[family]
    return [
        _row(name, field.annotation, field.default, field.description or "")
        for name, field in section.model_fields.items()
    ]


def _row(name: str, annotation: Any, default: Any, meaning: str) -> Row:
    # None may stand for a default that is known elsewhere: then the meaning tells it at its end.
    meaning, _, told = meaning.partition("; default: ")
    return name, _type(annotation), told or _value(default), meaning


def tokenizers() -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Returns a row for each option of each family of tokenizers."""
    return ("tokenizer", *COLUMNS), [(family, *row) for family in _TOKENIZERS for row in of_tokenizer(family)]


def about(name: str) -> str:
    """Tells in one line what a labeler makes."""
    labeler = protocol.find(name)
    return f"{labeler.spec.name}, version {labeler.spec.version}: {_first_line(labeler)}"


def page() -> str:
    """Returns the page of all labelers and tokenizers, as Markdown."""
    sections = [_PAGE, "## Labelers\n"]
    for name in protocol.names():
        rows = of_labeler(name)
        sections.append(f"### `{name}`\n\n{_first_line(protocol.find(name))}\n")
        sections.append(_table(rows) if rows else "It has no parameters.\n")
    sections.append("## Tokenizers\n")
    for family, (section, key) in _TOKENIZERS.items():
        sections.append(f"### `{family}`: {key}\n\n{_first_line(section)}\n")
        sections.append(_table(of_tokenizer(family)))
    return "\n".join(sections)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _makes(labeler: type[Labeler]) -> str:
    return ", ".join(labeler.spec.outputs or ("the modality that names it",))


def _first_line(documented: type) -> str:
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


def _value(default: Any) -> str:
    return "none" if default is None else default if isinstance(default, str) else json.dumps(default)


def _type(annotation: Any) -> str:
    """Returns a type in words: `int`, `str | None`, `Sequence[str]`."""
    if annotation is inspect.Parameter.empty:
        return "not told"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if annotation is types.NoneType:
        return "None"
    name = annotation if isinstance(annotation, str) else getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type, arguments))}]" if arguments else name
