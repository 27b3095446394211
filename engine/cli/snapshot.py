"""Defines `modmill snapshot`, which freezes selections of a workspace, and lists those that are frozen."""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import click

from engine.cli.options import attach_option, form_option, names_of, workspace_argument
from manifests.errors import ConfigError


def parse_shares(given: Sequence[str]) -> dict[str, Decimal]:
    """Returns the shares of `--split` options, such as train=0.9, in their order. Raises ConfigError."""
    shares: dict[str, Decimal] = {}
    for text in given:
        split, _, share = text.partition("=")
        try:
            value = Decimal(share)
        except InvalidOperation:
            raise ConfigError(f"--split {text}: expected NAME=SHARE, such as train=0.9") from None
        if split in shares:
            raise ConfigError(f"--split {text}: {split} stands twice; give each split a name of its own")
        shares[split] = value
    return shares


@click.command()
@workspace_argument
@click.argument("name", required=False)
@click.option(
    "--where", metavar="CONDITION", help="Only rows that match this SQL condition over `samples`.  [default: all]"
)
@click.option("--modalities", metavar="A,B,C", help="Only these modalities.  [default: all with tokens in Parquet]")
@click.option("--complete", is_flag=True, help="Only rows that have tokens of every modality.  [default: of any]")
@click.option("--hold-out", type=float, default=0.02, help="Share of the keys never trained on.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="SPLIT=SHARE",
    help="Make NAME-SPLIT of a share of the keys. Repeat for more: --split train=0.9 --split val=0.1.",
)
@click.option(
    "--split-by",
    metavar="COLUMN",
    help="Keep rows with one value of this column of `samples` (patient, video) in one split, and hold them out together.",
)
@attach_option
@form_option("table", "csv", "json")
def snapshot(
    workspace: str,
    name: str | None,
    where: str | None,
    modalities: str | None,
    complete: bool,
    hold_out: float,
    splits: tuple[str, ...],
    split_by: str | None,
    tables: tuple[str, ...],
    form: str,
) -> None:
    """Freezes a selection of rows and tokens for training as NAME, or lists what is frozen."""
    from engine.run import freeze
    from engine.show import snapshot_tables
    from engine.show import tables as output

    if name is None:
        if any((where is not None, modalities is not None, complete, splits, split_by is not None, tables)):
            raise ConfigError(
                "--where, --modalities, --complete, --split, --split-by and --attach make a snapshot: give its NAME after "
                "the workspace"
            )
        output.write_rows(*snapshot_tables.listing(workspace), form)
        return
    made = freeze.make(
        workspace,
        name,
        where=where,
        modalities=names_of(modalities),
        hold_out=hold_out,
        complete=complete,
        split_by=split_by,
        shares=parse_shares(splits) if splits else None,
        attach=tables,
        quiet=form != "table",
    )
    output.write_rows(*snapshot_tables.contents(workspace, made), form)
    for one in made:
        click.echo(freeze.summary(one), err=form != "table")
