"""Philox against published vectors, a plain implementation, and numpy's own at 64-bit words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampling.philox import (
    Purpose,
    permutation,
    philox4x32,
    random_words,
    unit_float32,
)

WIDTHS = {
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: (
        (0xD2E7470EE14C6C93, 0xCA5A826395121157),
        (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
    ),
}


def plain_philox(counter: list[int], key: list[int], width: int) -> list[int]:
    """Ten rounds on Python integers, for either word width, as the paper's figure describes
    them."""
    multipliers, weyl = WIDTHS[width]
    mask = (1 << width) - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = multipliers[0] * c[0], multipliers[1] * c[2]
        c = [
            (p1 >> width) ^ c[1] ^ k[0],
            p1 & mask,
            (p0 >> width) ^ c[3] ^ k[1],
            p0 & mask,
        ]
        k = [(k[i] + weyl[i]) & mask for i in range(2)]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(
    counter: list[int], key: list[int], expected: list[int]
) -> None:
    counters = tuple(np.array([word], dtype=np.uint64) for word in counter)
    assert [
        int(word[0]) for word in philox4x32(counters, key[0] | key[1] << 32)
    ] == expected


def test_plain_implementation_is_numpys_at_64_bits() -> None:
    numpy_philox = np.random.Philox(counter=[4, 3, 2, 1], key=[7, 9])
    # numpy adds one to the counter before the first block.
    assert numpy_philox.random_raw(4).tolist() == plain_philox([5, 3, 2, 1], [7, 9], 64)


words32 = st.integers(0, 2**32 - 1)


@given(
    st.lists(words32, min_size=4, max_size=4), st.lists(words32, min_size=2, max_size=2)
)
def test_vectorised_is_the_plain_one(counter: list[int], key: list[int]) -> None:
    counters = tuple(np.array([word], dtype=np.uint64) for word in counter)
    ours = [int(word[0]) for word in philox4x32(counters, key[0] | key[1] << 32)]
    assert ours == plain_philox(counter, key, 32)


def test_a_draw_depends_on_all_that_names_it_and_on_nothing_else() -> None:
    def draw(
        seed: int = 1, purpose: Purpose = Purpose.CROP, epoch: int = 2, stream: int = 3
    ) -> list[int]:
        return random_words(
            seed=seed, purpose=purpose, epochs_n=epoch, streams_n=stream, num_blocks=2
        )[0].tolist()

    others = [
        draw(seed=2),
        draw(seed=1 + 2**32),
        draw(purpose=Purpose.FLIP),
        draw(epoch=3),
        draw(stream=3 + 2**32),
    ]
    assert all(draw() != other for other in others)
    together = random_words(
        seed=1, purpose=Purpose.CROP, epochs_n=[9, 2], streams_n=[5, 3], num_blocks=2
    )
    assert together[1].tolist() == draw()
    later = random_words(
        seed=1,
        purpose=Purpose.CROP,
        epochs_n=2,
        streams_n=3,
        num_blocks=1,
        first_block=1,
    )
    assert later[0].tolist() == draw()[4:]


@pytest.mark.parametrize(("epoch", "stream"), [(0, 2**48), (2**32, 0)])
def test_counters_never_wrap(epoch: int, stream: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        random_words(
            seed=0, purpose=Purpose.CROP, epochs_n=epoch, streams_n=stream, num_blocks=1
        )


@given(st.integers(0, 3000), st.integers(0, 2**63), st.integers(0, 100))
def test_permutation_holds_every_number_once(count: int, seed: int, epoch: int) -> None:
    order = permutation(count, seed=seed, purpose=Purpose.SHARDS, epoch=epoch)
    assert sorted(order.tolist()) == list(range(count))


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        order = permutation(5, seed=3, purpose=Purpose.SHARDS, epoch=epoch)
        counts[np.arange(5), order] += 1
    # 25 cells of 400 expected; chi-square with 16 degrees of freedom is above 39.3 once in a
    # thousand seeds.
    assert ((counts - 400) ** 2 / 400).sum() < 39.3


def test_float32_never_reaches_one() -> None:
    units = unit_float32(np.array([0, 2**32 - 1], dtype=np.uint32))
    assert units[0] == 0
    assert units[1] < 1
