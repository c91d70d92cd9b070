"""From decoded bytes to what the model eats: host buffers, the copy to the device, and normalising
there.

Shapes: B images, C H W channels, height and width.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from pipeline.config import IMAGENET_MEAN, IMAGENET_STD


class PixelBuffers:
    """Memory for decoded batches on the host, used again and again; pinned if a CUDA device
    copies from it.

    New memory for each batch would be cleared page by page by the kernel, which takes a tenth of
    the time that small images need. A buffer must be given back; one that is not is simply not used
    again.

    Args:
        shape_BHW3: of each buffer, uint8.
        pinned: whether a device copies from them.
    """

    def __init__(self, shape_BHW3: tuple[int, int, int, int], *, pinned: bool) -> None:
        self._shape = shape_BHW3
        self._pinned = pinned
        # Appending and popping are atomic: one thread takes, another may give back.
        self._free: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def take(self) -> Tensor:
        """Return a buffer whose last use is over, or a new one."""
        try:
            buffer_BHW3, copied = self._free.popleft()
        except IndexError:
            return torch.empty(
                self._shape,
                dtype=torch.uint8,
                pin_memory=self._pinned,
            )
        # The device may still be reading it; by now, several batches later, it rarely is.
        if copied is not None:
            copied.synchronize()
        return buffer_BHW3

    def give_back(
        self, buffer_BHW3: Tensor, *, after: torch.cuda.Event | None = None
    ) -> None:
        """Let a buffer be used again, once an event has passed if one is given."""
        self._free.append((buffer_BHW3, after))


class DeviceCopier:
    """Move uint8 pixels to the device ahead of need, and normalise them there.

    On a CUDA device the copy runs on a stream of its own from pinned memory, so that it overlaps
    the step before.

    Args:
        device: of the images.
        dtype: their type; uint8 leaves the pixels as they are.
    """

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        std_3 = torch.tensor(IMAGENET_STD, dtype=torch.float64)
        # (x / 255 - mean) / std in one multiply and one add.
        # Divided in float64, and rounded once: float32 would round each of the three steps.
        mean_3 = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)
        scale_3 = 1 / (255 * std_3)
        shift_3 = -mean_3 / std_3
        scale_C = scale_3.to(device, torch.float32)
        shift_C = shift_3.to(device, torch.float32)
        self._scale_C11 = scale_C[:, None, None]
        self._shift_C11 = shift_C[:, None, None]
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)

    @property
    def keeps_pixels(self) -> bool:
        """Whether the images are the decoded pixels themselves, not a copy of them."""
        return self._dtype == torch.uint8 and self._stream is None

    def begin(self, pixels_BHW3: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start the copy to the device; called by the thread that decodes.

        Returns:
            The pixels on the device, and what to wait for before the host's memory is written
            again.
        """
        if self._stream is None or pixels_BHW3.device == self._device:
            return pixels_BHW3, None
        with torch.cuda.stream(self._stream):
            # From memory that is not pinned CUDA copies in two steps, and this thread waits.
            if not pixels_BHW3.is_pinned():
                pixels_BHW3 = pixels_BHW3.pin_memory()
            on_device_BHW3 = pixels_BHW3.to(self._device, non_blocking=True)
            copied = self._stream.record_event()
            return on_device_BHW3, copied

    def normalise(self, pixels_BHW3: Tensor) -> Tensor:
        """Give images of shape (B, C, H, W) with ImageNet's mean and standard deviation taken out.

        Computed in float32 whatever the type asked for; the layout in memory stays channels-last.
        """
        if self._stream is not None:
            # The step's stream waits for the copy, not this thread. And the allocator must know
            # that a second stream reads this memory, or it gives it to the next copy too early.
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            pixels_BHW3.record_stream(current)
        pixels_BCHW = pixels_BHW3.permute(0, 3, 1, 2)
        if self._dtype == torch.uint8:
            return pixels_BCHW
        if self._stream is not None:
            return scale_fused(
                pixels_BCHW, self._scale_C11, self._shift_C11, self._dtype
            )
        # On a CPU the fused form converts through temporaries and takes half as long again.
        images_BCHW = pixels_BCHW.to(torch.float32)
        images_BCHW.mul_(self._scale_C11)
        images_BCHW.add_(self._shift_C11)
        return images_BCHW.to(self._dtype)


def scale_fused(
    pixels_BCHW: Tensor, scale_C11: Tensor, shift_C11: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute pixels * scale + shift in float32 and round to a type, in one kernel on a CUDA
    device."""
    images_BCHW = torch.empty_like(pixels_BCHW, dtype=dtype)
    return torch.addcmul(shift_C11, pixels_BCHW, scale_C11, out=images_BCHW)
