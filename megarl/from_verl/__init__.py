"""Overrides of a verl run, as overrides of ours."""
