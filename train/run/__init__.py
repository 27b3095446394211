"""Carries out one training run: `run` holds the loop; folder, checkpoints, metrics and random generators stand beside it."""
