"""Pre-training: settings, engine, checkpoints, metrics and the loop."""
