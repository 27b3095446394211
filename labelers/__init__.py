"""Holds the labelers: specialists that turn images, source columns or other labels into labels.

One file for each architecture family; the file's name is the labeler's name, and there is no registry.
"""
