"""Does one work item, in whatever process: decode, label, tokenize, shard are its stages; `item` leads through them."""
