"""Proof on one's own machine that the layout doesn't change the mathematics: ``python -m megarl.verify``."""
