"""The command `modmill`. Each verb imports what it needs when it runs: `modmill sql` loads neither torch nor ray."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from manifests.errors import ConfigError, ModmillError, TooManyFailures, UserError, nearest

# What typer makes of Ctrl-C.
_TYPER_INTERRUPTED = 130

DONE, FOUND_WRONG, USER_MISTAKE, OVER_BUDGET, INTERRUPTED = 0, 1, 2, 3, 4

# Threads of torch that wait by spinning make a step ten times slower where another process has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(
    name="modmill",
    help="Turns image corpora into aligned, tokenized training sets of many modalities.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

WorkspaceArgument = Annotated[str, typer.Argument(metavar="WORKSPACE", help="A workspace: a folder or an fsspec URI.")]
FormatOption = Annotated[Literal["table", "csv", "json"], typer.Option("--format", help="How the answer is written.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"modmill {version('modmill')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")] = False,
) -> None:
    if debug:
        os.environ["MODMILL_DEBUG"] = "1"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for the workspace and the report.")] = Path("demo-out"),
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes.")] = None,
) -> None:
    """Label and tokenize photographs, scenes and texts that come with a clone, and write a report with pictures."""
    from engine.demo import run_demo

    report = run_demo(out, workers=workers)
    typer.echo(f"report: {report}")


@app.command()
def init(
    folder: Annotated[str | None, typer.Argument(metavar="FOLDER", help="A folder of images or documents.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The pipeline file to write.")] = Path("pipeline.yaml"),
    schema: Annotated[
        Path | None, typer.Option("--schema", help="Write the JSON schema for editors to this file.")
    ] = None,
) -> None:
    """Write a pipeline file for a folder."""
    from engine.init import write_pipeline, write_schema

    if schema is not None:
        write_schema(schema)
        typer.echo(f"wrote {schema}")
    if folder is not None:
        typer.echo(write_pipeline(folder, out))
    elif schema is None:
        raise ConfigError("modmill init needs a FOLDER of images or documents, or --schema FILE")


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder whose disk is looked at.")] = Path(),
) -> None:
    """Say what is installed and what is missing: libraries, GPUs, Ray, disk, labelers."""
    from engine import doctor as doctoring

    checks = doctoring.report(path)
    typer.echo(doctoring.text(checks))
    if any(check.ok is False for check in checks):
        raise typer.Exit(FOUND_WRONG)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pipeline file.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the file.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="STEP", help="Do one step: ingest, fit, label, tokenize, snapshot or train."),
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit the tokenizers anew; new shards beside the old.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Do the parts with failed rows again.")] = False,
    runner: Annotated[
        Literal["ray", "local"] | None, typer.Option("--runner", help="On Ray, or in this process.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes.")] = None,
) -> None:
    """Ingest, fit tokenizers, label, tokenize, freeze snapshots, train: whatever the file asks for and is missing."""
    from engine import config as pipeline
    from engine import run as running

    if only is not None and only not in running.STEPS:
        raise ConfigError(f"--only {only}: no such step; {nearest(only, running.STEPS)}")
    overrides = list(settings or [])
    overrides += [f"engine.runner={runner}"] * (runner is not None) + [f"engine.workers={workers}"] * (
        workers is not None
    )
    config = pipeline.load(file, overrides)
    done = running.run(
        config,
        steps=running.STEPS if only is None else (only,),
        refit=refit,
        retry_failed=failed,  # type: ignore[arg-type]
    )
    if done.did_nothing:
        typer.echo("nothing to do: everything in the pipeline file is done")
    else:
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in done.counts.items() if count)
        typer.echo(f"done: {counts}")
    if done.counts.get("failed_rows"):
        query = "SELECT stage, class, count(DISTINCT key) AS photos FROM failures GROUP BY ALL"
        typer.echo(f'what failed: modmill sql {config.workspace} "{query}"')
    typer.echo(f"look at it:  modmill status {config.workspace}")


@app.command()
def status(workspace: WorkspaceArgument, form: FormatOption = "table") -> None:
    """Corpus by modality: parts done, failed, missing."""
    from engine import output
    from manifests.catalog import Catalog

    with Catalog.open(workspace) as catalog:
        output.write(catalog.status(), form)


@app.command()
def sql(
    workspace: WorkspaceArgument,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="SQL over the views; - reads standard input.")],
    form: Annotated[
        Literal["table", "csv", "json", "parquet"], typer.Option("--format", help="How the answer is written.")
    ] = "table",
) -> None:
    """Ask the manifest: corpora parts samples shards recipes coverage failures runs captions palettes metadata boxes."""
    from engine import output
    from manifests.catalog import Catalog

    with Catalog.open(workspace) as catalog:
        output.write(catalog.sql(sys.stdin.read() if query == "-" else query), form)


@app.command()
def snapshot(
    workspace: WorkspaceArgument,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The snapshot to make; without it, list them.")
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", metavar="CONDITION", help="SQL over `samples`: which rows.  [default: all]")
    ] = None,
    modalities: Annotated[
        str | None,
        typer.Option("--modalities", metavar="A,B,C", help="Which modalities.  [default: all with tokens in Parquet]"),
    ] = None,
    hold_out: Annotated[float, typer.Option("--hold-out", help="Share of the keys never trained on.")] = 0.02,
    form: FormatOption = "table",
) -> None:
    """Freeze a selection of rows and tokens for training, or list what is frozen."""
    from engine import output
    from engine import snapshot as freezing

    if name is None:
        if where is not None or modalities is not None:
            raise ConfigError("--where and --modalities make a snapshot: give its NAME after the workspace")
        output.write(freezing.listing(workspace), form)
        return
    asked = None if modalities is None else modalities.split(",")
    made = freezing.make(workspace, name, where=where, modalities=asked, hold_out=hold_out, quiet=form != "table")
    output.write(freezing.contents(made), form)
    typer.echo(freezing.summary(made), err=form != "table")


@app.command()
def verify(workspace: WorkspaceArgument, form: FormatOption = "table") -> None:
    """Read everything back: counts, hashes, keys aligned over modalities, tokens in range; exits 1 if any is wrong."""
    from engine import output
    from engine import verify as verifying
    from engine.progress import Progress
    from manifests.catalog import Catalog

    with Catalog.open(workspace) as catalog:
        progress = Progress(None, quiet=form != "table")

        def report(done: int, total: int) -> None:
            if done == 1:
                progress.stage("verify", total, "shards")
            progress.update("verify", done)

        try:
            verified = verifying.verify(catalog, report)
        finally:
            progress.close()
    if verified.findings or form != "table":
        output.write(output.rows_table(verifying.as_rows(verified), ["path", "problem"]), form)
    wrong = len(verified.findings)
    typer.echo(
        f"{f'WRONG: {wrong} findings' if wrong else 'ok'}: {verified.versions:,} log entries, {verified.parts:,} parts, "
        f"{verified.shards:,} shards, {verified.rows:,} rows, {verified.tokenizers} tokenizers, "
        f"{verified.snapshots} snapshots, {verified.size_bytes / 1e6:,.1f} MB read",
        err=form != "table",
    )
    if wrong:
        raise typer.Exit(FOUND_WRONG)


@app.command()
def train(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trainer file.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the file.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", metavar="auto|PATH", help="Go on in the newest run of this file, or in a run's folder."
        ),
    ] = None,
) -> None:
    """Train an any-to-any model on snapshots, as a trainer file says."""
    from engine import train_run

    outcome = train_run.run(train_run.load(file, settings or []), resume=resume)
    if outcome.status == "interrupted":
        again = f"modmill train {file} --resume {outcome.folder}"
        typer.echo(f"interrupted at step {outcome.step:,}, which is saved; go on with: {again}", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"done: {outcome.steps_done:,} steps, in {outcome.folder}")


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Option("--checkpoint", metavar="PATH", help="A checkpoint, or a run's folder.")],
    wanted: Annotated[str, typer.Option("--to", metavar="A,B,C", help="Modalities to make, in this order.")],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="MODALITY=VALUE",
            help="What is given: rgb=photo.jpg, caption='a red cube', palette='#ff0000,#00cc88', boxes=boxes.json, "
            "metadata='brightness=120', depth=depth.npy. Several times for several.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A new folder.  [default: generated-1, -2, ...]")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Variations.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Another seed draws others.")] = 0,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 takes the likeliest.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Only the likeliest that hold this share.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Weight of what is given; 1 is plain.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="In how many steps a picture is decoded.")] = None,
    order: Annotated[Literal["confidence", "random"] | None, typer.Option("--order", help="Which cells first.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="MODALITY.OPTION=VALUE", help="One option of one modality, as rgb.steps=8."),
    ] = None,
) -> None:
    """Make modalities from others with a trained model, and a contact sheet of it."""
    from engine import generate as generating

    decoding = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance": guidance,
        "steps": steps,
        "order": order,
    }
    folder = generating.run(
        checkpoint,
        given or [],
        [name.strip() for name in wanted.split(",")],
        out,
        samples=samples,
        seed=seed,
        every={name: value for name, value in decoding.items() if value is not None},
        settings=settings or [],
        say=lambda text: typer.echo(text, err=True),
    )
    typer.echo(f"look at it:  {folder / 'contact-sheet.png'}")


def main(arguments: list[str] | None = None) -> None:
    """The entry of the command: runs a verb and turns errors into exit codes."""
    import modmill

    # A preempted or stopped job ends as one that a person interrupts: what is done is committed.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        modmill.check_packages()
        app(arguments, standalone_mode=True)
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
        if error.errno != errno.ENOSPC:
            raise
        _end(
            UserError(
                f"the disk of {error.filename or 'the workspace'} is full; free some of it, and the same command goes on"
            ),
            USER_MISTAKE,
        )
    except SystemExit as end:
        if end.code != _TYPER_INTERRUPTED:
            raise
        typer.echo("interrupted: what is done is committed; the same command goes on from there", err=True)
        sys.exit(INTERRUPTED)


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


def _end(error: Exception, code: int) -> Any:
    if os.environ.get("MODMILL_DEBUG"):
        raise error
    typer.echo(f"modmill: {error}", err=True)
    sys.exit(code)
