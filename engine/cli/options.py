"""What verbs share: their exit codes, their common options, and how a value of an option is read."""

import re
from collections.abc import Callable
from typing import Any

import click

from manifests.errors import ConfigError

DONE, FOUND_WRONG, USER_MISTAKE, OVER_BUDGET, INTERRUPTED = 0, 1, 2, 3, 4


Verb = Callable[..., Any]


_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def form_option(*forms: str) -> Callable[[Verb], Verb]:
    """The option `--format`."""
    return click.option(
        "--format", "form", type=click.Choice(forms), default="table", help="How the answer is written."
    )


workspace_argument = click.argument("workspace")


settings_option = click.option(
    "--set", "settings", multiple=True, metavar="A.B=C", help="Override one value of the file."
)


as_of_option = click.option(
    "--as-of",
    metavar="VERSION|TIME",
    help="As it was at a version of the log, or at a time (2026-11-24T09:30:00, UTC).",
)


attach_option = click.option(
    "--attach",
    "tables",
    multiple=True,
    metavar="FILE[:COLUMN,...]",
    help="A table of yours beside the views: `samples` gets its columns, by corpus,key or the columns named.",
)


def bytes_of(text: str) -> int:
    """A size such as 512MB, 2GB or 1.5GiB."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", text.upper())
    try:
        size_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (KeyError, ValueError):
        size_bytes = 0
    if size_bytes < 64e6:
        raise ConfigError(f"--memory {text}: expected a size of at least 64MB, such as 512MB or 2GB")
    return size_bytes


def names_of(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]
