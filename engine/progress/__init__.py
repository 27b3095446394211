"""Tells what a run does: its record in the log, its events, the state they add up to, and how that is drawn."""
