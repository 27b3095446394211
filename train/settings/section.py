"""Reading a mapping of options: each key with its type and range, all mistakes collected, what nobody asked for named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from manifests.errors import ConfigError, nearest

KeyPath = tuple[str, ...]
_VALUE_LENGTH = 80


@dataclass
class Mistakes:
    """What is wrong with a file, a line each; `where` says where a key path stands (`train.yaml:12`)."""

    where: Callable[[KeyPath], str]
    lines: list[str] = field(default_factory=list)

    def add(self, path: KeyPath, text: str) -> None:
        """One mistake about a key path; `text` goes on after its name."""
        name = ".".join(path).replace(".[", "[")
        line = f"{self.where(path)}: {name}{' ' if name else ''}{text}"
        if line not in self.lines:
            self.lines.append(line)

    def check(self) -> None:
        """Raises ConfigError with all of them, if there are any."""
        if self.lines:
            raise ConfigError("\n".join(self.lines))


class Section:
    """A mapping of options as it is read. `end` names the keys that were not asked for.

    A key that is missing has its default, a wrong one too, after its mistake is noted.
    """

    def __init__(self, value: Any, path: KeyPath, mistakes: Mistakes) -> None:
        self.path = path
        self.mistakes = mistakes
        self._asked: set[str] = set()
        self._values: dict[str, Any] = {}
        if isinstance(value, Mapping):
            self._values = {str(name): below for name, below in value.items()}
        elif value is not None:
            mistakes.add(path, f"is {shown(value)}, expected a mapping")

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def wrong(self, key: str, text: str) -> None:
        """Notes a mistake about a key."""
        self.mistakes.add((*self.path, key), text)

    def raw(self, key: str) -> Any:
        """The value as it stands, None where it is missing."""
        self._asked.add(key)
        return self._values.get(key)

    def number(self, key: str, default: float, *, least: float = -inf, over: float = -inf, most: float = inf) -> float:
        """A finite number, least <= it <= most and over < it."""
        value = self.raw(key)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not (is_number and least <= value <= most and value > over):
            self.wrong(key, f"is {shown(value)}, expected a number{_bounds(least, over, most)}")
            return default
        return float(value)

    def integer(self, key: str, default: int, *, least: int = 0) -> int:
        """A whole number from `least` up."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.wrong(key, f"is {shown(value)}, expected a whole number from {least} up")
            return default
        return value

    def optional_integer(self, key: str, *, least: int = 0) -> int | None:
        """A whole number, None where it is missing."""
        return self.integer(key, least, least=least) if self.raw(key) is not None else None

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, f"is {shown(value)}, expected true or false")
            return default
        return value

    def text(self, key: str, default: str, *, choices: Sequence[str] = (), any_case: bool = False) -> str:
        """A text that is not empty, one of `choices` if there are any (`any_case`: in whatever case it is written)."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str) or not value:
            self.wrong(key, f"is {shown(value)}, expected {' or '.join(choices) or 'a text'}")
            return default
        if any_case:
            value = {choice.lower(): choice for choice in choices}.get(value.lower(), value)
        if choices and value not in choices:
            self.wrong(key, f"is {value!r}; {nearest(value, choices)}")
            return default
        return value

    def pair(self, key: str, default: tuple[int, int], *, least: int = 0) -> tuple[int, int]:
        """[least, most]: two whole numbers in order."""
        value = self.raw(key)
        if value is None:
            return default
        whole = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        if not (whole and len(value) == 2 and least <= value[0] <= value[1]):
            self.wrong(key, f"is {shown(value)}, expected [a, b] with {least} <= a <= b")
            return default
        return value[0], value[1]

    def numbers(self, key: str, default: Mapping[str, float]) -> dict[str, float]:
        """A mapping of names to numbers from 0 up."""
        value = self.raw(key)
        if value is None:
            return dict(default)
        below = Section(value, (*self.path, key), self.mistakes)
        return {name: below.number(name, 0.0, least=0.0) for name in below._values}

    def section(self, key: str) -> "Section":
        """The mapping below a key, an empty one where it is missing."""
        return Section(self.raw(key), (*self.path, key), self.mistakes)

    def sections(self, key: str) -> list["Section"]:
        """The mappings in the list below a key, none where it is missing."""
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.wrong(key, f"is {shown(value)}, expected a list")
            return []
        return [Section(one, (*self.path, key, f"[{number}]"), self.mistakes) for number, one in enumerate(value)]

    def left(self) -> list[str]:
        """The keys that were not asked for."""
        return [name for name in self._values if name not in self._asked]

    def end(self) -> None:
        """Notes every key that was not asked for, with the nearest of those that were."""
        for name in self.left():
            self.wrong(name, f"is no option; {nearest(name, self._asked)}")


def shown(value: Any) -> str:
    """A value in a message, not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _VALUE_LENGTH else f"{text[: _VALUE_LENGTH - 3]}..."


def _bounds(least: float, over: float, most: float) -> str:
    parts = []
    if over > -inf:
        parts.append(f"over {over:g}")
    if least > -inf:
        parts.append(f"from {least:g} up")
    if most < inf:
        parts.append(f"up to {most:g}")
    return f" {' and '.join(parts)}" if parts else ""
