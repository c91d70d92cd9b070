"""Some samples, once: for replaying a batch, for pictures and for held-out measurements.

Shapes: B images.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from pipeline.config import LoaderConfig, ViewConfig
from pipeline.dataset.manifest import Manifest
from pipeline.loader.batch import Batch, labels_and_draws
from pipeline.loader.data_report import DataReport
from pipeline.loader.loader import build_decoders, open_reader
from pipeline.loader.samples import SampleSource
from pipeline.loader.transfer import DeviceCopier
from pipeline.sampling.draws import Sampling, as_sampling
from pipeline.sampling.philox import I64


def read_samples(
    dataset: Manifest,
    sample_ids_B: I64,
    sampling: Sampling | ViewConfig,
    settings: LoaderConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Read some samples once, as a run with this seed would see them in this epoch.

    Args:
        dataset: an open dataset.
        sample_ids_B: which samples.
        sampling: what is cut out of and drawn for each image; the settings of a view stand for
            that view alone.
        settings: how they are read and decoded.
        seed: key of the run.
        epoch: of all samples.
        device: of the batch.
        dtype: type of the images; uint8 gives the pixels as they are decoded.

    Returns:
        The samples in the order asked for.
    """
    ids_B = np.asarray(sample_ids_B, dtype=np.int64)
    epochs_B = np.full_like(ids_B, epoch)
    sampling = as_sampling(sampling)
    # The loader's own parts, without its threads: what differed from a run would be no replay.
    with contextlib.ExitStack() as opened:
        reader = open_reader(dataset, settings)
        opened.callback(reader.close)
        decoders = build_decoders(
            sampling, settings, max_batch_size=max(len(ids_B), 1), device=device
        )
        for decoder in decoders:
            opened.callback(decoder.close)

        source = SampleSource(
            dataset, reader, sampling=sampling, settings=settings, seed=seed
        )
        encoded = source.fetch(ids_B, epochs_B)
        # No share of bad samples is too large here: a replay is asked for to look at them.
        report = DataReport(max_bad_share=1.0)
        decoded = source.decode(encoded, decoders, report)

        # Pixels are taken out of the decoders' memory before these are closed.
        copier = DeviceCopier(device=device, dtype=dtype)
        views = []
        for pixels_BHW3 in decoded:
            on_device_BHW3, _ = copier.begin(pixels_BHW3)
            views.append(copier.normalise(on_device_BHW3))
    labels_B, draws = labels_and_draws(encoded, device)
    return Batch(
        views_BCHW=tuple(views),
        labels_B=labels_B,
        sample_ids_B=ids_B,
        epochs_B=epochs_B,
        boxes=encoded.boxes,
        epoch=epoch,
        draws=draws,
    )
