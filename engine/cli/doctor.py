"""Defines `modmill doctor`, which says what is installed and what is missing, here or on a Ray cluster."""

import sys
from pathlib import Path

import click

from engine.cli.options import FOUND_WRONG


@click.command()
@click.argument("path", required=False)
@click.option("--ray", "address", metavar="ADDRESS", help="Look at every node of a Ray cluster instead.")
def doctor(path: str | None, address: str | None) -> None:
    """Tells what is installed and what is missing: libraries, GPUs, Ray, the disk of PATH, labelers.

    With --ray, PATH is a pipeline file or a workspace, which every node must reach.
    """
    if address is not None:
        from engine.run.runners.ray import doctor as ray_doctor

        nodes = ray_doctor.report(address, path)
        click.echo(ray_doctor.text(nodes))
        if any(node.wrong for node in nodes):
            sys.exit(FOUND_WRONG)
        return
    from engine.upkeep import doctor as doctoring

    checks = doctoring.report(path or Path())
    click.echo(doctoring.text(checks))
    if any(check.ok is False for check in checks):
        sys.exit(FOUND_WRONG)
