"""Fits tokenizers on labels."""
