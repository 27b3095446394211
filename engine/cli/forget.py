"""Defines `modmill forget`, which takes out samples, superseded recipes, and files that nothing needs."""

from pathlib import Path

import click

from engine.cli.options import form_option, workspace_argument
from manifests import units
from manifests.commands import command
from manifests.errors import ConfigError


@click.command()
@workspace_argument
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="List what the samples in FILE are; with --yes take them out, for good.",
)
@click.option("--ignore-unknown", is_flag=True, help="With --keys: pass over lines that name no sample.")
@click.option("--recipe", metavar="DIGITS", help="Retire the shards of a recipe that is not current.")
@click.option("--modality", metavar="NAME", help="Retire the shards of all recipes of it that are not current.")
@click.option("--corpus", metavar="NAME", help="With --recipe and --modality: only of this corpus.")
@click.option("--collect", "collects", is_flag=True, help="List the files that nothing needs; delete them with --yes.")
@click.option("--retention", "retention_days", type=float, metavar="DAYS", help="With --collect.  [default: 7]")
@click.option("--yes", is_flag=True, help="With --keys and --collect: do it. It cannot be undone.")
@form_option("table", "csv", "json")
def forget(
    workspace: str,
    keys: Path | None,
    ignore_unknown: bool,
    recipe: str | None,
    modality: str | None,
    corpus: str | None,
    collects: bool,
    retention_days: float | None,
    yes: bool,
    form: str,
) -> None:
    """Takes samples out for good, retires superseded recipes, or deletes the files that nothing needs.

    FILE has a sample a line: corpus/key, the sha256 of its source bytes, or its source or url. All samples of the same bytes
    go, and are never ingested again. Without --yes nothing changes: the command lists what would go. The bytes are on the
    disk until --collect --yes, which deletes them whatever the retention, and else only what no version within it names.
    """
    retires = recipe is not None or modality is not None
    if (keys is not None) + retires + collects != 1:
        raise ConfigError("modmill forget does one thing at a time: --keys FILE, --recipe or --modality, or --collect")
    for option, is_given, belongs in (
        ("--ignore-unknown", ignore_unknown, keys is not None),
        ("--corpus", corpus is not None, retires),
        ("--retention", retention_days is not None, collects),
        ("--yes", yes, keys is not None or collects),
    ):
        if is_given and not belongs:
            raise ConfigError(f"{option} says nothing here; see modmill forget --help")
    if keys is not None:
        _forget_keys(workspace, keys, ignore_unknown, yes, form)
    elif collects:
        _collect(workspace, retention_days, yes, form)
    else:
        _retire(workspace, recipe, modality, corpus, form)


def _forget_keys(workspace: str, keys: Path, ignore_unknown: bool, yes: bool, form: str) -> None:
    from engine.show import tables
    from engine.upkeep import forget as forgetting

    lines = forgetting.read_lines(keys)
    found = []
    said = "nothing to forget: no line names a sample"
    if not yes:
        asked, found = forgetting.preview(workspace, lines, ignore_unknown=ignore_unknown)
        if asked.rows or asked.dropped:
            said = (
                f"nothing is forgotten yet; --yes takes out these {len(asked.rows):,} samples and {len(asked.dropped):,} "
                "rows of the view `dropped`, which cannot be undone"
            )
        elif asked.earlier:
            said = f"nothing to forget: all {len(asked.earlier):,} samples were forgotten before"
    elif receipt := forgetting.forget(workspace, lines, ignore_unknown=ignore_unknown, quiet=form != "table"):
        found, said = receipt.lines, f"receipt: {workspace}/{receipt.path}"
    tables.write_rows(("what", "item", "detail"), found, form)
    click.echo(said, err=form != "table")


def _retire(workspace: str, recipe: str | None, modality: str | None, corpus: str | None, form: str) -> None:
    from engine.show import tables
    from engine.upkeep import forget as forgetting

    retired = forgetting.retire(workspace, recipe=recipe, modality=modality, corpus=corpus, quiet=form != "table")
    columns = ("corpus", "modality", "form", "fingerprint", "shards", "size_bytes")
    tables.write_records(columns, [vars(each) for each in retired], form)
    click.echo(
        f"retired: their files stay until `{command('forget', workspace, '--collect', '--yes')}`, and those that snapshots "
        "name stay",
        err=form != "table",
    )


def _collect(workspace: str, retention_days: float | None, yes: bool, form: str) -> None:
    from engine.show import tables
    from engine.upkeep import collect as collecting
    from manifests.catalog.catalog import Catalog

    days = collecting.RETENTION_DAYS if retention_days is None else retention_days
    if yes:
        deletions = collecting.collect(workspace, retention_days=days, quiet=form != "table")
    else:
        with Catalog.open(workspace) as catalog:
            deletions = collecting.plan(catalog, retention_days=days)
    tables.write_records(("path", "size_bytes", "why"), [vars(each) for each in deletions], form)
    size = f"{len(deletions):,} files, {units.size(sum(each.size_bytes for each in deletions))}"
    told = f"deleted {size}" if yes else f"nothing is deleted yet; --yes deletes these {size}"
    click.echo(told, err=form != "table")
