"""Defines the any-to-any transformer, and the loss by modality."""
