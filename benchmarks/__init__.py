"""Measures modmill: `python -m benchmarks.NAME` from the root of a clone, and never as a script, for then this folder's
`engine` would hide the package of that name.

engine       the engine beside what one would write instead
chaos        a run whose workers and driver are killed
manifest     the log, the index and their queries at a billion images
loader       rows a second
generation   how right a small model is on scenes it never saw
scenes       renders procedural scenes with exact labels

All but `scenes` take --quick and --json, and print one JSON object as their last line.
"""
