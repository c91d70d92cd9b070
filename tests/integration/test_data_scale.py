"""What size costs: a first global batch of a hundred thousand shards, of ten million samples, from
any place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.bench.generated_dataset import generate_manifest
from tests.limits import HANG_S

pytestmark = pytest.mark.slow

LIMIT_BYTES = 500e6

SCRIPT = """
import json, pathlib, sys, time
started_s = time.perf_counter()
import numpy as np
from pipeline.config import OrderConfig
from pipeline.dataset import open_dataset
from pipeline.sampling.order import Cursor, Order

def peak_bytes():
    # Not ru_maxrss: a child starts with its parent's.
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

dataset = open_dataset(sys.argv[1])
sizes = dict(global_batch_size=4096, rank=0, world_size=8)
order = Order(dataset.shard_sizes, config=OrderConfig(), seed=0, **sizes)

def look_up(cursor):
    share = order.rank_batch(cursor)
    shards = order.epoch(cursor.epoch).shards_ahead(share.positions_B)
    rows = dataset.lookup(share.sample_ids_B)
    assert set(rows.shards_B.tolist()) <= set(shards.tolist())
    return share.end

cursor = look_up(Cursor())
first = {"first_s": time.perf_counter() - started_s, "first_bytes": peak_bytes()}
for step in range(20):
    cursor = look_up(order.advance(cursor, batches=max(1, order.num_samples // 4096 // 13)))
print(json.dumps({**first, "walked_bytes": peak_bytes(), "epoch": cursor.epoch}))
"""


@pytest.mark.parametrize(
    ("num_shards", "samples_per_shard"), [(100_000, 10), (10_000, 1000)]
)
def test_size_costs_neither_time_nor_memory(tmp_path, num_shards, samples_per_shard):
    generate_manifest(
        tmp_path / "data", num_shards=num_shards, samples_per_shard=samples_per_shard
    )
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{num_shards:,} shards of {samples_per_shard:,}: {found}")
    assert found["epoch"] >= 1  # every part of an epoch has been visited
    assert found["first_bytes"] < LIMIT_BYTES
    assert found["walked_bytes"] < LIMIT_BYTES
