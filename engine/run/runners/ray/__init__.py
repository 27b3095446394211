"""Holds the runner on Ray. Nothing else in modmill imports ray."""
