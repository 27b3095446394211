"""Prints what `modmill verify` found: what is wrong, what is left over, and what a recovery brought back."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing

import click

from engine.progress.progress import Progress
from engine.show import tables
from engine.upkeep import verify as verifying
from engine.upkeep.leftovers import Finding
from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.log.lease import writer_lease
from manifests.recover import recover as recovery
from manifests.recover import sidecars_again
from manifests.store import paths
from manifests.store.storage import open_storage

_COLUMNS = ("kind", "path", "problem")
_SHOWN = 20
_EVERY = 10_000


def verify(workspace: str, form: str, *, deep: bool) -> bool:
    """Verifies a workspace, prints what was found, and tells whether nothing is wrong."""
    with Catalog(open_storage(workspace)) as catalog, closing(Progress(quiet=form != "table")) as progress:

        def report(done: int, total: int) -> None:
            if done == 1:
                progress.stage("verify", total, "shards")
            progress.update("verify", done)

        verified = verifying.verify(catalog, report, deep=deep)
    wrong = len(verified.findings)
    if form != "table":
        tables.write_rows(_COLUMNS, _cells([*verified.findings, *verified.left_over]), form)
    else:
        _print(verified)
    click.echo(
        f"{f'WRONG: {wrong} findings' if wrong else 'ok'}: {verified.versions:,} log entries, "
        f"{verified.parts:,} parts, {verified.shards:,} shards, {verified.rows:,} rows, {verified.tokenizers} tokenizers, "
        f"{verified.snapshots} snapshots, {units.size(verified.size_bytes)} read",
        err=form != "table",
    )
    return not wrong


def _print(verified: verifying.Verified) -> None:
    if verified.findings:
        tables.write_rows(_COLUMNS, _cells(verified.findings), "table")
    if verified.left_over:
        kinds = Counter(finding.kind for finding in verified.left_over)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        click.echo(f"not wrong, but left over: {counts}")
        tables.write_rows(_COLUMNS, _cells(verified.left_over[:_SHOWN]), "table")
        if len(verified.left_over) > _SHOWN:
            click.echo(f"and {len(verified.left_over) - _SHOWN:,} more: --format csv lists them all")
    for note in verified.notes:
        click.echo(f"note: {note}")


def _cells(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.kind, finding.path, finding.problem) for finding in findings]


def recover(workspace: str, form: str) -> None:
    """Rebuilds a lost log. If the log is intact, writes the missing sidecars instead. Prints what was done."""
    storage = open_storage(workspace)
    if not recovery.is_lost(storage):
        recovery.restore_format(storage)
        with writer_lease(storage, "recover"), Catalog(storage) as catalog:
            written = sidecars_again.write_missing(catalog)
        click.echo(f"the log stands; {written:,} sidecars were written from it", err=form != "table")
        return
    with closing(Progress(quiet=form != "table")) as progress:
        progress.say(f"no log: it is rebuilt from the sidecars in {storage.uri}/data")
        found = recovery.recover(storage, lambda done: _count(progress, done))
    if found.left_out or form != "table":
        tables.write_rows(("left out", "why"), sorted(found.left_out.items()), form)
    click.echo(
        f"recovered: {found.corpora} corpora, {found.parts:,} parts, {found.shards:,} shards by {found.recipes} recipes, "
        f"{found.tokenizers} tokenizers, {found.snapshots} snapshots, {units.size(found.size_bytes)} read; the runs and "
        f"times of {paths.LOG} do not come back",
        err=form != "table",
    )
    for note in found.notes:
        click.echo(f"note: {note}", err=form != "table")


def _count(progress: Progress, done: int) -> None:
    if done % _EVERY == 0:
        progress.say(f"{done:,} shards read")
