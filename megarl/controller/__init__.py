"""The loop, and the processes it drives."""
