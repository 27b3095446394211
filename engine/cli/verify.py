"""Defines `modmill verify`, which reads a workspace back, or rebuilds what is lost."""

import sys

import click

from engine.cli.options import FOUND_WRONG, form_option, workspace_argument


@click.command()
@workspace_argument
@click.option(
    "--deep", is_flag=True, help="Decode all values too, and replay the log against the index and its checkpoints."
)
@click.option(
    "--recover",
    is_flag=True,
    help="Rebuild what is lost instead: the log from the sidecars, or missing sidecars from the log.",
)
@form_option("table", "csv", "json")
def verify(workspace: str, deep: bool, recover: bool, form: str) -> None:
    """Reads everything back: counts, hashes, keys aligned over modalities, tokens in range; exits 1 if any is wrong.

    Files that no live record names (replaced, orphans of killed runs, temporary) are listed, and are not wrong.
    """
    from engine.upkeep import verify_report

    if recover:
        verify_report.recover(workspace, form)
    elif not verify_report.verify(workspace, form, deep=deep):
        sys.exit(FOUND_WRONG)
