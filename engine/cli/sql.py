"""The verbs of `modmill` that ask the manifest or keep it. They load neither torch nor ray, and pyarrow only where needed."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manifests.errors import ConfigError

if TYPE_CHECKING:
    from manifests.catalog import Catalog

FOUND_WRONG = 1

Verb = Callable[..., Any]
_FORMS = ("table", "csv", "json", "parquet")
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def form_option(*forms: str) -> Callable[[Verb], Verb]:
    """The option `--format`."""
    return click.option(
        "--format", "form", type=click.Choice(forms), default="table", help="How the answer is written."
    )


workspace_argument = click.argument("workspace")
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


@click.command()
@workspace_argument
@as_of_option
@click.option("--watch", "watched", is_flag=True, help="Follow the newest run until it ends, or Ctrl-C.")
@form_option("table", "csv", "json")
def status(workspace: str, as_of: str | None, watched: bool, form: str) -> None:
    """Corpus by modality: parts done, failed, missing; before it one line on a run that is at work, or was killed."""
    from engine import output, watch
    from manifests import log
    from manifests.catalog import STATUS, Catalog
    from manifests.storage import open_storage

    if watched:
        if as_of is not None or form != "table":
            raise ConfigError("--watch follows a run as it goes: it takes neither --as-of nor --format")
        watch.watch(open_storage(workspace))
        return
    if form == "table" and as_of is None:
        storage = open_storage(workspace)
        log.workspace_id(storage)
        if line := watch.head(storage):
            click.echo(line, err=True)
    with Catalog.open(workspace, as_of=as_of) as catalog:
        output.write_rows(*catalog.fetch(STATUS), form)


@click.command()
@workspace_argument
@click.argument("query", required=False)
@click.option("--file", type=click.Path(path_type=Path), metavar="FILE.sql", help="Read the query from a file.")
@click.option(
    "--format", "form", type=click.Choice(_FORMS), help="How the answer is written.  [default: table, or as --out ends]"
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the answer to this file.")
@as_of_option
@attach_option
@click.option("--locked", is_flag=True, help="For SQL from strangers: it reaches nothing but the views.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10,
    help="Seconds that --locked gives.",
)
@click.option("--memory", default="2GB", metavar="SIZE", help="Memory that --locked gives.")
def sql(
    workspace: str,
    query: str | None,
    file: Path | None,
    form: str | None,
    out: Path | None,
    as_of: str | None,
    tables: tuple[str, ...],
    locked: bool,
    timeout_s: float,
    memory: str,
) -> None:
    """Ask the manifest.

    QUERY is SQL over the views: corpora parts samples shards recipes coverage missing stale complete_parts failures quality
    alarms runs lineage timeline tokenizers snapshots snapshot_uses forgotten; boxes instances persons captions palettes
    metadata. docs/manifest.md has their columns, and macros such as diff(version_a, version_b). - reads it from standard input.
    """
    from engine import output
    from manifests.catalog import Catalog

    asked = _query(query, file)
    form = form or ("table" if out is None else _form_of(out))
    output.check_target(form, out)
    memory_bytes = _bytes_of(memory)
    with Catalog.open(workspace, as_of=as_of) as catalog:
        for text in tables:
            attach_table(catalog, text)
        if locked:
            from manifests import locked as locking

            answer = locking.ask(catalog, asked, timeout_s=timeout_s, memory_bytes=memory_bytes)
            output.write(answer, form, out)
        elif form == "parquet":
            output.write(catalog.sql(asked), form, out)
        else:
            output.write_rows(*catalog.fetch(asked), form, out)


def attach_table(catalog: "Catalog", text: str) -> None:
    """Attaches what an option `--attach FILE[:COLUMN,...]` names, and says how much of it matches."""
    from manifests import attached

    file, on = attached.parse(text)
    click.echo(catalog.attach(file, on=on), err=True)


def _query(query: str | None, file: Path | None) -> str:
    if (query is None) == (file is None):
        raise ConfigError("modmill sql needs one query: QUERY, - for standard input, or --file FILE.sql")
    if file is not None:
        try:
            return file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {file}: {error}; expected a text file with one query") from error
    return sys.stdin.read() if query == "-" else str(query)


def _form_of(out: Path) -> str:
    """The format that a file's name asks for."""
    ending = out.suffix.removeprefix(".").lower()
    if ending in _FORMS:
        return ending
    if ending in ("", "txt"):
        return "table"
    raise ConfigError(f"--out {out}: no format is known by .{ending}; name it with --format {'|'.join(_FORMS)}")


def _bytes_of(text: str) -> int:
    """A size such as 512MB, 2GB or 1.5GiB."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", text.upper())
    try:
        size_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (KeyError, ValueError):
        size_bytes = 0
    if size_bytes < 64e6:
        raise ConfigError(f"--memory {text}: expected a size of at least 64MB, such as 512MB or 2GB")
    return size_bytes


@click.command()
@workspace_argument
@click.argument("name", required=False)
@click.option("--where", metavar="CONDITION", help="SQL over `samples`: which rows.  [default: all]")
@click.option("--modalities", metavar="A,B,C", help="Which modalities.  [default: all with tokens in Parquet]")
@click.option("--hold-out", type=float, default=0.02, help="Share of the keys never trained on.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="SPLIT=SHARE",
    help="Make NAME-SPLIT of a share of the keys; again for the next, as --split train=0.9 --split val=0.1.",
)
@attach_option
@form_option("table", "csv", "json")
def snapshot(
    workspace: str,
    name: str | None,
    where: str | None,
    modalities: str | None,
    hold_out: float,
    splits: tuple[str, ...],
    tables: tuple[str, ...],
    form: str,
) -> None:
    """Freeze a selection of rows and tokens for training as NAME, or list what is frozen."""
    from engine import output
    from engine import snapshot as freezing

    if name is None:
        if where is not None or modalities is not None or splits or tables:
            raise ConfigError(
                "--where, --modalities, --split and --attach make a snapshot: give its NAME after the workspace"
            )
        output.write_rows(*freezing.listing(workspace), form)
        return
    asked = None if modalities is None else modalities.split(",")
    made = freezing.make(
        workspace,
        name,
        where=where,
        modalities=asked,
        hold_out=hold_out,
        shares=freezing.parse_shares(splits) if splits else None,
        attach=tables,
        quiet=form != "table",
    )
    output.write(freezing.contents(made), form)
    for one in made:
        click.echo(freezing.summary(one), err=form != "table")


@click.command()
@workspace_argument
@click.option(
    "--deep", is_flag=True, help="Decode all values too, and replay the log against the index and its checkpoints."
)
@click.option("--recover", is_flag=True, help="Instead make what is lost: the log from the sidecars, or those from it.")
@form_option("table", "csv", "json")
def verify(workspace: str, deep: bool, recover: bool, form: str) -> None:
    """Read everything back: counts, hashes, keys aligned over modalities, tokens in range; exits 1 if any is wrong.

    Files that no live record names (replaced, orphans of killed runs, temporary) are listed, and are not wrong.
    """
    from engine import verify_report

    if recover:
        verify_report.recover(workspace, form)
    elif not verify_report.verify(workspace, form, deep=deep):
        sys.exit(FOUND_WRONG)


@click.command()
@workspace_argument
@click.option("--to", "target", required=True, metavar="TARGET", help="A folder or URI: new, or begun by an export.")
@click.option(
    "--layout", type=click.Choice(["4m", "webdataset"]), help="As tars.  [default: a copy, a workspace itself]"
)
@click.option("--corpora", metavar="A,B", help="Which corpora.  [default: all]")
@click.option("--modalities", metavar="A,B", help="Which modalities.  [default: all]")
@click.option("--form", "kind", type=click.Choice(["label", "token"]), help="Only labels, or only tokens.")
@click.option("--snapshot", metavar="NAME", help="Only what a snapshot holds; in tars, the rows that it trains on.")
@click.option("--held-out", is_flag=True, help="In tars, the rows that the snapshot holds out.")
@click.option("--where", metavar="CONDITION", help="In tars: SQL over `samples`, which rows.")
@click.option(
    "--nulls",
    type=click.Choice(["drop", "keep"]),
    help="In tars: rows that are null in any of the modalities are dropped, or keep their place.  [default: drop]",
)
@click.option("--rows-per-shard", type=click.IntRange(min=1), help="In tars.  [default: 1000]")
def export(
    workspace: str,
    target: str,
    layout: Any,
    corpora: str | None,
    modalities: str | None,
    kind: Any,
    snapshot: str | None,
    held_out: bool,
    where: str | None,
    nulls: Any,
    rows_per_shard: int | None,
) -> None:
    """Copy a workspace, whole or in part, to another store, or write its rows as tars for 4M's or any WebDataset loader.

    The same command goes on where it was interrupted.
    """
    from engine import export as exporting

    request = exporting.Request(
        layout=layout,
        corpora=_names(corpora),
        modalities=_names(modalities),
        form=kind,
        snapshot=snapshot,
        held_out=held_out,
        where=where,
        nulls=nulls,
        rows_per_shard=rows_per_shard,
    )
    click.echo(exporting.export(workspace, target, request))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


VERBS = (status, sql, snapshot, verify, export)
