"""The first hour on a machine with GPUs as one command: ``python -m megarl.doctor --gpu-check``."""
