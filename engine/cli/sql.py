"""Defines `modmill sql`, which answers a query over the views of a workspace."""

import sys
from pathlib import Path

import click

from engine.cli.options import as_of_option, attach_option, workspace_argument
from manifests.errors import ConfigError

_FORMS = ("table", "csv", "json", "parquet")


@click.command()
@workspace_argument
@click.argument("query", required=False)
@click.option(
    "--format", "form", type=click.Choice(_FORMS), help="How the answer is written.  [default: table, or as --out ends]"
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the answer to this file.")
@as_of_option
@attach_option
@click.option("--locked", is_flag=True, help="For SQL from strangers: the query reaches nothing but the views.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10,
    help="With --locked: the time limit in seconds.",
)
def sql(
    workspace: str,
    query: str | None,
    form: str | None,
    out: Path | None,
    as_of: str | None,
    tables: tuple[str, ...],
    locked: bool,
    timeout_s: float,
) -> None:
    """Answers a query over the manifest.

    QUERY is SQL over the views: corpora parts samples shards recipes lineage coverage complete_parts failures quality runs
    timeline; boxes instances persons captions palettes metadata; and, which may change, missing stale alarms tokenizers
    snapshots snapshot_uses forgotten. docs/manifest.md has their columns, and macros such as diff(version_a, version_b).
    - as QUERY reads it from standard input.
    """
    from engine.show import tables as output
    from manifests.catalog import attached
    from manifests.catalog.catalog import Catalog

    asked = _query(query)
    form = form or ("table" if out is None else _form_of(out))
    output.check_target(form, out)
    with Catalog.open(workspace, as_of=as_of) as catalog:
        for text in tables:
            file, on = attached.parse(text)
            click.echo(catalog.attach(file, on=on), err=True)
        if locked:
            from manifests.locked import locked as locking

            answer = locking.ask(catalog, asked, timeout_s=timeout_s)
            output.write(answer, form, out)
        elif form == "parquet":
            output.write(catalog.sql(asked), form, out)
        else:
            output.write_rows(*catalog.fetch(asked), form, out)


def _query(query: str | None) -> str:
    if query is None:
        raise ConfigError("modmill sql needs a query: QUERY, or - to read it from standard input")
    return sys.stdin.read() if query == "-" else query


def _form_of(out: Path) -> str:
    """Returns the format that a file's name asks for."""
    ending = out.suffix.removeprefix(".").lower()
    if ending in _FORMS:
        return ending
    if ending in ("", "txt"):
        return "table"
    raise ConfigError(f"--out {out}: no format is known by .{ending}; name it with --format {'|'.join(_FORMS)}")
