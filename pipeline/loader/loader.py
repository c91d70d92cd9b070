"""From a dataset and a place in its order to batches on the device.

Two threads work ahead of the caller: one looks up and reads encoded images, one decodes them. What
a batch holds is decided by `order` and `augment` alone; threads, decoder, cache and world size only
decide how fast it comes.

Shapes: B images of one micro-batch, C H W channels, height and width, N patches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch

from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import DatasetInfo
from pipeline.dataset.manifest import Manifest, describe_change
from pipeline.decoders.base import Decoder, Pending
from pipeline.decoders.choose import build_decoder
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.loader.channel import Channel, ChannelClosedError
from pipeline.loader.data_report import DataReport
from pipeline.loader.samples import Encoded, SampleSource
from pipeline.loader.stats import PipelineStats
from pipeline.loader.transfer import DeviceCopier, HostBuffers
from pipeline.reading.reader import ShardReader
from pipeline.sampling.boxes import Boxes
from pipeline.sampling.order import Cursor, Order, Share
from pipeline.sampling.philox import I64

_NAMED = 10
"""Shards that an error names at most."""


class LoaderState(TypedDict):
    """All that is needed to go on exactly: no generator state, no shuffle buffer."""

    seed: int
    epoch: int
    position: int
    fingerprint: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        images_BCHW: normalised with ImageNet's mean and standard deviation, on the loader's device.
        labels_B: int64 class numbers on the same device, -1 where a sample has none.
        sample_ids_B: int64 numpy array; with the seed and the epoch it names every random choice
            made for an image.
        epochs_B: int64 numpy array; a batch may span two epochs.
        boxes: where each image was cut, and whether it was mirrored.
        epoch, position: where the global batch begins that this is a part of.
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    sample_ids_B: I64
    epochs_B: I64
    boxes: Boxes
    epoch: int
    position: int


@dataclass
class _Work:
    """A micro-batch on its way through the threads, with the host buffer that its pixels lie in, if
    they do."""

    encoded: Encoded
    start: Cursor
    end: Cursor | None
    pixels_BHW3: torch.Tensor | None = None
    buffer_BHW3: torch.Tensor | None = None


class Loader:
    """Endless micro-batches of one rank, from any place in the order.

    Args:
        dataset: an open dataset.
        view: how images are cut.
        order: how samples are shuffled.
        settings: how they are read and decoded.
        seed: key of the run.
        rank: this rank.
        world_size: ranks that share a global batch.
        local_world_size: ranks on this machine; they share its cores.
        global_batch_size: images of one optimizer step over all ranks.
        micro_batch_size: images of one batch that this loader yields.
        device: where batches are wanted.
        dtype: type of the images. uint8 gives the pixels as they are decoded; on a CPU such a batch
            stays valid until the next but one is asked for, for its memory is used again. Every
            other batch is the caller's.

    Raises:
        ConfigError: where the sizes cannot work together, or a decoder is not installed.
    """

    def __init__(
        self,
        dataset: Manifest,
        view: ViewConfig,
        order: OrderConfig,
        settings: LoaderConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int = 1,
        global_batch_size: int,
        micro_batch_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                "train.micro_batch_size "
                f"{micro_batch_size} x {world_size} ranks"
            )
        self._dataset = dataset
        self._seed = seed
        self._micro = micro_batch_size
        self._order = Order(
            dataset.shard_sizes,
            config=order,
            seed=seed,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
        )
        self.report = DataReport(
            max_bad_share=settings.max_bad_share, max_bad_in_a_row=settings.max_bad_in_a_row
        )
        self.stats = PipelineStats()
        self._reader = _open_reader(dataset, settings)
        self._source = SampleSource(dataset, self._reader, view=view, settings=settings, seed=seed)
        self._decoder = build_decoder(
            settings,
            view=view,
            max_batch_size=micro_batch_size,
            local_world_size=local_world_size,
            device=device,
        )
        self._copier = DeviceCopier(device=device, dtype=dtype)
        self._buffers = HostBuffers(
            (micro_batch_size, view.height, view.width, 3), pinned=device.type == "cuda"
        )
        self._lent: deque[torch.Tensor] = deque()
        self._prefetch = settings.prefetch_batches
        self._cursor = Cursor()
        self._encoded: Channel[_Work] = Channel(settings.prefetch_batches)
        self._decoded: Channel[_Work] = Channel(settings.prefetch_batches)
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def steps_per_epoch(self) -> float:
        """Global batches an epoch; a fraction where the last one is filled from the next epoch."""
        return self._order.steps_per_epoch

    @property
    def wait_s(self) -> float:
        """Seconds that the caller has waited for batches so far."""
        return self.stats.snapshot()["wait"]["wait_s"]

    def state_dict(self) -> LoaderState:
        """Return the place after the last global batch that was yielded whole."""
        return LoaderState(
            seed=self._seed,
            epoch=self._cursor.epoch,
            position=self._cursor.position,
            fingerprint=self._dataset.info.fingerprint,
        )

    def load_state_dict(
        self,
        state: LoaderState,
        *,
        trained_on: DatasetInfo | None = None,
        on_change: Literal["refuse", "next-epoch"] = "refuse",
    ) -> None:
        """Go to a place in the order. Takes constant time, whatever the place.

        Args:
            state: the place.
            trained_on: the dataset that the state is of, where it was kept; names the shards that
                changed.
            on_change: what happens where the dataset is another: `refuse`, or go on with its
                `next-epoch`. Never within an epoch, for some samples would come twice and others
                not at all.

        Raises:
            DataError: the dataset is not the one that the state is of.
            ConfigError: the seed is another, or batches have already been taken.
        """
        if self._threads:
            raise ConfigError("loader: the state must be loaded before the first batch is taken")
        if state["seed"] != self._seed:
            raise ConfigError(
                f"train.seed is {self._seed}, the run was started with {state['seed']}: keep the "
                "seed to resume"
            )
        if state["fingerprint"] == self._dataset.info.fingerprint:
            self._cursor = Cursor(state["epoch"], state["position"])
        elif on_change == "next-epoch":
            self._cursor = Cursor(state["epoch"] + bool(state["position"]), 0)
        else:
            raise DataError(describe_change(self._dataset, state["fingerprint"], trained_on))

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches without end; iterating again goes on from where the last one
        stopped."""
        if not self._threads:
            self._start()
        while True:
            with self.stats.waiting("wait"):
                work = self._decoded.get()
            assert work.pixels_BHW3 is not None
            encoded = work.encoded
            with self.stats.busy("copy", items=len(encoded.sample_ids_B)):
                images_BCHW = self._copier.normalise(work.pixels_BHW3)
                labels_B = torch.from_numpy(encoded.labels_B).to(images_BCHW.device)
            if work.end is not None:
                self._cursor = work.end
            self._recycle(work)
            yield Batch(
                images_BCHW,
                labels_B,
                encoded.sample_ids_B,
                encoded.epochs_B,
                encoded.boxes,
                work.start.epoch,
                work.start.position,
            )

    def close(self) -> None:
        """Stop the threads and release the decoder. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._encoded.close()
        self._decoded.close()
        for thread in self._threads:
            thread.join()
        self._decoder.close()
        self._reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        for target, name in ((self._read_ahead, "read"), (self._decode_ahead, "decode")):
            thread = threading.Thread(target=target, name=f"loader-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _read_ahead(self) -> None:
        try:
            for share in self._order.shares(self._cursor):
                if self._reader.is_staging:
                    self._reader.prepare(self._shards_ahead(share))
                for first in range(0, len(share.sample_ids_B), self._micro):
                    piece = slice(first, first + self._micro)
                    with (
                        self.stats.busy("read", items=self._micro),
                        self._naming("read", share.sample_ids_B[piece]),
                    ):
                        encoded = self._source.fetch(
                            share.sample_ids_B[piece], share.epochs_B[piece]
                        )
                    self.stats.add("read", num_bytes=sum(image.size for image in encoded.images))
                    last = first + self._micro >= len(share.sample_ids_B)
                    with self.stats.waiting("read"):
                        self._encoded.put(_Work(encoded, share.start, share.end if last else None))
        except ChannelClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must meet it
            self._encoded.fail(error)

    def _recycle(self, work: _Work) -> None:
        """Let the buffer of a batch that is handed over be used again when the caller can no longer
        look at it."""
        if work.buffer_BHW3 is None:
            return
        self._lent.append(work.buffer_BHW3)
        while len(self._lent) > (2 if self._copier.keeps_pixels else 0):
            self._buffers.give_back(self._lent.popleft())

    def _decode_ahead(self) -> None:
        pending: deque[tuple[_Work, Pending]] = deque()
        try:
            while True:
                # Finished work is not held back for a read that is slow.
                while not pending or (len(pending) < self._decoder.depth and len(self._encoded)):
                    with self.stats.waiting("decode"):
                        work = self._encoded.get()
                    pending.append(self._begin_decode(work))
                self._decoded.put(self._end_decode(*pending.popleft()))
        except ChannelClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must meet it
            self._decoded.fail(error)
        finally:
            # What still writes into buffers must be over before they are let go.
            for _, wait in pending:
                with suppress(Exception):
                    wait()

    def _begin_decode(self, work: _Work) -> tuple[_Work, Pending]:
        encoded = work.encoded
        on_host = self._decoder.device.type == "cpu"
        with self.stats.busy("decode"), self._naming("decode", encoded.sample_ids_B):
            buffer_BHW3 = self._buffers.take() if on_host else None
            wait = self._decoder.submit(encoded.images, encoded.boxes, buffer_BHW3)
        return replace(work, buffer_BHW3=buffer_BHW3), wait

    def _end_decode(self, work: _Work, wait: Pending) -> _Work:
        ids_B = work.encoded.sample_ids_B
        with self.stats.busy("decode", items=len(ids_B)), self._naming("decode", ids_B):
            pixels_BHW3 = self._source.replace_bad(work.encoded, wait(), self._decoder, self.report)
            on_device_BHW3, copied = self._copier.begin(pixels_BHW3)
        self.stats.add("decode", num_bytes=pixels_BHW3.numel())
        if work.buffer_BHW3 is not None and copied is not None:
            self._buffers.give_back(work.buffer_BHW3, after=copied)
            work.buffer_BHW3 = None
        return replace(work, pixels_BHW3=on_device_BHW3)

    def _shards_ahead(self, share: Share) -> list[int]:
        """List the shards that are read now, then those that each lane comes to one shard later."""
        lanes = self._order.lanes
        horizon = lanes * max(1, self._order.num_samples // self._dataset.info.num_shards)
        epochs_B, positions_B = np.divmod(
            share.epochs_B * self._order.num_samples + share.positions_B + horizon,
            self._order.num_samples,
        )
        shards: list[int] = []
        for epochs, positions in ((share.epochs_B, share.positions_B), (epochs_B, positions_B)):
            for epoch in np.unique(epochs):
                shards += (
                    self._order.epoch(int(epoch)).shards_ahead(positions[epochs == epoch]).tolist()
                )
        return shards

    @contextmanager
    def _naming(self, stage: str, sample_ids_B: I64) -> Iterator[None]:
        """Turn a defect in a thread into an error that names the samples in flight."""
        try:
            yield
        except (MaelstromError, ChannelClosedError):
            raise
        except Exception as error:
            shards_B, _ = self._dataset.locate(sample_ids_B)
            names = ", ".join(
                sorted({self._dataset.shard_name(int(shard)) for shard in shards_B})[:_NAMED]
            )
            raise DataError(
                f"loader: the {stage} thread failed ({type(error).__name__}: {error}) on samples "
                f"{sample_ids_B.tolist()} of {names}. Read them alone with "
                "pipeline.loader.read_samples, or check the "
                "shards with pipeline.verify --full"
            ) from error


def read_samples(
    dataset: Manifest,
    sample_ids_B: I64,
    view: ViewConfig,
    settings: LoaderConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Read some samples once, as a run with this seed would see them in this epoch.

    For replaying a batch, for pictures and for held-out measurements.
    """
    ids_B = np.asarray(sample_ids_B, dtype=np.int64)
    epochs_B = np.full_like(ids_B, epoch)
    reader = _open_reader(dataset, settings)
    decoder: Decoder | None = None
    try:
        decoder = build_decoder(
            settings,
            view=view,
            max_batch_size=max(len(ids_B), 1),
            local_world_size=1,
            device=device,
        )
        source = SampleSource(dataset, reader, view=view, settings=settings, seed=seed)
        copier = DeviceCopier(device=device, dtype=dtype)
        encoded = source.fetch(ids_B, epochs_B)
        pixels_BHW3, _ = copier.begin(
            source.decode(encoded, decoder, DataReport(max_bad_share=1.0))
        )
        images_BCHW = copier.normalise(pixels_BHW3)
    finally:
        reader.close()
        if decoder is not None:
            decoder.close()
    labels_B = torch.from_numpy(encoded.labels_B).to(device)
    return Batch(images_BCHW, labels_B, ids_B, epochs_B, encoded.boxes, epoch, 0)


def _open_reader(dataset: Manifest, settings: LoaderConfig) -> ShardReader:
    return ShardReader(
        dataset,
        cache_dir=Path(settings.cache_dir).expanduser() if settings.cache_dir else None,
        cache_bytes=int(settings.cache_size_gib * 2**30),
        verify_hashes=settings.verify_hashes,
    )
