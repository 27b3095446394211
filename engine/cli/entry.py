"""The command `modmill`. Each verb imports what it needs when it runs: `modmill sql` loads neither torch nor ray.

Click, not typer: typer validates arguments with pydantic, whose import takes longer than the answer of `modmill sql`.
"""

import atexit
import contextlib
import errno
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from engine.cli import forget as cli_forget
from engine.cli import run as cli_run
from engine.cli import sql as cli_manifest
from engine.cli.run import settings_option
from manifests.errors import ConfigError, ModmillError, QueryError, TooManyFailures, UserError

_PATHS_AND_STORES = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(ConnectionError, TimeoutError, socket.gaierror),
)

DONE, FOUND_WRONG, USER_MISTAKE, OVER_BUDGET, INTERRUPTED = 0, cli_manifest.FOUND_WRONG, 2, 3, 4

# Threads of torch that wait by spinning make a step ten times slower where another process has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_PATH = click.Path(path_type=Path)


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # In the order of the work, as they are made below, not of the alphabet.


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"modmill {version('modmill')}")
        ctx.exit()


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--version", is_flag=True, callback=_show_version, is_eager=True, expose_value=False, help="Print the version."
)
@click.option("--debug", is_flag=True, help="Show the whole trace of an error.")
def app(debug: bool) -> None:
    """Turns image corpora into aligned, tokenized training sets of many modalities."""
    if debug:
        os.environ["MODMILL_DEBUG"] = "1"


@app.command()
@click.option("--out", type=_PATH, default=Path("demo-out"), help="The folder for the workspace and the report.")
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes.")
def demo(out: Path, workers: int | None) -> None:
    """Label and tokenize photographs, scenes and texts that come with a clone, and write a report with pictures."""
    from engine.demo import run_demo

    report = run_demo(out, workers=workers)
    click.echo(f"report: {report}")


@app.command()
@click.argument("folder", required=False)
@click.option("--out", type=_PATH, default=Path("pipeline.yaml"), help="The pipeline file to write.")
@click.option("--schema", type=_PATH, help="Write the JSON schema for editors to this file.")
def init(folder: str | None, out: Path, schema: Path | None) -> None:
    """Write a pipeline file for a FOLDER of images or documents."""
    from engine.init import write_pipeline, write_schema

    if schema is not None:
        write_schema(schema)
        click.echo(f"wrote {schema}")
    if folder is not None:
        click.echo(write_pipeline(folder, out))
    elif schema is None:
        raise ConfigError("modmill init needs a FOLDER of images or documents, or --schema FILE")


@app.command()
@click.argument("path", required=False)
@click.option("--ray", "address", metavar="ADDRESS", help="Look at every node of a Ray cluster instead.")
def doctor(path: str | None, address: str | None) -> None:
    """Say what is installed and what is missing: libraries, GPUs, Ray, the disk of PATH, labelers.

    With --ray, PATH is a pipeline file or a workspace, which every node must reach.
    """
    if address is not None:
        from engine import ray_doctor

        nodes = ray_doctor.report(address, path)
        click.echo(ray_doctor.text(nodes))
        if any(node.wrong for node in nodes):
            sys.exit(FOUND_WRONG)
        return
    from engine import doctor as doctoring

    checks = doctoring.report(path or Path())
    click.echo(doctoring.text(checks))
    if any(check.ok is False for check in checks):
        sys.exit(FOUND_WRONG)


for verb in (cli_run.run, *cli_manifest.VERBS, cli_forget.forget):
    app.add_command(verb)


@app.command()
@click.argument("file", type=_PATH)
@settings_option
@click.option("--resume", metavar="auto|PATH", help="Go on in the newest run of this file, or in a run's folder.")
def train(file: Path, settings: tuple[str, ...], resume: str | None) -> None:
    """Train an any-to-any model on snapshots, as a trainer FILE says."""
    from engine import train_run

    outcome = train_run.run(train_run.load(file, list(settings)), resume=resume)
    if outcome.status == "interrupted":
        again = f"modmill train {file} --resume {outcome.folder}"
        click.echo(f"interrupted at step {outcome.step:,}, which is saved; go on with: {again}", err=True)
        sys.exit(INTERRUPTED)
    click.echo(f"done: {outcome.steps_done:,} steps, in {outcome.folder}")


@app.command()
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
@click.option("--out", type=_PATH, help="A new folder.  [default: generated-1, -2, ...]")
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
    from engine import generate as generating

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


def main(arguments: list[str] | None = None) -> None:
    """The entry of the command: runs a verb and turns errors into exit codes."""
    import modmill

    # A preempted or stopped job ends as one that a person interrupts: what is done is committed.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        modmill.check_packages()
        with app.make_context("modmill", sys.argv[1:] if arguments is None else list(arguments)) as context:
            app.invoke(context)
        sys.exit(DONE)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted: what is done is committed; the same command goes on from there", err=True)
        sys.exit(INTERRUPTED)
    except TooManyFailures as error:
        _end(error, OVER_BUDGET)
    except UserError as error:
        _end(error, USER_MISTAKE)
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "label,train"
        _end(ConfigError(f"{error}; pip install 'modmill[{extra}]'"), USER_MISTAKE)
    except ImportError as error:
        _end(error, USER_MISTAKE)
    except ModmillError as error:
        _end(error, FOUND_WRONG)
    except BrokenPipeError:
        # The reader of our output went away (`modmill sql ... | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _end_os_error(error)


def command() -> None:
    """The console script: `main`, and then out of the process at once.

    Where torch or ray is loaded beside it, DuckDB's binding prints pages on its own objects as the interpreter ends.
    """
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = FOUND_WRONG
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _end_os_error(error: OSError) -> None:
    """Ends for what a person can mend: a full disk, a path that is wrong, a store that does not answer."""
    if error.errno == errno.ENOSPC:
        place = error.filename or "the workspace"
        _end(UserError(f"the disk of {place} is full; free some of it, and the same command goes on"), USER_MISTAKE)
    if isinstance(error, _PATHS_AND_STORES):
        _end(error, USER_MISTAKE)
    raise error


def _end(error: Exception, code: int) -> Any:
    if os.environ.get("MODMILL_DEBUG"):
        raise error
    click.echo(f"modmill: {_one_line(str(error)) if isinstance(error, QueryError) else error}", err=True)
    sys.exit(code)


def _one_line(message: str) -> str:
    """DuckDB's message without its drawing of the query, but with the line that it points at."""
    said, _, drawing = message.partition("\n\nLINE ")
    number = drawing.partition(":")[0]
    return " ".join(said.split()) + (f" (in line {number})" if number not in ("", "1") else "")
