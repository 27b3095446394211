"""Turns maps into a grid of vectors: how values become network inputs and come back (`coding`), and the networks."""
