"""Which decoder serves a run, and how many threads it gets."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from pipeline.config import LoaderConfig, ViewConfig
from pipeline.decoders.base import Decoder


def build_decoder(
    settings: LoaderConfig, *, view: ViewConfig, max_batch_size: int, num_threads: int, device: torch.device
) -> Decoder:
    """Build the decoder that `loader.decoder` names.

    `auto` takes DALI on a CUDA device where it is installed and has the filter: the GPU decodes. On a CPU it takes
    turbo, which needs less than half of DALI's CPU time for bicubic pixels (docs/benchmarks/loaders.md).

    Raises:
        ConfigError: the decoder is not installed, or lacks the filter that the view asks for.
    """
    has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    fits = has_dali and device.type == "cuda" and view.interpolation != "area"
    if settings.decoder == "dali" or (settings.decoder == "auto" and fits):
        # DALI takes a second to import: only where it is used.
        from pipeline.decoders.dali import DaliDecoder

        return DaliDecoder(view=view, max_batch_size=max_batch_size, num_threads=num_threads, device=device)
    from pipeline.decoders.turbo import TurboDecoder

    return TurboDecoder(view=view, num_threads=num_threads)


def threads_of_rank(settings: LoaderConfig, *, local_world_size: int) -> int:
    """Return the decoding threads of one rank: as set, or its part of the cores this process may use."""
    if settings.num_threads:
        return settings.num_threads
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)
