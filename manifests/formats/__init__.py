"""The files of a workspace: shards, the sidecars beside them, snapshots, and shards rewritten without some rows."""
