"""Batches of pixels by the order of a dataset: `Loader`, and `read_samples` for single ones."""

from pipeline.loader.batch import Batch
from pipeline.loader.loader import Loader
from pipeline.loader.replay import read_samples

__all__ = ["Batch", "Loader", "read_samples"]
