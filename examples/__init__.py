"""Shows modmill at work: pipeline files, trainer files, files for clusters, and the demo (`make demo`)."""
