"""Fits the tokenizers on labels."""
