"""Defines `modmill export`, which writes a workspace, or a part of it, for others."""

from typing import Any

import click

from engine.cli.options import names_of, workspace_argument


@click.command()
@workspace_argument
@click.option("--to", "target", required=True, metavar="TARGET", help="A folder or URI: new, or begun by an export.")
@click.option(
    "--layout", type=click.Choice(["4m", "webdataset"]), help="As tars.  [default: a copy, a workspace itself]"
)
@click.option("--corpora", metavar="A,B", help="Only these corpora.  [default: all]")
@click.option("--modalities", metavar="A,B", help="Only these modalities.  [default: all]")
@click.option("--form", type=click.Choice(["label", "token"]), help="Only labels, or only tokens.")
@click.option("--snapshot", metavar="NAME", help="Only what a snapshot holds; in tars, the rows that it trains on.")
@click.option(
    "--held-out", is_flag=True, help="With a layout, the rows that the snapshot holds out; in 4M's as plain files."
)
@click.option("--where", metavar="CONDITION", help="In tars: only rows that match this SQL condition over `samples`.")
@click.option(
    "--nulls",
    type=click.Choice(["drop", "keep"]),
    help="In tars: rows that are null in any of the modalities are dropped, or keep their place.  [default: drop]",
)
@click.option("--rows-per-shard", type=click.IntRange(min=1), help="In tars.  [default: 1000]")
def export(workspace: str, target: str, corpora: str | None, modalities: str | None, **others: Any) -> None:
    """Copies a workspace, whole or in part, to another store, or writes its rows as tars for 4M's or any WebDataset loader.

    The same command continues an export that was interrupted.
    """
    from engine.export import request as exporting

    # The other options are named as the fields are.
    request = exporting.ExportRequest(corpora=names_of(corpora), modalities=names_of(modalities), **others)
    click.echo(exporting.export(workspace, target, request))
