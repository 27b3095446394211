"""Defines `modmill labelers`, which shows labelers and the parameters of labelers and tokenizers."""

import click

from engine.cli.options import form_option
from manifests.errors import ConfigError


@click.command()
@click.argument("name", required=False)
@click.option("--tokenizers", is_flag=True, help="Show the options of tokenizers instead.")
@form_option("table", "csv", "json")
def labelers(name: str | None, tokenizers: bool, form: str) -> None:
    """Lists the labelers, or the parameters of the labeler NAME: type, default and meaning.

    NAME is one of the list, or my_module:MyLabeler.
    """
    from engine.show import parameters, tables

    if tokenizers and name is not None:
        raise ConfigError(f"--tokenizers shows the options of all tokenizers: leave {name} out")
    if tokenizers:
        tables.write_rows(*parameters.tokenizers(), form)
    elif name is None:
        tables.write_rows(*parameters.labelers(), form)
    else:
        tables.write_rows(parameters.COLUMNS, parameters.of_labeler(name), form)
        click.echo(parameters.about(name), err=form != "table")
