"""Writes a workspace, or a part of it, for others: a copy that is a workspace itself, or tars in other layouts."""
