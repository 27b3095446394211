"""Records (boxes, palettes, metadata) as sequences of words."""
