"""Turn images into shards: `python -m pipeline.convert SRC DST`."""
