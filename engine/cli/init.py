"""Defines `modmill init`, which writes a pipeline file for a source."""

from pathlib import Path

import click

from manifests.errors import ConfigError


@click.command()
@click.argument("folder", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("pipeline.yaml"), help="The pipeline file to write."
)
@click.option("--schema", type=click.Path(path_type=Path), help="Write the JSON schema for editors to this file.")
def init(folder: str | None, out: Path, schema: Path | None) -> None:
    """Writes a pipeline file for a FOLDER of images or documents."""
    from engine.sources.propose import write_pipeline, write_schema

    if schema is not None:
        write_schema(schema)
        click.echo(f"wrote {schema}")
    if folder is not None:
        click.echo(write_pipeline(folder, out))
    elif schema is None:
        raise ConfigError("modmill init needs a FOLDER of images or documents, or --schema FILE")
