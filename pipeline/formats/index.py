"""Index a shard of any container, told by its ending."""

from __future__ import annotations

from pipeline.formats import beton_index, webdataset_index
from pipeline.formats.records import SUFFIXES, ShardIndex


def index_shard(uri: str, *, image_component: str | None = None) -> ShardIndex:
    """Read a shard once, from end to end, and return its samples' places, sizes and hashes.

    Args:
        uri: The shard.
        image_component: Extension of the member that is a sample's image, such as `image.jpg`; None
            takes the usual ones. For tars.

    Raises:
        DataError: The file is cut, damaged or badly made, or holds no sample.
    """
    if uri.lower().endswith(SUFFIXES["ffcv"]):
        return beton_index.index_shard(uri)
    return webdataset_index.index_shard(uri, image_component=image_component)
