"""Settings of datasets, views and loaders. Imports neither torch nor DALI, so that they can be
checked at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.options import (
    Area,
    Aspect,
    Count,
    CountOrOff,
    DaliDepth,
    Lanes,
    LocalText,
    Parallel,
    Pixels,
    Share,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means of ImageNet-1k in [0, 1], RGB; the constants every published MAE used."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel standard deviations of ImageNet-1k in [0, 1], RGB."""


class Settings(BaseModel):
    """Base of every group of settings: typed, immutable, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        # Neither is a length, a rate or a size of anything, and TOML writes them in its own way.
        allow_inf_nan=False,
    )


class ViewConfig(Settings):
    """How one view of an image is cut out: which box, which size, flipped or not.

    The defaults are those of MAE pre-training (He et al. 2022, appendix A.1): a random resized crop
    of 20-100% of the area, aspect 3/4 to 4/3, bicubic, and a horizontal flip.
    """

    # The defaults stand in published results: a change makes other runs out of old commands.
    crop: Literal["random", "center"] = "random"
    """`random`: a random resized crop. `center`: the largest centred box with the output's aspect,
    never flipped."""
    height: Pixels = 224
    """Output height in pixels."""
    width: Pixels = 224
    """Output width in pixels."""
    min_area: Area = 0.2
    """Smallest share of the image's area that a random crop covers."""
    max_area: Area = 1.0
    """Largest share of the image's area that a random crop covers."""
    min_aspect: Aspect = 3 / 4
    """Smallest width / height of a random crop."""
    max_aspect: Aspect = 4 / 3
    """Largest width / height of a random crop."""
    flip_probability: Share = 0.5
    """Probability of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear", "area"] = "bicubic"
    """Resize filter, antialiased when it shrinks. `dali` has no `area`; `ffcv` has only `area`."""

    @model_validator(mode="after")
    def _ordered(self) -> ViewConfig:
        # Equal is fine: boxes of one size.
        if self.min_area > self.max_area:
            raise ValueError(
                f"min_area {self.min_area} is above max_area {self.max_area}"
            )
        if self.min_aspect > self.max_aspect:
            raise ValueError(
                f"min_aspect {self.min_aspect} is above max_aspect {self.max_aspect}"
            )
        return self


class OrderConfig(Settings):
    """How samples are shuffled. A change of these settings changes the order that a run sees."""

    # Every field decides which image comes when; train/settings/resume_rules.py refuses changes.
    lanes: Lanes = 256
    """Pieces that the epoch's line of samples is cut into. Keep it fixed during a run; it does not
    depend on the size of the cluster."""
    window: CountOrOff = 4
    """How many shards of a lane are shuffled together, sample by sample. 0: all of the lane's
    shards."""
    remainder: Literal["fill", "drop"] = "fill"
    """What to do if the global batch size does not divide the dataset. `fill`: complete the epoch's
    last batch with the first samples of the next epoch. `drop`: skip the samples that are left."""


class LoaderConfig(Settings):
    """How batches are read and decoded. The samples, crop boxes and flips do not depend on it."""

    # No value here may change a sample, a box or a flip: resumes with other values rely on it.
    decoder: Literal["auto", "dali", "turbo", "ffcv"] = "auto"
    """`dali`: NVIDIA DALI, on the GPU if there is one. `turbo`: CPU threads that call
    libjpeg-turbo and the resize kernels of torch and OpenCV. `ffcv`: CPU threads that call FFCV's
    kernels, for the filter `area` only. Each of them reads tars and betons. `auto`: the decoder
    that `tuning_file` names; without a file DALI on a CUDA device and turbo on a CPU
    (docs/benchmarks/loaders.md)."""
    tuning_file: LocalText = ""
    """TOML file that `python -m pipeline.bench URI --tune` wrote on this machine. It decides
    `decoder` if that is `auto`, and each of `num_threads`, `dali_depth` and `hw_decoder_load` that
    is 0."""
    num_threads: Parallel = 0
    """Decoding threads per rank. 0: the cores that this process may use, divided by the ranks on
    this node."""
    prefetch_batches: Annotated[int, Field(ge=1, le=1024)] = 3
    """How many micro-batches to decode ahead of the one in use."""
    dali_depth: DaliDepth = 0
    """How many batches DALI works on at once. 0: the number in the tuning file, or 2."""
    hw_decoder_load: Share = 0.0
    """Share of the JPEGs that DALI gives to the JPEG engine of the GPU; the GPU's cores decode the
    others. 0: the share in the tuning file, or DALI's default of 0.65."""
    verify_hashes: Literal["off", "on"] = "off"
    """`on`: compare the bytes of every sample with the hash in the manifest before decoding."""
    cache_dir: LocalText = ""
    """Local folder for shards of remote datasets. Empty: a folder in the user's cache directory."""
    cache_size_gib: Annotated[float, Field(gt=0, le=1e9)] = 64.0
    """Disk space in GiB that the cache may take before it evicts shards."""
    max_pixels: Count = 178_956_970
    """Largest number of pixels that an image's header may declare. Larger images are replaced, not
    decoded. The default is twice the limit at which Pillow warns of a decompression bomb."""
    max_bytes: Count = 256 * 2**20
    """Largest encoded image in bytes. Larger images are replaced, not decoded."""
    max_bad_share: Share = 0.01
    """Stop the run if more than this share of the last 10,000 samples was bad."""
    max_bad_in_a_row: Count = 64
    """Stop the run after this many bad samples in a row."""
