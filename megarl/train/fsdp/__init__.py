"""Models of transformers, sharded by torch's ``fully_shard``."""
