"""Many shards as one dataset: `open_dataset`, the `Manifest` of its samples, the `DatasetInfo` of
its shards."""

from pipeline.dataset.info import DatasetInfo
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.opening import open_dataset

__all__ = ["DatasetInfo", "Manifest", "open_dataset"]
