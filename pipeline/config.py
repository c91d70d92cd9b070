"""Settings of datasets, views and loaders. Imports neither torch nor DALI, so that they can be
checked at once."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means of ImageNet-1k in [0, 1], RGB; the constants every published MAE used."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel standard deviations of ImageNet-1k in [0, 1], RGB."""


class Settings(BaseModel):
    """Base of every group of settings: typed, immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ViewConfig(Settings):
    """How one view of an image is cut out: which box, which size, flipped or not.

    The defaults are those of MAE pre-training (He et al. 2022, appendix A.1): a random resized crop
    of 20-100% of the area, aspect 3/4 to 4/3, bicubic, and a horizontal flip.
    """

    crop: Literal["random", "center"] = "random"
    """`random`: random resized crop. `center`: the largest centred box of the output's aspect,
    never flipped."""
    height: int = Field(default=224, ge=1)
    """Output height in pixels."""
    width: int = Field(default=224, ge=1)
    """Output width in pixels."""
    min_area: float = Field(default=0.2, gt=0, le=1)
    """Smallest share of the image's area that a random box covers."""
    max_area: float = Field(default=1.0, gt=0, le=1)
    """Largest share of the image's area that a random box covers."""
    min_aspect: float = Field(default=3 / 4, gt=0)
    """Smallest width / height of a random box."""
    max_aspect: float = Field(default=4 / 3, gt=0)
    """Largest width / height of a random box."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    """Chance of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear", "area"] = "bicubic"
    """Resize filter, antialiased when shrinking. Not every decoder offers every filter."""

    @model_validator(mode="after")
    def _ordered(self) -> ViewConfig:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area} is above max_area {self.max_area}")
        if self.min_aspect > self.max_aspect:
            raise ValueError(f"min_aspect {self.min_aspect} is above max_aspect {self.max_aspect}")
        return self


class OrderConfig(Settings):
    """How samples are shuffled. Part of what a run sees: changing it changes the order."""

    lanes: int = Field(default=256, ge=1)
    """Pieces the epoch's line of samples is cut into; fixed for a run, independent of the cluster's
    size."""
    window: int = Field(default=4, ge=0)
    """Shards of a lane that are permuted together, sample by sample. 0 means all of the lane's
    shards."""
    remainder: Literal["fill", "drop"] = "fill"
    """What happens where a global batch does not divide the dataset: `fill` the epoch's last batch
    from the next epoch's order, or `drop` the samples that are left."""


class LoaderConfig(Settings):
    """How batches are read and decoded. Never changes which samples, boxes or flips a run sees."""

    decoder: Literal["auto", "dali", "turbo", "ffcv"] = "auto"
    """`dali`: NVIDIA DALI, on the GPU when there is one. `turbo`: threads over libjpeg-turbo and
    torch's and OpenCV's resize kernels. `ffcv`: threads over FFCV's kernels, filter `area` only.
    Each reads tars and betons. `auto`: what `tuning_file` says, else DALI on a CUDA device and
    turbo on a CPU (docs/benchmarks/loaders.md)."""
    tuning_file: str = ""
    """TOML file of `python -m pipeline.bench URI --tune`: what it found best on this machine
    decides `decoder` where that is `auto`, and `num_threads`, `dali_depth` and `hw_decoder_load`
    where they are 0."""
    num_threads: int = Field(default=0, ge=0)
    """Decoding threads of one rank. 0 means the cores this process may use, divided by the ranks on
    this node."""
    prefetch_batches: int = Field(default=3, ge=1)
    """Micro-batches that are decoded ahead of the one in use."""
    dali_depth: int = Field(default=0, ge=0, le=16)
    """Batches in DALI's hands at once. 0 means the tuning file's, or 2."""
    hw_decoder_load: float = Field(default=0.0, ge=0, le=1)
    """Share of the JPEGs that a GPU's own JPEG engine decodes for DALI; the rest is decoded by its
    cores. 0 means the tuning file's, or DALI's own 0.65."""
    verify_hashes: Literal["off", "on"] = "off"
    """`on`: check each sample's bytes against the manifest's hash before decoding."""
    cache_dir: str = ""
    """Local folder for shards of remote datasets. Empty: a folder under the user's cache
    directory."""
    cache_size_gib: float = Field(default=64.0, gt=0)
    """Space the cache may take before it evicts, in GiB."""
    max_pixels: int = Field(default=178_956_970, ge=1)
    """Images that declare more pixels than this are replaced, not decoded. The default is Pillow's
    bomb limit x 2."""
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    """Encoded images larger than this are replaced, not decoded."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Share of bad samples among the last 10,000 above which the run stops."""
    max_bad_in_a_row: int = Field(default=64, ge=1)
    """Consecutive bad samples after which the run stops."""
