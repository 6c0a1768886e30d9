"""Training: the loop, optimisers, schedules, checkpoints and the run folder."""
