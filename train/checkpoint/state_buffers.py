"""A rank's share of the training state in host memory, laid out as the files of a checkpoint will
be.

The tensors are copied once, from the device into the very bytes that are hashed and written. The
memory is kept from save to save: taking it anew costs more than filling it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from train.engine.named_state import KINDS, NamedTensor

_VALUE_BYTES = 4
_HEADER_ALIGNMENT = 8


def safetensors_header(
    tensors: Iterable[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Lay out fp32 tensors one after the other as a safetensors file.

    Args:
        tensors: names and shapes, in the order of their bytes.
        metadata: strings for the reader.

    Returns:
        What comes before the tensors' bytes; a multiple of 8 bytes long, so that these are aligned.

    Source: the safetensors format: header length in 8 little-endian bytes, JSON padded with spaces,
        data.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in tensors:
        start = end
        end += _VALUE_BYTES * math.prod(shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [start, end],  # from the end of the header
        }
    document = json.dumps(header, separators=(",", ":"))
    text = document.encode()
    # Readers map the file: fp32 values must begin at a multiple of their size.
    num_missing = -len(text) % _HEADER_ALIGNMENT
    text += b" " * num_missing
    length = len(text).to_bytes(8, "little")
    return length + text


class StateBuffers:
    """Host memory for this rank's share of one checkpoint.

    Args:
        table: all tensors of the model.
        part: number of this rank's share.
        device: where the tensors come from; memory for a GPU's is pinned, so that they are copied
            at full speed.
    """

    def __init__(
        self,
        table: Iterable[NamedTensor],
        *,
        part: int,
        device: torch.device,
    ) -> None:
        mine = [tensor for tensor in table if tensor.part == part]
        self._bytes: dict[str, Tensor] = {}
        self._places: dict[tuple[str, str], Tensor] = {}
        is_cuda = device.type == "cuda"
        for kind in KINDS:
            of_kind = [tensor for tensor in mine if kind in tensor.kinds]
            tensors = [(tensor.name, tensor.shape) for tensor in of_kind]
            # A share of frozen tensors alone has no moments, and then no file of them.
            if tensors:
                self._lay_out(kind, tensors, pinned=is_cuda)

    def _lay_out(
        self, kind: str, tensors: list[tuple[str, tuple[int, ...]]], *, pinned: bool
    ) -> None:
        header = safetensors_header(tensors, {"kind": kind})
        header_bytes = len(header)
        num_values = sum(math.prod(shape) for _, shape in tensors)
        size_bytes = header_bytes + _VALUE_BYTES * num_values
        content = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        # frombuffer wants memory that may be written to, which bytes are not.
        writable = bytearray(header)
        content[:header_bytes] = torch.frombuffer(writable, dtype=torch.uint8)
        self._bytes[kind] = content

        # The same order as in the header: a tensor's place is its offset there.
        start = header_bytes
        for name, shape in tensors:
            end = start + _VALUE_BYTES * math.prod(shape)
            of_tensor = content[start:end]
            values = of_tensor.view(torch.float32)
            self._places[name, kind] = values.view(shape)
            start = end

    def place(
        self,
        name: str,
        kind: str,
        tensor: Tensor,
    ) -> Tensor:
        """Copy one tensor to where it belongs; from a GPU the copy is only queued.

        Args:
            name: dotted name in the model.
            kind: weight, exp_avg or exp_avg_sq.
            tensor: whole, of any floating type.

        Returns:
            The copy.
        """
        place = self._places[name, kind]
        source = tensor.detach()
        return place.copy_(source, non_blocking=True)

    def files(self) -> dict[str, memoryview]:
        """Give the bytes of each kind's file; a kind of which this rank has no tensor is left
        out."""
        files = {}
        for kind, content in self._bytes.items():
            # A view: the file is written from the memory that the tensors were copied to.
            array = content.numpy()
            files[kind] = array.data
        return files

    @property
    def size_bytes(self) -> int:
        """Host memory held."""
        # One byte an element.
        contents = self._bytes.values()
        return sum(content.numel() for content in contents)
