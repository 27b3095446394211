"""Specialists: images, or labels and source columns that they declare as inputs, in; labels out.

One file for each architecture family; the file's name is the labeler's name, and there is no registry.
"""
