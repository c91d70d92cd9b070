"""The storage benchmark end to end on a small dataset: every way measured, the environment as
before."""

from __future__ import annotations

import json
import os

import pytest

from pipeline.storage_bench import main

pytestmark = [pytest.mark.slow, pytest.mark.remote]


def test_everything_is_measured_beside_plain_clients(capsys):
    before = dict(os.environ)
    code = main(
        [
            "--num-shards",
            "3",
            "--shard-mb",
            "1",
            "--runs",
            "1",
            "--batch-size",
            "8",
            "--json",
        ]
    )
    assert code == 0
    assert dict(os.environ) == before
    result = json.loads(capsys.readouterr().out)
    names = {row["what"] for row in result["rows"]}
    for client in ("boto3", "s3fs", "obstore"):
        assert {f"{client}, ranges", f"{client}, whole objects"} <= names
    assert {
        "our reads",
        "our staging (store to verified files)",
        "local shards",
        "cache, second epoch",
    } <= names
    assert result["num_bytes"] > 3e6
    assert all(row["min_s"] > 0 for row in result["rows"])
    assert all(value > 0 for value in result["ratios"].values())


def test_what_cannot_be_measured_is_said(capsys):
    assert main(["--uri", "gs://bucket/x"]) == 2
    assert main(["--runs", "0"]) == 2
    said = capsys.readouterr().err
    assert "s3:// only" in said
    assert "--runs" in said
