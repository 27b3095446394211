"""Quantizers: vectors to integers by a codebook."""
