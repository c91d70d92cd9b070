"""Bytes of a sample out of shards that are local, staged in the cache, or still remote."""
