"""Reads the trainer file, and honors DeepSpeed's keys in it."""
