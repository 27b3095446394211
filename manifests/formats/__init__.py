"""Writes and reads the files of a workspace: shards, their sidecars, snapshots, and shards without some rows."""
