"""Holds everything that has an optimizer, and all use of trained models. Runs without ray and duckdb.

data        from a snapshot to masked batches
model       the transformer and its loss
settings    the trainer file, and DeepSpeed's keys in it
optim       optimizers and schedules
run         a training run: its loop, its folder, its checkpoints and metrics
generation  tokens out of a trained model
fit         tokenizers, fitted on labels
"""
