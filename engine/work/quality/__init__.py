"""Measures every shard while its rows are made."""
