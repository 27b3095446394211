"""Generates the tokens of one modality after the other with a trained model."""
