"""Container formats: bytes of sample i out of a shard, and the writers."""
