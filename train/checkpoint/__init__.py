"""Checkpoints by parameter name: read, write, commit, prune."""
