"""Examines a machine before a run: ``python -m megarl.doctor``. Imports nothing heavy, to answer in a second."""
