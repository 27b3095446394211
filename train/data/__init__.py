"""Turns a snapshot into masked batches: vocabulary, mixture and order, loader, local cache of tokens, masks."""
