"""The verb `modmill generate`: makes modalities from others with a trained model."""

from pathlib import Path

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
    "metadata='brightness=120', depth=depth.npy. Several times for several.",
)
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.  [default: generated-1, -2, ...]")
@click.option("--samples", type=click.IntRange(min=1), default=1, help="Variations.")
@click.option("--seed", type=int, default=0, help="Another seed draws others.")
@click.option("--temperature", type=float, help="0 takes the likeliest.")
@click.option("--top-k", type=int, help="Only the k likeliest tokens.")
@click.option("--top-p", type=float, help="Only the likeliest that hold this share.")
@click.option("--guidance", type=float, help="Weight of what is given; 1 is plain.")
@click.option("--steps", type=int, help="In how many steps a picture is decoded.")
@click.option("--order", type=click.Choice(["confidence", "random"]), help="Which cells first.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="MODALITY.OPTION=VALUE",
    help="One option of one modality, as rgb.steps=8.",
)
def generate(
    checkpoint: str,
    wanted: str,
    given: tuple[str, ...],
    out: Path | None,
    samples: int,
    seed: int,
    settings: tuple[str, ...],
    **decoding: float | str | None,
) -> None:
    """Make modalities from others with a trained model, and a contact sheet of it."""
    from engine.inference import generate as generating

    folder = generating.run(
        checkpoint,
        list(given),
        [name.strip() for name in wanted.split(",")],
        out,
        samples=samples,
        seed=seed,
        every={name: value for name, value in decoding.items() if value is not None},
        settings=list(settings),
        say=lambda text: click.echo(text, err=True),
    )
    click.echo(f"look at it:  {folder / 'contact-sheet.png'}")
