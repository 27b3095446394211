"""Runs the demo from the root of a clone: `python -m examples.demo`."""

from pathlib import Path

import click

from engine.cli.entry import command


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    help="The folder for the workspace and the report.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes.")
def demo(out: Path, workers: int | None) -> None:
    """Labels and tokenizes photographs, scenes and texts that come with a clone, and writes a report with pictures."""
    from examples.demo.demo import run_demo

    report = run_demo(out, workers=workers)
    click.echo(f"report: {report}")


if __name__ == "__main__":
    command(demo)
