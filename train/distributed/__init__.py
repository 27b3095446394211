"""Processes of a training and how its states are sharded over them."""
