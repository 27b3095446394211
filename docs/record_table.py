"""Draws the table of a run as it was at a moment, as text. It makes the recordings in docs/running.md.

python docs/record_table.py WORKSPACE RUN --at 63 --width 80
"""

import argparse
import io
import json
import sys

from rich.console import Console

from engine.progress import events, table
from engine.progress.state import RunState
from manifests.store.storage import open_storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("workspace")
    parser.add_argument("run", help="its name, as `modmill sql WORKSPACE 'SELECT run FROM runs'` has it")
    parser.add_argument("--at", type=float, default=float("inf"), help="seconds since the run began; default: its end")
    parser.add_argument("--width", type=int, default=80)
    asked = parser.parse_args()
    storage = open_storage(asked.workspace)
    state = RunState()
    for path in events.files(storage, asked.run):
        for line in storage.read(path).splitlines():
            event = json.loads(line)
            if event["t"] <= asked.at:
                state.apply(event)
    console = Console(width=asked.width, file=io.StringIO(), record=True)
    console.print(table.table(state))
    sys.stdout.write("\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
