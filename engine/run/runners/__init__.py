"""Runs the work items: what a runner is (`protocol`), its loop (`driver`), who gets which item, who is to blame."""
