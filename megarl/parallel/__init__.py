"""Processes and what they share: the platform, the rank layout, groups, the pipeline, resharding.

``platform`` comes first: nothing imports ``megatron.core`` before ``install_platform()`` has run.
"""
