"""Models that train or score: actor and reference on Megatron."""
