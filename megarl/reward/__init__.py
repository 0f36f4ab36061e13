"""Reward functions by name, and the process pool that runs them under deadlines."""
