"""From a dataset and a cursor in its order to batches on the device.

Two threads work ahead of the caller: one draws boxes and whatever else is random and reads encoded
images, one decodes them. What a batch holds is decided by `pipeline.sampling` alone; threads,
decoder, cache and world size only decide how fast it comes.

Shapes: B images of one micro-batch, C H W channels, height and width.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch

from pipeline import storage
from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import DatasetInfo
from pipeline.dataset.manifest import Manifest, describe_change
from pipeline.decoders.base import Decoder, Pending
from pipeline.decoders.choose import build_decoder
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.loader.batch import Batch, labels_and_draws
from pipeline.loader.channel import Channel, ChannelClosedError
from pipeline.loader.data_report import DataReport
from pipeline.loader.samples import Encoded, SampleSource
from pipeline.loader.stats import PipelineStats
from pipeline.loader.transfer import DeviceCopier, PixelBuffers
from pipeline.reading.reader import ShardReader
from pipeline.sampling.draws import Sampling, as_sampling
from pipeline.sampling.order import Cursor, Order, RankBatch
from pipeline.sampling.philox import I64

_NAMED = 10
"""Shards that an error names at most."""


class LoaderState(TypedDict):
    """All that is needed to go on exactly: no generator state, no shuffle buffer."""

    seed: int
    epoch: int
    position: int
    fingerprint: str


@dataclass
class _Work:
    """A micro-batch on its way through the threads.

    Attributes:
        encoded: what was read and drawn.
        start: beginning of its global batch.
        end: beginning of the next one, on a rank's last micro-batch of a global batch; else None.
        pixels: of each view, on the device once its copy has begun.
        buffers: the host buffer that each view was decoded into; None if it has none to give back.
    """

    encoded: Encoded
    start: Cursor
    end: Cursor | None
    pixels: list[torch.Tensor] = field(default_factory=list)
    buffers: list[torch.Tensor | None] = field(default_factory=list)


class Loader:
    """Endless micro-batches of one rank, from any cursor in the order.

    Args:
        dataset: an open dataset.
        sampling: what is cut out of and drawn for each image; the settings of a view stand for
            that view alone.
        order: how samples are shuffled.
        settings: how they are read and decoded.
        seed: key of the run.
        rank: this rank.
        world_size: ranks that share a global batch.
        local_world_size: ranks on this machine; they share its cores.
        global_batch_size: images of one optimizer step over all ranks.
        micro_batch_size: images of one batch that this loader yields.
        device: of the batches.
        dtype: type of the images. uint8 gives the pixels as they are decoded; on a CPU such a batch
            stays valid until the next but one is asked for, for its memory is used again. Every
            other batch is the caller's.

    Raises:
        ConfigError: the sizes do not fit together, or a decoder is not installed.
    """

    def __init__(
        self,
        dataset: Manifest,
        sampling: Sampling | ViewConfig,
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
        images_at_once = micro_batch_size * world_size
        if micro_batch_size < 1 or global_batch_size % images_at_once:
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                f"train.micro_batch_size {micro_batch_size} x {world_size} ranks"
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
            max_bad_share=settings.max_bad_share,
            max_bad_in_a_row=settings.max_bad_in_a_row,
        )
        self.stats = PipelineStats()
        self._reader = open_reader(dataset, settings)
        sampling = as_sampling(sampling)
        self._source = SampleSource(
            dataset, self._reader, sampling=sampling, settings=settings, seed=seed
        )
        self._decoders = build_decoders(
            sampling,
            settings,
            max_batch_size=micro_batch_size,
            local_world_size=local_world_size,
            device=device,
        )
        self._copier = DeviceCopier(device=device, dtype=dtype)
        self._buffers: list[PixelBuffers] = []
        for view in sampling.views:
            shape_BHW3 = (
                micro_batch_size,
                view.settings.height,
                view.settings.width,
                3,
            )
            buffers = PixelBuffers(shape_BHW3, pinned=device.type == "cuda")
            self._buffers.append(buffers)
        # Buffers of batches that the caller may still look at, oldest first.
        self._lent: deque[list[torch.Tensor | None]] = deque()
        self._prefetch = settings.prefetch_batches
        # Behind the last batch that was handed over, not the last that was read: the threads are
        # ahead of it, and what they hold is lost in a stop.
        self._cursor = Cursor()
        # Read -> decode -> caller; each bound keeps the one in front from filling the memory.
        self._encoded: Channel[_Work] = Channel(settings.prefetch_batches)
        self._decoded: Channel[_Work] = Channel(settings.prefetch_batches)
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def steps_per_epoch(self) -> float:
        """Global batches per epoch; a fraction if the last one is filled from the next epoch."""
        return self._order.steps_per_epoch

    @property
    def wait_s(self) -> float:
        """Seconds that the caller has waited for batches so far."""
        stages = self.stats.snapshot()
        return stages["wait"]["wait_s"]

    def state_dict(self) -> LoaderState:
        """Return the cursor after the last global batch that was yielded whole."""
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
        """Go to a cursor in the order. Takes constant time, wherever it is.

        Args:
            state: the cursor.
            trained_on: the dataset that the state is of, if it was kept; names the shards that
                changed.
            on_change: what happens if the dataset is another: `refuse`, or go on with its
                `next-epoch`. Never within an epoch, for some samples would come twice and others
                not at all.

        Raises:
            DataError: the dataset is not the one that the state is of.
            ConfigError: the seed is another, or batches have already been taken.
        """
        # The threads have begun at the old cursor, and cannot be called back.
        if self._threads:
            raise ConfigError(
                "loader: the state must be loaded before the first batch is taken"
            )
        if state["seed"] != self._seed:
            raise ConfigError(
                f"train.seed is {self._seed}, the run was started with {state['seed']}: keep the "
                "seed to resume"
            )
        if state["fingerprint"] == self._dataset.info.fingerprint:
            self._cursor = Cursor(state["epoch"], state["position"])
        elif on_change == "next-epoch":
            # At position 0 the epoch has not begun: then it is the next one itself.
            epoch = state["epoch"]
            if state["position"]:
                epoch += 1
            self._cursor = Cursor(epoch, 0)
        else:
            fingerprint = state["fingerprint"]
            problem = describe_change(self._dataset, fingerprint, trained_on)
            raise DataError(problem)

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches without end; iterating again goes on from where the last one
        stopped."""
        # Not in the constructor: a state is loaded between it and the first batch.
        if not self._threads:
            self._start()
        while True:
            with self.stats.waiting("wait"):
                work = self._decoded.get()
            encoded = work.encoded
            with self.stats.busy("copy", items=len(encoded.sample_ids_B)):
                views = [
                    self._copier.normalise(pixels_BHW3) for pixels_BHW3 in work.pixels
                ]
                device = views[0].device
                labels_B, draws = labels_and_draws(encoded, device)
            # Before the batch is handed over: a caller that saves after this batch's step must
            # find the cursor behind it.
            if work.end is not None:
                self._cursor = work.end
            self._recycle(work)
            yield Batch(
                views_BCHW=tuple(views),
                labels_B=labels_B,
                sample_ids_B=encoded.sample_ids_B,
                epochs_B=encoded.epochs_B,
                boxes=encoded.boxes,
                epoch=work.start.epoch,
                position=work.start.position,
                draws=draws,
            )

    def close(self) -> None:
        """Stop the threads and release the decoder. May be called twice."""
        if self._closed:
            return
        self._closed = True
        # In this order: channels wake the threads, threads let go of decoders and reader.
        self._encoded.close()
        self._decoded.close()
        for thread in self._threads:
            thread.join()
        for decoder in self._decoders:
            decoder.close()
        self._reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        bodies = {"read": self._read_ahead, "decode": self._decode_ahead}
        for name, body in bodies.items():
            # Daemons: a run that ends by an exception must not wait for a read from the store.
            thread = threading.Thread(target=body, name=f"loader-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _read_ahead(self) -> None:
        try:
            for rank_batch in self._order.rank_batches(self._cursor):
                # Once per global batch: which shards are needed changes slowly.
                if self._reader.is_staging:
                    shards = self._shards_ahead(rank_batch)
                    self._reader.prepare(shards)
                count = len(rank_batch.sample_ids_B)
                for first in range(0, count, self._micro):
                    behind = first + self._micro
                    piece = slice(first, behind)
                    encoded = self._read(rank_batch, piece)
                    # Only whole global batches move the cursor: a step is never resumed half-way.
                    end = None
                    if behind >= count:
                        end = rank_batch.end
                    work = _Work(encoded, rank_batch.start, end)
                    with self.stats.waiting("read"):
                        self._encoded.put(work)
        except ChannelClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must meet it
            self._encoded.fail(error)

    def _read(self, rank_batch: RankBatch, piece: slice) -> Encoded:
        ids_B = rank_batch.sample_ids_B[piece]
        epochs_B = rank_batch.epochs_B[piece]
        with self.stats.busy("read", items=self._micro), self._naming("read", ids_B):
            encoded = self._source.fetch(ids_B, epochs_B)
        num_bytes = sum(image.size for image in encoded.images)
        self.stats.add("read", num_bytes=num_bytes)
        return encoded

    def _recycle(self, work: _Work) -> None:
        """Let the buffers of a batch that is handed over be used again when the caller can no
        longer look at it."""
        self._lent.append(work.buffers)
        # Batches that are the decoded pixels themselves stay valid while the next one is in use.
        num_kept = 0
        if self._copier.keeps_pixels:
            num_kept = 2
        while len(self._lent) > num_kept:
            buffers = self._lent.popleft()
            for pool, buffer_BHW3 in zip(self._buffers, buffers, strict=True):
                if buffer_BHW3 is not None:
                    pool.give_back(buffer_BHW3)

    def _decode_ahead(self) -> None:
        # A decoder's batches are waited for in the order in which they were submitted.
        under_way: deque[tuple[_Work, list[Pending]]] = deque()
        # Of several views the one that holds least sets the pace.
        depth = min(decoder.depth for decoder in self._decoders)
        try:
            while True:
                # Finished work is not held back for a read that is slow.
                while not under_way or (len(under_way) < depth and len(self._encoded)):
                    with self.stats.waiting("decode"):
                        work = self._encoded.get()
                    pending = self._begin_decode(work)
                    under_way.append((work, pending))
                work, pending = under_way.popleft()
                self._end_decode(work, pending)
                self._decoded.put(work)
        except ChannelClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must meet it
            self._decoded.fail(error)
        finally:
            # What still writes into buffers must be over before they are let go.
            for _, pending in under_way:
                for wait in pending:
                    with suppress(Exception):
                        wait()

    def _begin_decode(self, work: _Work) -> list[Pending]:
        """Start to decode every view of a batch."""
        encoded = work.encoded
        pending = []
        with self.stats.busy("decode"), self._naming("decode", encoded.sample_ids_B):
            views = zip(self._decoders, self._buffers, encoded.boxes, strict=True)
            for decoder, pool, boxes in views:
                # A decoder on the GPU allocates its own output there.
                buffer_BHW3 = None
                if decoder.device.type == "cpu":
                    buffer_BHW3 = pool.take()
                work.buffers.append(buffer_BHW3)
                decoding = decoder.submit(encoded.images, boxes, buffer_BHW3)
                pending.append(decoding)
        return pending

    def _end_decode(self, work: _Work, pending: list[Pending]) -> None:
        """Wait for a batch's views and start their copies to the device."""
        ids_B = work.encoded.sample_ids_B
        num_bytes = 0
        with self.stats.busy("decode", items=len(ids_B)), self._naming("decode", ids_B):
            decoded = [wait() for wait in pending]
            # Before the copy: a substitute is written into the host's memory.
            views = self._source.replace_bad(
                work.encoded, decoded, self._decoders, self.report
            )
            for number, pixels_BHW3 in enumerate(views):
                on_device_BHW3, copied = self._copier.begin(pixels_BHW3)
                work.pixels.append(on_device_BHW3)
                num_bytes += pixels_BHW3.numel()
                # A buffer that a device copies from goes back now, with the event that ends the
                # copy; one that is itself handed out goes back in `_recycle`.
                buffer_BHW3 = work.buffers[number]
                if buffer_BHW3 is not None and copied is not None:
                    self._buffers[number].give_back(buffer_BHW3, after=copied)
                    work.buffers[number] = None
        self.stats.add("decode", num_bytes=num_bytes)

    def _shards_ahead(self, rank_batch: RankBatch) -> list[int]:
        """List the shards that are read now, then those that each lane comes to one shard later."""
        num_samples = self._order.num_samples
        # Positions of all epochs on one line, so that a batch may look into the next epoch.
        epoch_starts_B = rank_batch.epochs_B * num_samples
        now_B = epoch_starts_B + rank_batch.positions_B
        # Neighbours of a lane lie as many positions apart as there are lanes.
        num_shards = self._dataset.info.num_shards
        samples_per_shard = max(1, num_samples // num_shards)
        distance = self._order.lanes * samples_per_shard
        later_B = now_B + distance
        shards: list[int] = []
        for absolute_B in (now_B, later_B):
            epochs_B, positions_B = np.divmod(absolute_B, num_samples)
            for epoch in np.unique(epochs_B):
                order = self._order.epoch(int(epoch))
                of_epoch = positions_B[epochs_B == epoch]
                shards += order.shards_ahead(of_epoch).tolist()
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
            shards: set[str] = set()
            for shard in shards_B.tolist():
                shards.add(self._dataset.shard_name(shard))
            first_shards = sorted(shards)[:_NAMED]
            names = ", ".join(first_shards)
            raise DataError(
                f"loader: the {stage} thread failed ({type(error).__name__}: {error}) on samples "
                f"{sample_ids_B.tolist()} of {names}. Read them alone with "
                "pipeline.loader.read_samples, or check the "
                "shards with pipeline.verify --full"
            ) from error


def build_decoders(
    sampling: Sampling,
    settings: LoaderConfig,
    *,
    max_batch_size: int,
    local_world_size: int = 1,
    device: torch.device,
) -> list[Decoder]:
    """Build a decoder for each view; see `build_decoder`."""
    decoders: list[Decoder] = []
    try:
        for view in sampling.views:
            decoder = build_decoder(
                settings,
                view=view.settings,
                max_batch_size=max_batch_size,
                local_world_size=local_world_size,
                device=device,
            )
            decoders.append(decoder)
    # One that cannot be built must not leave the threads of those before it behind.
    except BaseException:
        for decoder in decoders:
            decoder.close()
        raise
    return decoders


def open_reader(dataset: Manifest, settings: LoaderConfig) -> ShardReader:
    """Open the reader that the settings of a loader ask for."""
    cache_dir = None
    if settings.cache_dir:
        cache_dir = Path(storage.expand_home(settings.cache_dir))
    cache_bytes = int(settings.cache_size_gib * 2**30)
    return ShardReader(
        dataset,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
        verify_hashes=settings.verify_hashes,
    )
