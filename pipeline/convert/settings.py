"""What a conversion makes: the one list of settings, with help, limits and defaults.

The command line, docs/configuration.md and the Python interface all come from this model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from pipeline.images.header import ScreenLimits
from pipeline.options import MAX_COUNT, MAX_SIDE_PX, Count, Pixels
from pipeline.sources.listing import SourceSettings

Container = Literal["webdataset", "ffcv"]
WriteMode = Literal["jpg", "raw", "smart"]
LEAST_SIDE_PX = 8
"""Smallest side that an image may be shrunk to: below it there is no picture left to learn from."""
OPTION_NAMES = {
    "shard_size_bytes": "shard_size",
    "smart_threshold_bytes": "smart_threshold",
}
"""Settings with another name on the command line, where the text brings its own unit."""

# Written as text so that help shows the sizes as a user types them; pydantic turns them into bytes.
_SHARD_SIZE: Any = "256MB"
_SMART_THRESHOLD: Any = "256KiB"


class ConvertSettings(SourceSettings):
    """What a conversion makes. All but `strict` shapes the bytes, and must stay the same for an
    interrupted conversion to continue.

    The plan does not record how labels and images are found in the source: the listing shows it.
    """

    # The plan file lists the settings in this order: moving a field orphans unfinished conversions.
    format: Container = "webdataset"
    """Container of the shards: `webdataset` writes tars, `ffcv` writes betons."""
    write_mode: WriteMode = "jpg"
    """For `ffcv`. `jpg`: store JPEG files, unchanged unless they are resized. `raw`: store pixels.
    `smart`: store pixels if they take at most `smart_threshold_bytes`, JPEG otherwise."""
    smart_threshold_bytes: ByteSize = Field(
        default=_SMART_THRESHOLD, ge=0, le=MAX_COUNT
    )
    """For `ffcv` with `smart`: largest image that is stored raw, as its size in pixels
    (height x width x 3 bytes), for example 256KiB."""
    shard_size_bytes: ByteSize = Field(default=_SHARD_SIZE, ge=1, le=MAX_COUNT)
    """Target size per shard, for example 256MB or 1GiB; an estimate if images are resized. Not used
    if `samples_per_shard` is given."""
    samples_per_shard: Count | None = None
    """Images per shard, instead of a size."""
    resize: Pixels | None = None
    """Shrink larger images to this many pixels on the shorter side, upright and in sRGB (EXIF
    orientation and colour profile are applied). None: store images as they are."""
    max_resolution: int | None = Field(default=None, ge=LEAST_SIDE_PX, le=MAX_SIDE_PX)
    """Shrink larger images to this many pixels on the longer side, as FFCV does. None: no limit."""
    quality: int = Field(
        default=90,
        ge=1,
        le=100,
    )
    """JPEG quality of images that are shrunk."""
    apply_exif: bool = False
    """Without --resize and --max-resolution images are stored as they are: neither their EXIF
    orientation nor their colour profile is applied, and decoders do not apply them either. This
    turns images as their orientation says, if that loses nothing: JPEGs whose size divides into
    whole blocks, PNGs, lossless WebPs. Others stay as they are and are listed in
    not_upright.parquet. Colour profiles are applied only with --resize or --max-resolution."""
    shuffle_seed: int | None = Field(
        default=0,
        ge=0,
        lt=2**64,
    )
    """Seed of the order in which images are stored. None: sorted by name. A dataset as the source
    keeps its order."""
    split: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")
    """Name of the dataset, and the first part of the shards' names."""
    limit: Count | None = None
    """Convert only the first images of the stored order. None: all images."""
    stats: bool = False
    """Decode every stored image and write stats.json: mean and deviation of the pixels, sizes, and
    images per class."""
    strict: bool = False
    """Stop with exit code 3 at the first image that cannot be used. Default: leave it out and list
    it in rejected.parquet."""
    limits: ScreenLimits = ScreenLimits()
    """Images above these limits are left out."""

    @field_validator("shuffle_seed", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        """Accept the word `none`, which a command line cannot write in another way."""
        is_none = isinstance(value, str) and value.strip().lower() == "none"
        return None if is_none else value

    @field_validator("split")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value == "manifest":
            raise ValueError(
                "'manifest' is the name of the index files; choose another"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ConvertSettings:
        if self.resize is not None and self.resize < LEAST_SIDE_PX:
            raise ValueError(
                f"resize {self.resize} leaves no picture to learn from; expected at least "
                f"{LEAST_SIDE_PX} pixels"
            )
        if self.format != "ffcv" and self.write_mode != "jpg":
            raise ValueError(f"write_mode {self.write_mode!r} is for the format ffcv")
        return self

    @property
    def turns(self) -> bool:
        """Whether images that are stored as files are turned; shrunk ones are upright anyway."""
        return self.apply_exif and not self.resizes

    @property
    def resizes(self) -> bool:
        """Whether images are shrunk."""
        return self.resize is not None or self.max_resolution is not None

    def describe(self) -> dict[str, Any]:
        """Return what shapes the bytes, for the plan; settings that do not apply are left out."""
        # How images are found shows in the listing, whose digest is in the plan.
        left_out = set(SourceSettings.model_fields) - {"labels"} | {"strict"}
        # A setting that is newer than plan version 1 appears only if it is used: a conversion that
        # an older version began keeps its identity.
        if not self.stats:
            left_out.add("stats")
        if not self.turns:
            left_out.add("apply_exif")
        if self.max_resolution is None:
            left_out.add("max_resolution")
        if self.format != "ffcv":
            left_out.add("write_mode")
        if self.write_mode != "smart":
            left_out.add("smart_threshold_bytes")
        return self.model_dump(mode="json", exclude=left_out)
