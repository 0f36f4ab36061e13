"""What a run shows and leaves behind: timings, metrics, progress and the run folder."""
