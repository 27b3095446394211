"""Defines `modmill status`, which says how far each corpus is."""

import click

from engine.cli.options import as_of_option, form_option, workspace_argument
from manifests.errors import ConfigError


@click.command()
@workspace_argument
@as_of_option
@click.option("--watch", "watched", is_flag=True, help="Follow the newest run until it ends, or Ctrl-C.")
@form_option("table", "csv", "json")
def status(workspace: str, as_of: str | None, watched: bool, form: str) -> None:
    """Shows corpus by modality how many parts are done, failed or missing, after a line on a run at work or killed."""
    from engine.progress import watch
    from engine.show import tables
    from manifests.catalog.catalog import STATUS, Catalog
    from manifests.log import entries as log
    from manifests.store.storage import open_storage

    if watched:
        if as_of is not None or form != "table":
            raise ConfigError("--watch follows a run as it goes: it takes neither --as-of nor --format")
        watch.watch(open_storage(workspace))
        return
    if form == "table" and as_of is None:
        storage = open_storage(workspace)
        log.workspace_id(storage)
        if line := watch.head(storage):
            click.echo(line, err=True)
    with Catalog.open(workspace, as_of=as_of) as catalog:
        tables.write_rows(*catalog.fetch(STATUS), form)
