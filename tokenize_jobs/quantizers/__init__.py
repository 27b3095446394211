"""Turns vectors into integers by a codebook."""
