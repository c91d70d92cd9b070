"""Batches of pixels by the order of a dataset: `Loader`, and `read_samples` for single ones."""

from pipeline.loader.loader import Batch, Loader, read_samples

__all__ = ["Batch", "Loader", "read_samples"]
