"""What every part of modmill agrees on: modalities, recipes, the log, shards, storage, images, errors.

Imports nothing of the other packages and starts in milliseconds: no torch, no ray.
"""
