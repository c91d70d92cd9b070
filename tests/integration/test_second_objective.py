"""An objective that is none of ours (labels, two views, colours that are drawn) goes through the
real loader, loop, engines and checkpoints: none of them may need a masked autoencoder.

As a program this file trains it: `test_second_objective.py WORDS.json [--crash-after STEPS]`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.config import ModelConfig
from model.vit import VisionTransformer
from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.convert.conversion import convert
from pipeline.convert.plan import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.decoders.base import Decoded, Decoder
from pipeline.images.refused import Reason, Refused
from pipeline.loader import Batch, Loader, read_samples
from pipeline.loader.loader import open_reader
from pipeline.sampling.draws import Sampling, View
from pipeline.sampling.philox import random_words, unit_float32
from tests import launch
from train.config import RunConfig
from train.loop.loop import train
from train.process.outcome import Outcome, read_status
from train.report.metrics_file import read_metrics
from train.settings.command_line import parse_run

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
NUM_CLASSES = 4
WORDS = {
    "model.image-size": "32",
    "model.embed-dim": "32",
    "model.depth": "2",
    "model.num-heads": "2",
    "train.global-batch-size": "16",
    "train.micro-batch-size": "4",
    "train.steps": "12",
    "optim.warmup-steps": "2",
    "optim.base-lr": "0.05",
    "order.lanes": "4",
    "loader.decoder": "turbo",
    "engine.precision": "fp32",
    "checkpoint.every-steps": "6",
    "checkpoint.mode": "sync",
    "log.every-steps": "1",
    "log.tensorboard": "off",
}


# ------------------------------------------------------------------------------------ the objective
class OwnPurpose(IntEnum):
    COLOUR = 200


@dataclass(frozen=True)
class Colours:
    """A gain for each channel of each image."""

    def draw(
        self, *, seed: int, epochs_B: np.ndarray, sample_ids_B: np.ndarray
    ) -> np.ndarray:
        words_B4 = random_words(
            seed=seed,
            purpose=OwnPurpose.COLOUR,  # type: ignore[arg-type]
            epochs_n=epochs_B,
            streams_n=sample_ids_B,
            num_blocks=1,
        )
        return 0.8 + 0.4 * unit_float32(words_B4[:, :3])


class Output(NamedTuple):
    loss: Tensor


class TwoViewClassifier(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = VisionTransformer(
            image_size=(config.image_height, config.image_width),
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
        )
        self.head = nn.Linear(config.embed_dim, NUM_CLASSES)

    def forward(
        self,
        first_BCHW: Tensor,
        second_BCHW: Tensor,
        colours_B3: Tensor,
        labels_B: Tensor,
    ) -> Output:
        coloured_BCHW = second_BCHW * colours_B3[:, :, None, None]
        features = [self.encoder.features(view) for view in (first_BCHW, coloured_BCHW)]
        losses = [
            nn.functional.cross_entropy(self.head(one), labels_B) for one in features
        ]
        apart = (features[0] - features[1]).square().mean()
        return Output((losses[0] + losses[1]) / 2 + 0.1 * apart)


@dataclass
class Classification:
    config: RunConfig
    crash_after: int | None = None

    def sampling(self) -> Sampling:
        return Sampling(
            (View(self.config.view, 0), View(self.config.view, 1)),
            {"colours": Colours()},
        )

    def build(self) -> nn.Module:
        return TwoViewClassifier(self.config.model)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        if self.crash_after is not None:
            self.crash_after -= 1
            if self.crash_after < 0:
                raise RuntimeError("the power is gone")
        return (*batch.views_BCHW, batch.draws["colours"], batch.labels_B)

    def train_flops(self) -> int:
        return 1

    def encoder(self, model: nn.Module) -> VisionTransformer:
        assert isinstance(model, TwoViewClassifier)
        return model.encoder

    def pictures(self, model: nn.Module, batch: Batch) -> None:
        assert not model.training
        assert len(batch.views_BCHW) == 2

    def held_out_losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


def main() -> int:
    settings = json.loads(Path(sys.argv[1]).read_text())
    config = parse_run(settings["words"])
    objective = Classification(config, settings["crash_after"])
    train(config, Outcome(Path(config.run_dir)), objective)
    return 0


# ---------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def data(
    make_class_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = tmp_path_factory.mktemp("shards")
    source = make_class_folder(num_classes=NUM_CLASSES, per_class=20, size_px=48)
    convert(
        str(source),
        str(folder / "train"),
        ConvertSettings(samples_per_shard=16),
        workers=1,
    )
    return str(folder / "train")


def start(
    folder: Path,
    data: str,
    *,
    ranks: int,
    crash_after: int | None = None,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    given = {
        **WORDS,
        "data.train": data,
        "data.val": data,
        "run.dir": str(folder / "run"),
    }
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    words = [
        "demo",
        *(word for name, value in given.items() for word in (f"--{name}", value)),
    ]
    listed = folder / "words.json"
    listed.write_text(json.dumps({"words": words, "crash_after": crash_after}))
    return launch.run([__file__, str(listed)], ranks=ranks)


def losses(folder: Path) -> dict[int, Any]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "run")}


def test_it_learns_and_goes_on_bit_for_bit_after_a_crash(data: str, tmp_path: Path):
    one = {"engine__kind": "torch"}
    done = start(tmp_path / "whole", data, ranks=1, **one)
    assert done.returncode == 0, done.stderr
    whole = losses(tmp_path / "whole")
    assert list(whole) == list(range(1, 13))
    assert whole[12] < 0.8 * whole[1]
    assert not (tmp_path / "whole" / "run" / "reconstruction.png").exists()

    # Four micro-batches make a step: the 36th is the end of step 9, and 6 is the last one saved.
    crashed = start(tmp_path / "broken", data, ranks=1, crash_after=36, **one)
    assert crashed.returncode != 0
    assert "the power is gone" in crashed.stderr
    assert read_status(tmp_path / "broken" / "run")["step"] == 9
    again = start(tmp_path / "broken", data, ranks=1, **one)
    assert again.returncode == 0, again.stderr
    assert "resumed from step 6" in again.stdout
    assert losses(tmp_path / "broken") == whole

    # Another engine and world size: the same images, boxes, colours and labels, in another order
    # of summation.
    two = start(tmp_path / "two", data, ranks=2)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(whole, rel=2e-3)


def test_views_are_those_of_a_loader_for_each_alone(data: str):
    """One view more changes no pixel of the others, in a batch or read alone."""
    dataset = open_dataset(data)
    large = ViewConfig(height=32, width=32)
    small = ViewConfig(height=16, width=16)
    sampling = Sampling(
        (View(large), View(small), View(large, 1)), {"colours": Colours()}
    )

    def first_batches(wanted: Sampling) -> list[Batch]:
        with Loader(
            dataset,
            wanted,
            OrderConfig(lanes=4),
            LoaderConfig(decoder="turbo", num_threads=1),
            seed=3,
            global_batch_size=8,
            micro_batch_size=4,
            device=CPU,
        ) as loader:
            stream = iter(loader)
            return [next(stream) for _ in range(6)]

    together = first_batches(sampling)
    for number, view in enumerate(sampling.views):
        for both, alone in zip(together, first_batches(Sampling((view,))), strict=True):
            assert torch.equal(both.views_BCHW[number], alone.images_BCHW)
            assert torch.equal(both.labels_B, alone.labels_B)

    batch = together[2]
    assert batch.boxes[0].lefts_B.tolist() == batch.boxes[1].lefts_B.tolist()
    assert batch.boxes[0].lefts_B.tolist() != batch.boxes[2].lefts_B.tolist()
    again = read_samples(
        dataset,
        batch.sample_ids_B,
        sampling,
        LoaderConfig(decoder="turbo", num_threads=1),
        seed=3,
        epoch=int(batch.epochs_B[0]),
        device=CPU,
    )
    for before, after in zip(batch.views_BCHW, again.views_BCHW, strict=True):
        assert torch.equal(before, after)
    assert torch.equal(batch.draws["colours"], again.draws["colours"])


class CannotReadOne:
    """A decoder that finds one image of the dataset bad, as a damaged one would be."""

    def __init__(self, decoder: Decoder, damaged: bytes) -> None:
        self._decoder, self._damaged = decoder, damaged
        self.depth, self.device = decoder.depth, decoder.device
        self.met = 0

    def submit(
        self, images_B: Any, boxes: Any, out_BHW3: Any = None
    ) -> Callable[[], Decoded]:
        wait = self._decoder.submit(images_B, boxes, out_BHW3)
        places = [i for i, one in enumerate(images_B) if one.tobytes() == self._damaged]
        bad = {i: Refused(Reason.TRUNCATED) for i in places}
        self.met += len(bad)

        def finish() -> Decoded:
            decoded = wait()
            for i in bad:
                decoded.pixels_BHW3[i] = 0
            return Decoded(decoded.pixels_BHW3, {**decoded.bad, **bad})

        return finish

    def decode(self, images_B: Any, boxes: Any) -> Decoded:
        return self.submit(images_B, boxes)()

    def close(self) -> None:
        self._decoder.close()


def test_an_image_that_is_bad_in_one_view_is_replaced_in_all(data: str):
    """Two equal views stay equal, also around a substitute; its label goes with it."""
    dataset = open_dataset(data)
    view = View(ViewConfig(height=32, width=32))
    settings = LoaderConfig(decoder="turbo", num_threads=1)
    with contextlib.closing(open_reader(dataset, settings)) as reader:
        (damaged,), _ = reader.read(dataset.lookup(np.array([21])))
    with Loader(
        dataset,
        Sampling((view, view)),
        OrderConfig(lanes=4),
        settings,
        seed=3,
        global_batch_size=8,
        micro_batch_size=4,
        device=CPU,
    ) as loader:
        second = CannotReadOne(loader._decoders[1], damaged.tobytes())
        loader._decoders[1] = second
        stream = iter(loader)
        for _ in range(20):
            batch = next(stream)
            assert torch.equal(batch.views_BCHW[0], batch.views_BCHW[1])
        assert second.met >= 1
        assert loader.report.num_bad >= 1


if __name__ == "__main__":
    sys.exit(main())
