"""Measures the engine beside a plain loop, the bare model and Ray Data: `python -m benchmarks.engine`.

measures         each sets some of the figures
bench, inputs    what they share; the images
bare, raydata    what the engine is compared with
runs             runs of the engine, and how long their work took
driver, memory   one driver of many workers; the memory of a worker
weights          checkpoints of true architectures with random weights
"""
