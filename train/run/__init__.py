"""One training run: `run` tells the story; folder, checkpoints, metrics and random generators stand beside it."""
