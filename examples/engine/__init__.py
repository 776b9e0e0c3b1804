"""A training run of anything: its options, its processes, its log, its checkpoints and its early end."""
