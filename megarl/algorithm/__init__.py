"""The mathematics of post-training on plain tensors: no config, no processes, no model."""
