"""Parquet rows and their checks, chat templates, the resumable order of rows, and the preparation of data sets."""
