"""Do the ranks still hold the same weights? A memory error on one accelerator shows nowhere else.

Up to ZeRO 2 every rank keeps all working weights, and they must be equal to the last bit. At ZeRO 3
each rank keeps its own part, so there are no two copies to compare.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from train.errors import NumericsError
from train.process.world import World

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22
"""Elements that are summed at a time: 64 MB of 64-bit integers beside the weights."""
_NAMES_SHOWN = 3


@torch.no_grad()
def checksums(module: nn.Module) -> tuple[list[str], Tensor]:
    """Sum up the bits of every parameter and buffer on its device, without synchronising.

    Integer sums are exact in any order, so two replicas agree if their bits do. A single flipped
    bit always changes the sum; the factor by place also tells values that have changed places.

    Args:
        module: the model, with whole weights.

    Returns:
        Names, and one 64-bit sum for each.
    """
    names: list[str] = []
    sums: list[Tensor] = []
    parameters = module.named_parameters()
    buffers = module.named_buffers()
    for name, tensor in itertools.chain(parameters, buffers):
        # Bits and not values: NaN differs from itself, and 0 equals -0.
        as_integer = _INTEGERS[tensor.element_size()]
        bits = tensor.detach().contiguous().flatten().view(as_integer)
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for first in range(0, bits.numel(), _CHUNK):
            piece = bits[first : first + _CHUNK]
            part = piece.to(torch.int64)
            end = first + part.numel()
            indices = torch.arange(first, end, device=part.device)
            # Odd factors have an inverse modulo 2^64: no change of one value can vanish.
            factors = 2 * indices + 1
            total += (part * factors).sum()
        names.append(name)
        sums.append(total)
    return names, torch.stack(sums)


def find_differing(sums: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Compare the sums of all ranks.

    Args:
        sums: per rank, one sum a tensor.

    Returns:
        The tensors that differ, and the ranks that are alone with their value: those outside the
        majority of all ranks. Without a majority, as between two ranks, none is named.
    """
    columns = []
    for tensor in range(len(sums[0])):
        values = {of_rank[tensor] for of_rank in sums}
        if len(values) > 1:
            columns.append(tensor)
    if not columns:
        return [], []

    # Ranks vote with all of their weights: one that differs in two tensors is one culprit.
    ballots = [tuple(of_rank) for of_rank in sums]
    votes = Counter(ballots)
    majority, count = votes.most_common(1)[0]
    # Half of the ranks are no more likely to be right than the other half.
    if 2 * count <= len(sums):
        return columns, []
    culprits = []
    for rank, ballot in enumerate(ballots):
        if ballot != majority:
            culprits.append(rank)
    return columns, culprits


def check_replicas(module: nn.Module, *, world: World, step: int) -> None:
    """Compare the weights of all ranks; all call it together, at ZeRO 0 to 2.

    Args:
        module: the unwrapped model.
        world: the processes of the run.
        step: for the message.

    Raises:
        NumericsError: on every rank: they differ.
    """
    if world.world_size == 1:
        return
    names, sums = checksums(module)
    # The only wait for the device: all sums come back in one copy.
    own_sums = sums.tolist()
    own_device = world.device_name()
    gathered = world.gather((own_sums, own_device))
    all_sums = [of_rank for of_rank, _ in gathered]
    tensors, ranks = find_differing(all_sums)
    if not tensors:
        return

    # Every rank has the same sums by now, so all of them raise, and none waits for another.
    shown = [names[tensor] for tensor in tensors[:_NAMES_SHOWN]]
    num_more = len(tensors) - len(shown)
    what = ", ".join(shown)
    if num_more:
        what += f" and {num_more} more"
    who = f"the {world.world_size} ranks differ and no majority tells which is right"
    if ranks:
        devices = [device for _, device in gathered]
        culprits = [f"rank {rank} ({devices[rank]})" for rank in ranks]
        who = f"{', '.join(culprits)} differs from the others"
    raise NumericsError(
        f"step {step}: the weights are not equal on all ranks: {who} in {what}. A memory error, or "
        "a collective that failed silently. Check that device (dmesg, nvidia-smi -q -d ECC) or "
        "leave its node out; the same command goes on from the last checkpoint. "
        "guard.checksum_every_steps 0 would switch this check off"
    )
