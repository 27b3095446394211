"""From a snapshot to masked batches: vocabulary, mixture and order, loader, local cache of tokens, masks."""
