"""Everything that is random about an image: fixed values, views that share a box, views that do
not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import ViewConfig
from pipeline.sampling.draws import MaskNoise, Sampling, View, as_sampling
from pipeline.sampling.philox import MAX_VIEW, Purpose, random_words

SEED = 20260101
EPOCHS = np.array([0, 0, 0, 0, 3, 1])
IDS = np.array([0, 1, 2, 3, 12345, 2**40 + 7])
SIZES = {
    "widths_B": [640, 500, 64, 1000, 4000, 50],
    "heights_B": [480, 375, 64, 10, 300, 700],
}


def boxes_of(sampling: Sampling) -> list[dict[str, list[int]]]:
    views = sampling.draw_boxes(seed=SEED, epochs_B=EPOCHS, sample_ids_B=IDS, **SIZES)
    return [
        {name: column.tolist() for name, column in vars(view).items()} for view in views
    ]


def test_what_a_masked_autoencoder_draws_never_changes():
    """Values of the first version that drew them: a run started then goes on with the same ones."""
    sampling = Sampling((View(ViewConfig()),), {"mask_noise": MaskNoise(5)})
    arrays = sampling.draw_arrays(seed=SEED, epochs_B=EPOCHS, sample_ids_B=IDS)
    assert list(arrays) == ["mask_noise"]
    assert arrays["mask_noise"].dtype == np.float32
    assert (arrays["mask_noise"] * 2**24).astype(np.int64).tolist() == [
        [9665618, 3341071, 6804509, 7845201, 4987310],
        [5680130, 4724401, 15123875, 4582507, 5087197],
        [12962405, 14964273, 11081891, 7253773, 10687100],
        [11131909, 4925402, 15134753, 12762308, 4748761],
        [3015858, 13416432, 16117137, 3825232, 1158647],
        [2202756, 7672867, 184895, 14296125, 12125108],
    ]
    assert boxes_of(sampling) == [
        {
            "tops_B": [21, 15, 2, 0, 0, 316],
            "lefts_B": [246, 107, 2, 493, 1800, 0],
            "heights_B": [447, 318, 62, 10, 300, 67],
            "widths_B": [346, 308, 51, 13, 400, 50],
            "flips_B": [False, False, True, True, False, False],
        }
    ]


def test_mask_noise_is_uniform_and_named_by_seed_epoch_sample_and_view():
    def draw(seed: int, epoch: int, ids: np.ndarray, view: int = 0) -> np.ndarray:
        epochs_B = np.full(len(ids), epoch)
        return MaskNoise(97, view=view).draw(
            seed=seed, epochs_B=epochs_B, sample_ids_B=ids
        )

    noise_BN = draw(7, 0, np.arange(200))
    assert noise_BN.shape == (200, 97)
    assert abs(noise_BN.mean() - 0.5) < 0.01
    alone = np.array([150])
    assert np.array_equal(draw(7, 0, alone)[0], noise_BN[150])
    for other in (draw(7, 1, alone), draw(8, 0, alone), draw(7, 0, alone, view=1)):
        assert not np.isin(other[0], noise_BN[150]).any()


def test_views_of_one_number_share_a_box_and_views_of_two_do_not():
    tokens = ViewConfig(height=112, width=112)
    beit = boxes_of(Sampling((View(ViewConfig()), View(tokens))))
    assert beit[0] == beit[1]
    moco = boxes_of(Sampling((View(ViewConfig(), 0), View(ViewConfig(), 1))))
    assert moco[0] == beit[0]
    assert moco[0]["lefts_B"] != moco[1]["lefts_B"]
    assert moco[0]["flips_B"] != moco[1]["flips_B"]


def test_held_out_images_are_cut_in_the_middle_in_every_view():
    sampling = Sampling(
        (View(ViewConfig(), 0), View(ViewConfig(), 1)), {"mask_noise": MaskNoise(4)}
    )
    first, second = boxes_of(sampling.centred())
    assert first == second
    assert first["lefts_B"][0] == (640 - 480) // 2
    assert not any(first["flips_B"])
    assert sampling.centred().draws == sampling.draws


def test_purposes_and_views_never_share_a_word():
    """Purpose and view stand side by side in eight bits each of one counter word."""
    assert all(0 < purpose < 256 for purpose in Purpose)
    words = {
        random_words(
            seed=1, purpose=purpose, epochs_n=0, streams_n=5, num_blocks=1, view=view
        ).tobytes()
        for purpose in Purpose
        for view in (0, 1, MAX_VIEW - 1)
    }
    assert len(words) == 3 * len(Purpose)
    for view in (-1, MAX_VIEW):
        with pytest.raises(ValueError, match="outside"):
            random_words(
                seed=1,
                purpose=Purpose.CROP,
                epochs_n=0,
                streams_n=5,
                num_blocks=1,
                view=view,
            )


def test_the_settings_of_a_view_stand_for_it_alone():
    assert as_sampling(ViewConfig(height=32)) == Sampling(
        (View(ViewConfig(height=32)),)
    )
    with pytest.raises(ValueError, match="at least one"):
        Sampling(())
