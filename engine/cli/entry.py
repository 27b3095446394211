"""Runs the command `modmill`. Each verb imports what it needs when it runs: `modmill sql` loads neither torch nor ray.

Click, not typer: typer validates arguments with pydantic, whose import takes longer than the answer of `modmill sql`.
"""

import atexit
import contextlib
import errno
import os
import signal
import sys
import traceback
from typing import Any

import click

from engine.cli.doctor import doctor
from engine.cli.export import export
from engine.cli.forget import forget
from engine.cli.generate import generate
from engine.cli.init import init
from engine.cli.labelers import labelers
from engine.cli.options import DONE, FOUND_WRONG, INTERRUPTED, OVER_BUDGET, USER_MISTAKE
from engine.cli.run import run
from engine.cli.snapshot import snapshot
from engine.cli.sql import sql
from engine.cli.status import status
from engine.cli.train import train
from engine.cli.verify import verify
from manifests.errors import ConfigError, ModmillError, QueryError, TooManyFailures, UserError

# In the order of the work: so they stand in `modmill --help`.
VERBS = (init, labelers, doctor, run, status, sql, snapshot, verify, export, forget, train, generate)

_FAILING = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)

# Threads of torch that wait by spinning make a step ten times slower when another process has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # In the order of VERBS, not of the alphabet.


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


for verb in VERBS:
    app.add_command(verb)


def main(arguments: list[str] | None = None, program: click.Command = app) -> None:
    """Runs a verb, or another program that is to end as verbs do, and turns errors into exit codes."""
    import modmill

    # A preempted or stopped job ends as one that a person interrupts: what is done is committed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        modmill.check_packages()
        with program.make_context("modmill", sys.argv[1:] if arguments is None else list(arguments)) as context:
            program.invoke(context)
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


def command(program: click.Command = app) -> None:
    """Runs `main` as the console script does, and leaves the process at once.

    If torch or ray is loaded beside it, DuckDB's binding prints pages on its own objects as the interpreter ends.
    """
    code: Any = 0
    try:
        main(program=program)
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
    """Ends for what a person can mend: a full disk, a path that is wrong, a disk or a store that does not answer."""
    place = error.filename or "the workspace"
    if error.errno == errno.ENOSPC:
        _end(UserError(f"the disk of {place} is full; free some of it, and the same command goes on"), USER_MISTAKE)
    if error.errno in _FAILING:
        said = f"{place}: {error.strerror}: the disk or the way to it fails; see to it, and the same command goes on"
        _end(UserError(said), USER_MISTAKE)
    # One that names no error of the system is a library's own, and says nothing of a disk.
    if error.errno is not None or isinstance(error, ConnectionError | TimeoutError):
        _end(error, USER_MISTAKE)
    raise error


def _end(error: Exception, code: int) -> Any:
    if os.environ.get("MODMILL_DEBUG"):
        raise error
    click.echo(f"modmill: {_one_line(str(error)) if isinstance(error, QueryError) else error}", err=True)
    sys.exit(code)


def _one_line(message: str) -> str:
    """Returns DuckDB's message without its drawing of the query, but with the line that it points at."""
    said, _, drawing = message.partition("\n\nLINE ")
    number = drawing.partition(":")[0]
    return " ".join(said.split()) + (f" (in line {number})" if number not in ("", "1") else "")
