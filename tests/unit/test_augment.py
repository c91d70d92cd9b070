"""Boxes stay inside their images, follow the published distribution, and depend only on what names
them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ViewConfig
from pipeline.sampling.boxes import draw_boxes

images = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20
)


def boxes_of(images_B, view=ViewConfig(), seed=0, epoch=0, first_id=0):  # noqa: B008
    sizes = np.array(images_B)
    ids = np.arange(len(sizes)) + first_id
    return draw_boxes(
        view,
        seed=seed,
        epochs_B=np.full(len(ids), epoch),
        sample_ids_B=ids,
        widths_B=sizes[:, 0],
        heights_B=sizes[:, 1],
    )


def plain_random_resized_crop(rng, width, height):
    """One box the way the recipe words it, with a stateful generator."""
    for _ in range(10):
        area = width * height * rng.uniform(0.2, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    raise AssertionError("a 4:3 image always finds a box in this test")


@given(
    images,
    st.sampled_from(["random", "center"]),
    st.integers(0, 2**50),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_boxes_lie_inside_their_images(images_B, crop, seed, height, width):
    boxes = boxes_of(
        images_B, ViewConfig(crop=crop, height=height, width=width), seed=seed
    )
    sizes = np.array(images_B)
    assert (boxes.tops_B >= 0).all()
    assert (boxes.lefts_B >= 0).all()
    assert (boxes.heights_B >= 1).all()
    assert (boxes.widths_B >= 1).all()
    assert (boxes.tops_B + boxes.heights_B <= sizes[:, 1]).all()
    assert (boxes.lefts_B + boxes.widths_B <= sizes[:, 0]).all()


@given(images, st.integers(0, 100))
def test_a_box_does_not_depend_on_its_batch(images_B, epoch):
    together = boxes_of(images_B, epoch=epoch)
    alone = boxes_of(images_B[-1:], epoch=epoch, first_id=len(images_B) - 1)
    last = together.take(slice(-1, None))
    assert (last.tops_B, last.lefts_B, last.heights_B, last.widths_B) == (
        alone.tops_B,
        alone.lefts_B,
        alone.heights_B,
        alone.widths_B,
    )
    assert last.flips_B.tolist() == alone.flips_B.tolist()


def test_area_aspect_place_and_flip_follow_the_recipe():
    boxes = boxes_of([(4000, 3000)] * 20_000)
    areas = boxes.heights_B.astype(float) * boxes.widths_B / 12e6
    log_aspects = np.log(boxes.widths_B / boxes.heights_B)
    rng = np.random.default_rng(0)
    plain_B4 = np.array(
        [plain_random_resized_crop(rng, 4000, 3000) for _ in range(20_000)]
    )
    plain_areas = plain_B4[:, 2] * plain_B4[:, 3] / 12e6
    plain_log_aspects = np.log(plain_B4[:, 3] / plain_B4[:, 2])
    # Deciles of 20,000 draws of one distribution differ by less than this.
    deciles = np.arange(0.1, 1, 0.1)
    assert np.allclose(
        np.quantile(areas, deciles), np.quantile(plain_areas, deciles), atol=0.015
    )
    assert np.allclose(
        np.quantile(log_aspects, deciles),
        np.quantile(plain_log_aspects, deciles),
        atol=0.015,
    )
    assert areas.min() > 0.199
    assert areas.max() <= 1.0
    free = (4000 - boxes.widths_B) > 500
    places = boxes.lefts_B[free] / (4000 - boxes.widths_B[free])
    assert abs(places.mean() - 0.5) < 0.01
    assert abs(places.std() - 12**-0.5) < 0.01
    assert abs(boxes.flips_B.mean() - 0.5) < 0.02


def test_an_image_too_thin_for_any_box_gets_the_centred_one():
    boxes = boxes_of([(1000, 10)])
    assert (boxes.widths_B[0], boxes.heights_B[0]) == (13, 10)
    assert boxes.lefts_B[0] == (1000 - 13) // 2


def test_center_takes_the_largest_box_of_the_aspect_and_never_flips():
    boxes = boxes_of(
        [(500, 375), (375, 500), (8, 8)],
        ViewConfig(crop="center", height=100, width=200),
    )
    assert list(zip(boxes.widths_B, boxes.heights_B, strict=True)) == [
        (500, 250),
        (375, 188),
        (8, 4),
    ]
    assert not boxes.flips_B.any()
