"""A counter-based random generator: every draw is a pure function of what it is for.

Philox-4x32-10 maps a 128-bit counter and a 64-bit key to 128 random bits, with no state. The
counter names the draw (purpose, view, epoch, sample or stream, block), the key is the seed, so any
draw of any run can be repeated alone, in any order, on any number of processes.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Shapes: n draws, k blocks of four words.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
# Multipliers and Weyl constants of Philox-4x32 (Salmon et al. 2011, table 2 and section 4.3).
_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = 0x9E3779B9
_W1 = 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
MAX_STREAM = 2**48
"""Streams (sample ids, positions) that one purpose can tell apart."""
MAX_EPOCH = 2**32
"""Epochs that one seed can tell apart."""
MAX_VIEW = 2**8
"""Views of one image that one purpose can tell apart."""


class Purpose(IntEnum):
    """What a draw is for, 1 to 255. The numbers are part of what a run sees and never change.

    6 was given once and never used; a new purpose starts at 7.
    """

    SHARDS = 1
    WINDOW = 2
    CROP = 3
    FLIP = 4
    MASK = 5


def philox4x32(
    counters_4n: tuple[U64, U64, U64, U64], key: int
) -> tuple[U64, U64, U64, U64]:
    """Apply the ten rounds of Philox-4x32 to many counters at once.

    Args:
        counters_4n: four arrays of 32-bit words (held as uint64), least significant word first;
            broadcast together.
        key: 64-bit key.

    Returns:
        Four arrays of 32-bit words held as uint64, of the broadcast shape.
    """
    c0, c1, c2, c3 = counters_4n
    k0 = key & 0xFFFFFFFF
    k1 = (key >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        # Words of 32 bits are held in 64, so that a product keeps its high half.
        product0 = c0 * _M0
        product1 = c2 * _M1
        # The even words are read above, so they may be replaced one after the other here.
        c0 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c1 = product1 & _LOW
        c2 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c3 = product0 & _LOW
        # Python's integers do not wrap by themselves.
        k0 = (k0 + _W0) & 0xFFFFFFFF
        k1 = (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(
    *,
    seed: int,
    purpose: Purpose,
    epochs_n: npt.ArrayLike,
    streams_n: npt.ArrayLike,
    num_blocks: int,
    first_block: int = 0,
    view: int = 0,
) -> U32:
    """Draw the same words for the same (seed, purpose, view, epoch, stream, block), whoever asks.

    Args:
        seed: 64-bit key of the run.
        purpose: what the draw is for; purposes never share random words.
        epochs_n: epoch of each draw, in [0, 2^32).
        streams_n: sample id or other number of each draw, in [0, 2^48).
        num_blocks: blocks of four 32-bit words a stream.
        first_block: number of the first block.
        view: which view of an image the draw is for, in [0, 256).

    Returns:
        uint32 array of shape (n, 4 * num_blocks).
    """
    # Through int64: a negative number becomes a huge unsigned one, and is refused below.
    signed_streams = np.asarray(streams_n, dtype=np.int64)
    streams = np.atleast_1d(signed_streams).astype(np.uint64)
    signed_epochs = np.asarray(epochs_n, dtype=np.int64)
    epoch_of_each = np.broadcast_to(signed_epochs, streams.shape)
    epochs = epoch_of_each.astype(np.uint64)
    # Beyond these limits fields of the counter would run into each other, and draws that mean
    # different things would share words.
    largest_stream = int(streams.max(initial=0))
    if largest_stream >= MAX_STREAM:
        raise ValueError(f"stream {largest_stream} is outside [0, 2^48)")
    largest_epoch = int(epochs.max(initial=0))
    if largest_epoch >= MAX_EPOCH:
        raise ValueError(f"epoch {largest_epoch} is outside [0, 2^32)")
    if not 0 <= view < MAX_VIEW:
        raise ValueError(f"view {view} is outside [0, 256)")
    # The counter's third word: 16 high bits of the stream, 8 of the purpose, 8 of the view. View 0
    # leaves the word as it was before there were views, so that older runs go on unchanged.
    view_bits = view << 24
    purpose_bits = int(purpose) << 16
    kind = np.uint64(view_bits | purpose_bits)
    end_block = first_block + num_blocks
    blocks = np.arange(first_block, end_block, dtype=np.uint64)
    blocks_1k = blocks[None, :]
    low_n = streams & _LOW
    high_n = (streams >> _SHIFT) | kind
    low_n1 = low_n[:, None]
    high_n1 = high_n[:, None]
    epochs_n1 = epochs[:, None]
    words = philox4x32((blocks_1k, low_n1, high_n1, epochs_n1), seed)
    out_nk4 = np.empty((streams.size, num_blocks, 4), dtype=np.uint32)
    for word in range(4):
        out_nk4[:, :, word] = words[word]
    return out_nk4.reshape(streams.size, num_blocks * 4)


def unit_float64(words: U32) -> npt.NDArray[np.float64]:
    """Map 32-bit words to float64 in [0, 1), 2^-32 apart."""
    return words.astype(np.float64) * 2.0**-32


def unit_float32(words: U32) -> npt.NDArray[np.float32]:
    """Map 32-bit words to float32 in [0, 1), 2^-24 apart, so that rounding never gives 1."""
    # As many bits as a float32 holds exactly.
    high_bits = words >> np.uint32(8)
    spacing = np.float32(2.0**-24)
    return high_bits.astype(np.float32) * spacing


def permutation(
    count: int, *, seed: int, purpose: Purpose, epoch: int, stream: int = 0
) -> I64:
    """Permute [0, count) as a pure function of the arguments.

    Sorts random 64-bit keys whose low bits carry the index: equal keys cannot occur, so that the
    result does not depend on the sorting algorithm, and numpy's vectorised sort can be used.

    Returns:
        int64 array of shape (count,).
    """
    if count <= 1:
        return np.zeros(max(count, 0), dtype=np.int64)
    # Two words make a key, so a block of four holds two.
    num_blocks = (count + 1) // 2
    words_1k = random_words(
        seed=seed,
        purpose=purpose,
        epochs_n=epoch,
        streams_n=stream,
        num_blocks=num_blocks,
    )
    words = words_1k.ravel()
    keys = words.view(np.uint64)[:count]

    # In place from here: for the runs of a large dataset these are the largest arrays of the order.
    index_bits = (count - 1).bit_length()
    num_indices = 1 << index_bits
    index_mask = np.uint64(num_indices - 1)
    keys &= ~index_mask
    # Not kept under a name: it would take as much memory as the keys while they are sorted.
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= index_mask
    return keys.view(np.int64)
