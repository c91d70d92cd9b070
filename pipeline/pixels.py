"""From decoded bytes to what the model eats: the copy to the device, and normalising there.

Shapes: B images, C H W channels, height and width.
"""

from __future__ import annotations

import torch

from pipeline.config import IMAGENET_MEAN, IMAGENET_STD


class DeviceCopier:
    """Move uint8 pixels to the device ahead of need, and normalise them there.

    On a CUDA device the copy runs on a stream of its own from pinned memory, so that it overlaps the step before.

    Args:
        device: where images are wanted.
        dtype: their type.
    """

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        std_13 = torch.tensor(IMAGENET_STD, dtype=torch.float64)
        # (x / 255 - mean) / std in one multiply and one add.
        self._scale_C11 = (1 / (255 * std_13)).to(device, torch.float32)[:, None, None]
        self._shift_C11 = (-torch.tensor(IMAGENET_MEAN, dtype=torch.float64) / std_13).to(device, torch.float32)[
            :, None, None
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, pixels_BHW3: torch.Tensor) -> torch.Tensor:
        """Start the copy to the device; called by the thread that decodes."""
        if self._stream is None or pixels_BHW3.device == self._device:
            return pixels_BHW3
        with torch.cuda.stream(self._stream):
            return pixels_BHW3.pin_memory().to(self._device, non_blocking=True)

    def normalise(self, pixels_BHW3: torch.Tensor) -> torch.Tensor:
        """Give images of shape (B, C, H, W) with ImageNet's mean and standard deviation taken out.

        Computed in float32 whatever the type asked for; the layout in memory stays channels-last.
        """
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            pixels_BHW3.record_stream(current)
        images_BCHW = pixels_BHW3.permute(0, 3, 1, 2).to(torch.float32)
        return images_BCHW.mul_(self._scale_C11).add_(self._shift_C11).to(self._dtype)
