"""Finds the samples of a source in a fixed order (`scan`) and reads their bytes (`read`), by kind of corpus (`kinds`)."""
