"""Takes photographs, scenes and texts that come with a clone through the whole pipeline: `make demo`."""
