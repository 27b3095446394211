"""Defines `modmill generate`, which makes modalities from others with a trained model."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--checkpoint", required=True, metavar="PATH", help="A checkpoint, or a run's folder.")
@click.option("--to", "wanted", required=True, metavar="A,B,C", help="Modalities to make, in this order.")
@click.option(
    "--from",
    "given",
    multiple=True,
    metavar="MODALITY=VALUE",
    help="What is given: rgb=photo.jpg, caption='a red cube', palette='#ff0000,#00cc88', boxes=boxes.json, "
    "metadata='brightness=120', depth=depth.npy. Repeat for more.",
)
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.  [default: generated-1, -2, ...]")
@click.option("--samples", type=click.IntRange(min=1), default=1, help="Variations.")
@click.option("--seed", type=int, default=0, help="Another seed draws other results.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="[MODALITY.]OPTION=VALUE",
    help="How tokens are drawn: steps, schedule, order, temperature, temperature_schedule, top_k, top_p, guidance, tokens; "
    "of one modality (rgb.steps=8) or of all (temperature=0).",
)
def generate(wanted: str, **others: Any) -> None:
    """Makes modalities from others with a trained model, and draws a contact sheet of them."""
    from engine.inference import generate as generating

    # The other options are named as the fields are.
    request = generating.GenerateRequest(wanted=[name.strip() for name in wanted.split(",")], **others)
    folder = generating.run(request, say=lambda text: click.echo(text, err=True))
    click.echo(f"look at it:  {folder / 'contact-sheet.png'}")
