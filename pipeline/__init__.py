"""Shards anywhere in, decoded batches out; what a model sees is a pure function of (dataset, seed,
epoch, position)."""
