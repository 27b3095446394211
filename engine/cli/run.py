"""Defines `modmill run`, which does whatever a pipeline file asks for, and tells beforehand what that is."""

from collections.abc import Sequence
from pathlib import Path

import click

from engine.cli.options import settings_option
from manifests.commands import command
from manifests.errors import ConfigError, TooManyFailures, nearest

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("file", type=_PATH)
@settings_option
@click.option("--only", metavar="STEP", help="Do one step: ingest, fit, label, tokenize, snapshot or train.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would be done, why, and at what cost, by a probe; change nothing."
)
@click.option("--where", metavar="SQL", help="Label only rows that match this SQL condition over `samples`.")
@click.option("--refit", is_flag=True, help="Fit the tokenizers again; new shards stand beside the old.")
@click.option("--failed", is_flag=True, help="Make failed rows again.")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="With --failed: only failures of this class.")
@click.option("--runner", type=click.Choice(["ray", "local"]), help="On Ray, or in this process.")
@click.option("--ray", "address", metavar="ADDRESS", help="On the Ray cluster at this address.")
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes.")
def run(
    file: Path,
    settings: tuple[str, ...],
    only: str | None,
    dry_run: bool,
    where: str | None,
    refit: bool,
    failed: bool,
    classes: tuple[str, ...],
    runner: str | None,
    address: str | None,
    workers: int | None,
) -> None:
    """Does whatever a pipeline FILE asks for and is missing: ingest, fit tokenizers, label, tokenize, freeze, train."""
    from engine.pipeline import config as pipeline
    from engine.run import job

    step: job.Step | None = next((known for known in job.STEPS if known == only), None)
    if only is not None and step is None:
        raise ConfigError(f"--only {only}: no such step; {nearest(only, job.STEPS)}")
    if classes and not failed:
        raise ConfigError(f"--class {classes[0]} says which failed rows are made again; add --failed")
    if address is not None and runner == "local":
        raise ConfigError(f"--ray {address} names a cluster, --runner local runs in this process; leave one out")
    given = {
        "runner": "ray" if address is not None else runner,
        "workers": workers,
        "ray_address": None if address is None else f"'{address}'",
    }
    overrides = [f"engine.{name}={value}" for name, value in given.items() if value is not None]
    config = pipeline.load(file, [*settings, *overrides])
    steps: Sequence[job.Step] = job.STEPS if step is None else (step,)
    retry = frozenset(classes) if failed else None
    if dry_run:
        from engine.run import dry_run as dry

        for line in dry.dry_run(config, steps=steps, refit=refit, retry=retry, where=where):
            click.echo(line)
        return
    done = job.run(config, steps=steps, refit=refit, retry=retry, where=where)
    if done.did_nothing:
        rest = "what is left failed" if done.failed_corpora else "everything in the pipeline file is done"
        click.echo(f"nothing to do: {rest}")
    else:
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in done.counts.items() if count)
        click.echo(f"done: {counts}")
    if done.counts.get("failed_rows"):
        query = "SELECT stage, class, count(DISTINCT key) AS photos FROM failures GROUP BY ALL"
        click.echo(f"what failed: {command('sql', config.workspace, query)}")
    if left := done.counts.get("failed_items"):
        click.echo(f"left to do: {left:,} work items failed as a whole; the same command tries them again")
    click.echo(f"look at it:  {command('status', config.workspace)}")
    if done.failed_corpora:
        raise TooManyFailures(
            f"nothing could be made of {', '.join(done.failed_corpora)}: every row failed; mend the source, and run with "
            "--failed to read and make them again"
        )
