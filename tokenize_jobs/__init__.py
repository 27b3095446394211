"""Labels to integer tokens and back. No training here (see `train/fit`), and no ray.

protocol    what a tokenizer is, and how a saved one is loaded
grids       maps of any size as a grid of vectors
quantizers  vectors to integers
sequences   records as sequences of words
grid, text  the two families of tokenizers
report      how well a tokenizer gives back what it was given
"""
