"""Puts what pydantic found wrong with a file of options into words: a line a mistake, with its place, value and remedy.

It reads pydantic's plain error dictionaries, so that pydantic itself is not needed here.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from manifests.errors import nearest

KeyPath = tuple[str, ...]
# The pydantic model or dataclass of each section of a file, by its key path; `*` is any name or number.
Sections = Mapping[KeyPath, type]
_VALUE_LENGTH = 80
# An option that more sections than this have in common does not tell which of them was meant.
_MOST_PLACES = 2
# If an option of the same section is this similar, it was meant, whatever other sections have.
_SURELY = 0.85
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def explain(
    errors: Sequence[Mapping[str, Any]],
    sections: Sections,
    where: Callable[[KeyPath], str],
    *,
    below: KeyPath = (),
) -> list[str]:
    """Returns a line for each mistake in the `errors()` of a pydantic ValidationError.

    `where` names the place of a key path (`pipeline.yaml:12`), `below` is the key path at which the checked mapping stands.
    The ValueError of a validator may have several lines; one that begins with an option's name is about that option.
    """
    lines: list[str] = []
    for found in errors:
        inside = tuple(name for name in found["loc"] if name != "[key]")
        is_name = found["loc"][-1:] == ("[key]",)
        if found["type"] == "value_error":
            for message in found["msg"].removeprefix("Value error, ").splitlines():
                place, text = _about(inside, message, sections, below)
                lines.append(f"{where(tuple(map(str, place)))}: {text}")
            continue
        text = _sentence(inside, found["type"], found["msg"], found["input"], is_name, sections, below)
        lines.append(f"{where(tuple(map(str, below + inside)))}: {text}")
    return list(dict.fromkeys(lines))


def dotted(path: Sequence[object]) -> str:
    """Returns a key path as it is typed after `--set`: names with dots stand in quotes, places in a list in brackets."""
    text = ""
    for name in path:
        quoted = f'"{name}"' if "." in str(name) else str(name)
        text += f"[{name}]" if isinstance(name, int) and text else f"{'.' if text else ''}{quoted}"
    return text


def shown(value: Any) -> str:
    """Returns a value as messages show it, cut off if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _VALUE_LENGTH else f"{text[: _VALUE_LENGTH - 3]}..."


def _about(location: tuple[Any, ...], message: str, sections: Sections, below: KeyPath) -> tuple[tuple[Any, ...], str]:
    """Returns the key path that a validator's message is about, and the message with that path before it."""
    subject = message.split(" ")[0].rstrip(":")
    options = _section(location, sections)
    location = below + location
    if options is not None and subject.split(".")[0] in options:
        return (*location, *subject.split(".")), f"{dotted(location)}{'.' if location else ''}{message}"
    joint = " " if subject in ("is", "names", "holds", "cannot") else ": "
    return location, f"{dotted(location)}{joint if location else ''}{message}"


def _sentence(
    location: tuple[Any, ...], kind: str, message: str, value: Any, is_name: bool, sections: Sections, below: KeyPath
) -> str:
    name = dotted(below + location)
    if kind in _UNKNOWN:
        return f"{name} is no option; {_meant(location, sections, below)}"
    described = _described(location[:-1] if is_name else location, sections)
    if kind == "missing":
        return f"{name} is missing{described}"
    subject = f"{dotted((below + location)[:-1])} has the name" if is_name else f"{name} is"
    # Modalities may be a list too, which is read as a mapping before pydantic looks.
    is_list = kind == "dict_type" and location[-1] == "modalities"
    expected = "expected a list of names, or a mapping" if is_list else _expected(kind, message)
    return f"{subject} {shown(value)}; {expected}{described}"


def _meant(location: tuple[Any, ...], sections: Sections, below: KeyPath) -> str:
    """Says what an unknown option may be: one that belongs into another section, or else the nearest of this one."""
    *above, option = location
    options = _section(tuple(above), sections)
    if options is not None and difflib.get_close_matches(option, options, n=1, cutoff=_SURELY):
        return nearest(option, options)
    elsewhere = [
        dotted((*below, *("NAME" if name == "*" else name for name in pattern), option))
        for pattern in sections
        if option in (_section(pattern, sections) or ())
    ]
    if 0 < len(elsewhere) <= _MOST_PLACES:
        return f"did you mean {' or '.join(elsewhere)}?"
    return nearest(option, options) if options is not None else ""


def _expected(kind: str, message: str) -> str:
    """Says what pydantic expected in the words of YAML. Of a pattern, the option's description says more."""
    if kind in ("model_type", "dict_type", "dataclass_type", "mapping_type"):
        return "expected a mapping"
    if kind == "tuple_type":
        return "expected a list"
    if kind == "string_type":
        return "expected text; put it in quotes"
    if kind == "string_pattern_mismatch":
        return "it is not one of those accepted"
    return message.replace("Input should", "it should").replace("String should", "it should")


def matches(path: Sequence[object], pattern: KeyPath) -> bool:
    """Tells whether a key path is one of a pattern, in which `*` is any name or number."""
    return len(path) == len(pattern) and all(want in ("*", name) for name, want in zip(path, pattern, strict=True))


def _section(location: tuple[Any, ...], sections: Sections) -> Mapping[str, str | None] | None:
    for pattern, model in sections.items():
        if matches(location, pattern):
            # A dataclass has no descriptions.
            options = getattr(model, "model_fields", None) or getattr(model, "__dataclass_fields__", {})
            return {name: getattr(option, "description", None) for name, option in options.items()}
    return None


def _described(location: tuple[Any, ...], sections: Sections) -> str:
    options = _section(location[:-1], sections) if location else None
    description = options.get(str(location[-1])) if options is not None else None
    return f" ({description})" if description else ""
