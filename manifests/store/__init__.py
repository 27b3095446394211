"""Reads and writes files safely, in a folder or on an object store: put-if-absent, checksums, Parquet."""
