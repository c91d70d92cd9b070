"""What only a CUDA device can show: DALI's mixed decoder, the copy stream, and DeepSpeed with nccl,
bf16 and fp16."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.loader import Loader

pytestmark = pytest.mark.gpu

VIEW = ViewConfig(height=64, width=64)


def first_batches(dataset, *, decoder, device, count=3, dtype=torch.float32):
    loader = Loader(
        dataset,
        VIEW.model_copy(update={"interpolation": "area"})
        if decoder == "ffcv"
        else VIEW,
        OrderConfig(lanes=4, window=2),
        LoaderConfig(decoder=decoder),
        seed=0,
        global_batch_size=16,
        micro_batch_size=16,
        device=torch.device(device),
        dtype=dtype,
    )
    with loader:
        stream = iter(loader)
        return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("decoder", ["dali", "turbo", "ffcv"])
def test_batches_on_the_device_are_those_of_the_cpu(make_dataset, decoder):
    dataset = open_dataset(make_dataset())
    on_cpu = first_batches(dataset, decoder=decoder, device="cpu")
    on_gpu = first_batches(dataset, decoder=decoder, device="cuda:0")
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.images_BCHW.device.type == "cuda"
        assert gpu.sample_ids_B.tolist() == cpu.sample_ids_B.tolist()
        # The GPU's inverse transform and resize round differently; 0.05 is about 3 of 255 levels.
        assert (gpu.images_BCHW.cpu() - cpu.images_BCHW).abs().mean() < 0.05


@pytest.mark.parametrize("decoder", ["dali", "turbo"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16])
def test_every_batch_on_the_device_is_the_callers(make_dataset, decoder, dtype):
    """Host buffers are used again while copies run on a stream of their own: held batches must not
    change."""
    dataset = open_dataset(make_dataset())
    held = first_batches(
        dataset, decoder=decoder, device="cuda:0", count=12, dtype=dtype
    )
    torch.cuda.synchronize()
    for number, batch in enumerate(
        first_batches(dataset, decoder=decoder, device="cuda:0", count=12, dtype=dtype)
    ):
        torch.cuda.synchronize()
        assert batch.images_BCHW.dtype == dtype
        assert torch.equal(batch.images_BCHW, held[number].images_BCHW)


def test_a_bad_image_in_a_mixed_batch_is_replaced(make_dataset):
    dataset = open_dataset(make_dataset(replace={7: b"\xff\xd8\xff\xe0 junk" * 30}))
    batches = first_batches(dataset, decoder="dali", device="cuda:0", count=4)
    assert all(torch.isfinite(batch.images_BCHW).all() for batch in batches)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "autocast"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_on_the_device_learns_and_resumes(
    make_dataset, tmp_path, precision, stage
):
    dataset = make_dataset()
    command = [
        sys.executable,
        "-m",
        "train.pretrain",
        "demo",
        "--data.train",
        dataset,
        "--run.dir",
        str(tmp_path),
    ]
    command += [
        "--train.global-batch-size",
        "16",
        "--train.micro-batch-size",
        "16",
        "--engine.zero-stage",
        str(stage),
    ]
    command += [
        "--engine.precision",
        precision,
        "--log.every-steps",
        "5",
        "--optim.warmup-steps",
        "2",
    ]
    for steps in (10, 20):
        done = subprocess.run(
            [*command, "--train.steps", str(steps)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from step 10" in done.stdout
    lines = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]
