"""The command `modmill`."""

from engine.cli.entry import command, main

__all__ = ["command", "main"]
