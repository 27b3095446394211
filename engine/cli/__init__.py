"""Holds the command `modmill`: a verb a file. `entry` is the program, `options` is what verbs share."""

from engine.cli.entry import command, main

__all__ = ["command", "main"]
