"""Makes again what is lost: the log from sidecars and files, or the sidecars from the log."""
