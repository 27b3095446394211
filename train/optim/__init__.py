"""Defines optimizers (AdamW, Muon) and the schedule of the learning rate."""
