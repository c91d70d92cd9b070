"""Which decoder serves a run, and what it gets: threads, depth, share of the JPEG engine."""

from __future__ import annotations

import os

import torch

from pipeline.config import LoaderConfig, ViewConfig
from pipeline.decoders.base import Decoder
from pipeline.decoders.tuning import is_installed, read_tuning

DALI_DEPTH = 2
"""Batches in DALI's hands unless the settings say otherwise."""
HW_DECODER_LOAD = 0.65
"""DALI's own default for the GPU's JPEG engine."""


def build_decoder(
    settings: LoaderConfig,
    *,
    view: ViewConfig,
    max_batch_size: int,
    local_world_size: int,
    device: torch.device,
) -> Decoder:
    """Build the decoder that `loader.decoder` names.

    `auto` takes what the tuning file names, if there is one. Otherwise it takes DALI on a CUDA
    device if DALI is installed and has the filter: the GPU decodes. On a CPU it takes turbo,
    which needs less than half of DALI's CPU time for bicubic pixels (docs/benchmarks/loaders.md).

    Args:
        settings: what is asked for.
        view: output size and filter.
        max_batch_size: most images per batch.
        local_world_size: ranks that share this machine's cores.
        device: device on which the pixels are wanted.

    Raises:
        ConfigError: the decoder is not installed, or lacks the filter that the view asks for; the
            tuning file cannot be read or is another machine's.
    """
    settings = with_tuning(settings, device=device)
    num_threads = threads_of_rank(settings, local_world_size=local_world_size)
    on_gpu = device.type == "cuda"
    has_filter = view.interpolation != "area"
    fits = on_gpu and has_filter and is_installed("nvidia.dali")
    takes_dali = settings.decoder == "auto" and fits
    if settings.decoder == "dali" or takes_dali:
        # DALI takes a second to import, which a run on another decoder does not pay.
        from pipeline.decoders.dali import DaliDecoder

        return DaliDecoder(
            view=view,
            max_batch_size=max_batch_size,
            num_threads=num_threads,
            device=device,
            depth=settings.dali_depth or DALI_DEPTH,
            hw_decoder_load=settings.hw_decoder_load or HW_DECODER_LOAD,
        )
    # Only by name or by a tuning file: its pixels differ by a level or two from the others'.
    if settings.decoder == "ffcv":
        from pipeline.decoders.ffcv import FfcvDecoder

        return FfcvDecoder(view=view, num_threads=num_threads)
    from pipeline.decoders.turbo import TurboDecoder

    return TurboDecoder(view=view, num_threads=num_threads)


def with_tuning(settings: LoaderConfig, *, device: torch.device) -> LoaderConfig:
    """Fill in from the tuning file what the settings leave open.

    Raises:
        ConfigError: the file cannot be read, or was written on another kind of machine.
    """
    if not settings.tuning_file:
        return settings
    tuned = read_tuning(settings.tuning_file, device=device)
    # What is set goes before what was tuned, setting by setting; 0 and "auto" mean "not set".
    decoder = settings.decoder
    if decoder == "auto":
        decoder = tuned.decoder
    update = {
        "decoder": decoder,
        "num_threads": settings.num_threads or tuned.num_threads,
        "dali_depth": settings.dali_depth or tuned.dali_depth,
        "hw_decoder_load": settings.hw_decoder_load or tuned.hw_decoder_load,
    }
    return settings.model_copy(update=update)


def threads_of_rank(settings: LoaderConfig, *, local_world_size: int) -> int:
    """Return the decoding threads of one rank: as set, or its part of the cores this process may
    use."""
    if settings.num_threads:
        return settings.num_threads
    # Not os.cpu_count: a container or a launcher may give this process fewer cores.
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // local_world_size)
