"""Turns labels into integer tokens and back. Grids are fitted in `train/fit`, text in `text`.

protocol        what a tokenizer is, and how a saved one is loaded
grids           maps of any size as a grid of vectors
quantizers      vectors to integers
sequences       records as sequences of words
grid, text      the two families of tokenizers
reconstruction  how well a tokenizer gives back what it was given
"""
