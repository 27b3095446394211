"""Holds what verbs share: their exit codes, their common options, and how a value of an option is read."""

from collections.abc import Callable
from typing import Any

import click

DONE, FOUND_WRONG, USER_MISTAKE, OVER_BUDGET, INTERRUPTED = 0, 1, 2, 3, 4


Verb = Callable[..., Any]


def form_option(*forms: str) -> Callable[[Verb], Verb]:
    """Returns the option `--format`."""
    return click.option(
        "--format", "form", type=click.Choice(forms), default="table", help="How the answer is written."
    )


workspace_argument = click.argument("workspace")


settings_option = click.option(
    "--set", "settings", multiple=True, metavar="A.B=C", help="Override one value of the file. Repeat for more."
)


as_of_option = click.option(
    "--as-of",
    metavar="VERSION|TIME",
    help="Answer as of a version of the log, or a time (2026-11-24T09:30:00, UTC).",
)


attach_option = click.option(
    "--attach",
    "tables",
    multiple=True,
    metavar="FILE[:COLUMN,...]",
    help="Join a table of yours to the view `samples`, by corpus,key or by the columns named.",
)


def names_of(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]
