"""Reads a pipeline file: YAML with the line of every key, `--set` overrides, and paths made absolute.

What the keys mean is not known here; `engine/pipeline/config.py` checks the tree that comes out.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from manifests.commands import command
from manifests.errors import ConfigError
from manifests.mistakes import KeyPath, dotted, matches
from manifests.store.uris import absolute

# Values that name a file or folder; `*` is any name.
_PATHS: tuple[KeyPath, ...] = (
    ("workspace",),
    ("train",),
    ("corpora", "*", "source"),
    ("corpora", "*", "table"),
    ("tokenizers", "text", "file"),
)
# Values that may name a file or folder, or something elsewhere.
_CHECKPOINTS: tuple[KeyPath, ...] = (
    ("modalities", "*", "parameters", "checkpoint"),
    ("corpora", "*", "modalities", "*", "parameters", "checkpoint"),
)
_MOST_VALUES = 100_000
_MOST_LEVELS = 50
_SEGMENT = re.compile(r'"([^"]+)"|([^."=]+)')


@dataclass(frozen=True, kw_only=True)
class Override:
    """Holds one `--set NAME=VALUE`: the key path, and the value as it was typed."""

    path: KeyPath
    text: str

    def __str__(self) -> str:
        return f"--set {dotted(self.path)}={self.text}"


@dataclass(frozen=True, kw_only=True)
class PipelineDocument:
    """Holds the tree of a pipeline file. `lines` has the 1-based line of each key path."""

    path: Path
    tree: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def where(self, location: KeyPath, overrides: Sequence[Override] = ()) -> str:
        """Returns where a value came from: `--set ...`, or the file with the nearest line that is known."""
        for length in range(len(location), 0, -1):
            begin = location[:length]
            for override in reversed(overrides):
                # What was set, or a section that only exists because something in it was set.
                if override.path == begin or (begin not in self.lines and override.path[:length] == begin):
                    return str(override)
            if begin in self.lines:
                return f"{self.path}:{self.lines[begin]}"
        return str(self.path)


class _YamlLoader(yaml.SafeLoader):
    """Loads as the safe loader, and takes 1e-3 for a number, as YAML 1.2 does. Refuses what is nested too deeply."""

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Returns the next node. Raises ValueError before it goes deeper than any file of a person."""
        self._level += 1
        _check_levels(self._level, self.line)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def yaml_value(text: str) -> Any:
    """Returns the value of YAML text. Raises yaml.YAMLError or ValueError."""
    loader = _YamlLoader(text)
    root = _composed(loader)
    return None if root is None else loader.construct_document(root)


def _composed(loader: _YamlLoader) -> yaml.Node | None:
    """Returns the tree of YAML text. Raises ValueError if it is deeper or larger than any that a person writes."""
    root = loader.get_single_node()
    if root is not None:
        _measure(root, {})
    return root


def _check_levels(levels: int, line: int) -> None:
    if levels > _MOST_LEVELS:
        raise ValueError(f"line {line + 1}: it is nested deeper than {_MOST_LEVELS} levels")


def _measure(node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
    """Returns how many values a node stands for, all that its aliases repeat included, and how many levels."""
    if node in known:
        found = known[node]
        if found is None:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands within what it names")
        return found
    known[node] = None
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    measured = [_measure(child, known) for child in below]
    values = 1 + sum(count for count, _ in measured)
    levels = 1 + max((level for _, level in measured), default=0)
    if values > _MOST_VALUES:
        raise ValueError(
            f"line {node.start_mark.line + 1}: more than {_MOST_VALUES:,} values, with those that aliases repeat"
        )
    _check_levels(levels, node.start_mark.line)
    known[node] = values, levels
    return values, levels


def read(path: Path, *, expected: str = "`workspace` and `corpora`") -> PipelineDocument:
    """Reads the tree in a pipeline file, its relative paths resolved against the file's folder.

    `expected` are keys of such a file, for the message. Raises ConfigError with file and line if it is not a YAML mapping
    or a key stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such pipeline file; `modmill init FOLDER` writes one for a folder") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder, expected a pipeline file; `{command('init', path)}` writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    lines: dict[KeyPath, int] = {}
    problems: list[str] = []
    try:
        loader = _YamlLoader(text)
        root = _composed(loader)
        if root is not None:
            _walk(root, (), lines, problems, set())
        if problems:
            raise ConfigError("\n".join(f"{path}:{problem}" for problem in problems))
        tree = loader.construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: no valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path} is {found}, expected a mapping with {expected}")
    return PipelineDocument(path=path, tree=_resolve(tree, path.absolute().parent), lines=lines)


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[str], seen: set[yaml.Node]) -> None:
    # Each node once: aliases may nest so that walking all paths would take for ever.
    if not isinstance(node, yaml.MappingNode) or node in seen:
        return
    seen.add(node)
    for key, value in node.value:
        below = (*path, str(key.value))
        line = key.start_mark.line + 1
        if below in lines:
            problems.append(f"{line}: {dotted(below)} stands here again, after line {lines[below]}; keep one")
        lines.setdefault(below, line)
        _walk(value, below, lines, problems, seen)


def parse_override(text: str) -> Override:
    """Parses one `--set` argument. Raises ConfigError if it is not NAME=VALUE."""
    path: list[str] = []
    position = 0
    while match := _SEGMENT.match(text, position):
        path.append(match[1] or match[2])
        position = match.end()
        if text[position : position + 1] != ".":
            break
        position += 1
    if not path or text[position : position + 1] != "=":
        raise ConfigError(f"--set {text}: expected NAME=VALUE, such as corpora.photos.crops=4")
    return Override(path=tuple(path), text=text[position + 1 :])


def override_value(override: Override, folder: Path) -> Any:
    """Returns the value of an override: YAML, but for paths, which are taken as typed and resolved against `folder`."""
    if _is_path(override.path):
        value = None if override.text in ("", "null") else override.text
    else:
        try:
            value = yaml_value(override.text)
        except (yaml.YAMLError, ValueError) as error:
            reason = getattr(error, "problem", None) or error
            raise ConfigError(f"{override}: the value is no valid YAML: {reason}") from error
    return _resolve(value, folder, override.path)


def with_override(tree: Mapping[str, Any], override: Override, value: Any) -> dict[str, Any]:
    """Returns the tree with one value set; missing sections are made.

    A list of modalities is the same as a mapping of them, and becomes one if an override goes through it.
    Raises ConfigError if the path goes through a value that has nothing below it.
    """
    changed = dict(tree)
    here = changed
    for depth, name in enumerate(override.path[:-1], start=1):
        below = here.get(name)
        if name == "modalities" and isinstance(below, list) and all(isinstance(item, str) for item in below):
            below = dict.fromkeys(below)
        if below is not None and not isinstance(below, Mapping):
            raise ConfigError(
                f"{override}: {dotted(override.path[:depth])} is {below!r}, which has nothing below it; "
                f"set {dotted(override.path[:depth])} itself"
            )
        # A copy: two sections of the file may be one object, by a YAML alias.
        here[name] = dict(below or {})
        here = here[name]
    here[override.path[-1]] = value
    return changed


def _is_path(path: KeyPath, patterns: Sequence[KeyPath] = _PATHS) -> bool:
    return any(matches(path, pattern) for pattern in patterns)


def _checkpoint(text: str, folder: Path) -> str:
    """Returns a checkpoint's name: a hub id looks like a path, and is one only if something lies there."""
    path = absolute(text, folder)
    return path if text.startswith((".", "~")) or os.path.exists(path) else text


def _resolve(value: Any, folder: Path, path: KeyPath = ()) -> Any:
    if isinstance(value, dict) and len(path) < max(map(len, _PATHS + _CHECKPOINTS)):
        return {name: _resolve(below, folder, (*path, str(name))) for name, below in value.items()}
    if isinstance(value, str) and value and _is_path(path):
        return absolute(value, folder)
    if isinstance(value, str) and value and _is_path(path, _CHECKPOINTS):
        return _checkpoint(value, folder)
    return value
