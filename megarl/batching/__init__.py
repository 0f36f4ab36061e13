"""From rollouts to mini-batches, micro-batches and packed tensors."""
