"""Hugging Face config -> Megatron model, and the one map between the names of both."""
