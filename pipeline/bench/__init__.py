"""Loader-only throughput, alone and beside other loaders: `python -m pipeline.bench`."""
