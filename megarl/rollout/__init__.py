"""Engines that sample responses, inside the trainer's own ranks."""
