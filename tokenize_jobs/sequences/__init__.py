"""Writes records (boxes, palettes, metadata) as sequences of words, and parses them."""
