"""Makes, reads, splits and replaces snapshots: frozen, hashed selections of rows and shards."""
