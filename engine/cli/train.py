"""Defines `modmill train`, which trains a model on snapshots."""

import sys
from pathlib import Path

import click

from engine.cli.options import INTERRUPTED, settings_option
from manifests.commands import command


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@settings_option
@click.option(
    "--resume", metavar="auto|PATH", help="Resume the newest run of this file (auto), or the run in a folder."
)
def train(file: Path, settings: tuple[str, ...], resume: str | None) -> None:
    """Trains an any-to-any model on snapshots, as a trainer FILE says."""
    from engine.run import train as train_run

    outcome = train_run.run(train_run.load(file, list(settings)), resume=resume)
    if outcome.status == "interrupted":
        again = command("train", file, "--resume", outcome.folder)
        click.echo(f"interrupted at step {outcome.step:,}, which is saved; go on with: {again}", err=True)
        sys.exit(INTERRUPTED)
    click.echo(f"done: {outcome.steps_done:,} steps, in {outcome.folder}")
