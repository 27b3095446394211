"""The verb `modmill demo`."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    help="The folder for the workspace and the report.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes.")
def demo(out: Path, workers: int | None) -> None:
    """Label and tokenize photographs, scenes and texts that come with a clone, and write a report with pictures."""
    from engine.cli.demo.demo import run_demo

    report = run_demo(out, workers=workers)
    click.echo(f"report: {report}")
