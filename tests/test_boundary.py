"""evaluate/boundary.py: counts against erosions of one mask at a time by SciPy and OpenCV, and in closed form."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semflow_jax.data.info import VOID
from semflow_jax.evaluate.boundary import boundary_counts, boundary_iou, boundary_width
from semflow_jax.evaluate.segmentation import class_iou, confusion_matrix

NUM = 4
SHAPE = (2, 13, 18, 1)
counts_fn = jax.jit(boundary_counts, static_argnums=(2, 3))


def make_labels(seed: int, cell: int = 4, shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted ids in patches, mostly the same; some void."""
    rng = np.random.default_rng(seed)
    _, h, w, _ = shape

    def patches(values) -> np.ndarray:
        coarse = rng.choice(values, (shape[0], -(-h // cell), -(-w // cell), 1))
        return coarse.repeat(cell, 1).repeat(cell, 2)[:, :h, :w].astype(np.uint8)

    label = patches([0, 1, 2])  # no 3
    prediction = np.where(rng.random((*shape[:3], 1)) < 0.9, np.roll(label, 1, axis=2), patches([0, 1, 2]))
    return np.where(patches([0, 0, 0, 1]), np.uint8(VOID), label), prediction


def erode_scipy(mask: np.ndarray, width: int) -> np.ndarray:
    return ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width, border_value=0)


def erode_opencv(mask: np.ndarray, width: int) -> np.ndarray:
    ring = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return cv2.erode(ring, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1] > 0


def count(label: np.ndarray, prediction: np.ndarray, width: int, erode) -> np.ndarray:
    """One class of one image at a time."""
    found = np.zeros((NUM, 2), int)
    for true, guess in zip(label[..., 0], prediction[..., 0], strict=True):
        for c in range(NUM):
            regions = [m & ~erode(m, width) for m in (true == c, (guess == c) & (true != VOID))]
            found[c] += np.logical_and(*regions).sum(), np.logical_or(*regions).sum()
    return found


@pytest.mark.parametrize("erode", [erode_scipy, erode_opencv])
@pytest.mark.parametrize("width", [1, 2, 5, 30])
def test_as_erosions(erode, width):
    for seed in range(4):
        label, prediction = make_labels(seed)
        found = counts_fn(label, prediction, NUM, width)
        assert jnp.issubdtype(found.dtype, jnp.integer)
        np.testing.assert_array_equal(found, count(label, prediction, width, erode))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([1, 3]))
def test_properties(seed, cell, width):
    label, prediction = make_labels(seed, cell)
    both, either = counts_fn(label, prediction, NUM, width).T
    assert (both >= 0).all() and (both <= either).all() and either.sum() <= 2 * (label != VOID).sum()
    # What is predicted in void never matters: not there, and not to masks beside it.
    other = np.where(label == VOID, np.uint8(seed % NUM), prediction)
    np.testing.assert_array_equal(counts_fn(label, other, NUM, width), np.stack([both, either], -1))
    right = np.where(label == VOID, prediction, label)
    both, either = counts_fn(label, right, NUM, width).T
    np.testing.assert_array_equal(both, either)
    # Neither does which of the two is called true, where there is no void.
    known = np.where(label == VOID, np.uint8(0), label)
    np.testing.assert_array_equal(counts_fn(known, prediction, NUM, width), counts_fn(prediction, known, NUM, width))


def test_a_width_beyond_all_masks_is_plain_iou():
    label, prediction = make_labels(0)
    matrix = np.asarray(confusion_matrix(jnp.asarray(label), jnp.asarray(prediction), NUM))
    found = boundary_iou(np.asarray(counts_fn(label, prediction, NUM, 30)), tuple("abcd"))
    iou = class_iou(matrix)
    np.testing.assert_array_equal([found["boundary_class_iou"][name] for name in "abc"], iou[:3])
    assert found["boundary_class_iou"]["d"] is None
    assert found["boundary_miou"] == pytest.approx(iou[:3].mean())


def test_squares_in_closed_form():
    """A square of 8 pixels, found 2 pixels to the right; regions 1 wide. The image's own border bounds the ground."""
    label, prediction = np.zeros((2, 1, 20, 20, 1), np.uint8)
    label[0, 6:14, 4:12] = 1
    prediction[0, 6:14, 6:14] = 1
    found = np.asarray(counts_fn(label, prediction, 2, 1))
    ring = 8**2 - 6**2
    # The two rings share 6 pixels of either horizontal side; their vertical sides meet no side of the other.
    assert found[1].tolist() == [2 * 6, 2 * ring - 2 * 6]
    border, around = 20**2 - 18**2, 10**2 - 8**2
    # Around them, the ground's: 8 of either horizontal side; and the image's border.
    assert found[0].tolist() == [border + 2 * 8, border + 2 * around - 2 * 8]


def test_void_alone():
    label, prediction = np.full((1, 5, 5, 1), VOID, np.uint8), np.ones((1, 5, 5, 1), np.uint8)
    counts = np.asarray(counts_fn(label, prediction, 2, 1))
    assert not counts.any()
    assert np.isnan(boundary_iou(counts, ("a", "b"))["boundary_miou"])


def test_254_classes():
    label = jnp.full((1, 4, 4, 1), 253, jnp.uint8)
    counts = counts_fn(label, label, 254, 1)
    assert counts[253].tolist() == [12, 12] and counts.sum() == 24


def test_memory_does_not_grow_with_classes():
    shape = jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.uint8)
    two, many = (
        counts_fn.lower(shape, shape, num, 3).compile().memory_analysis().temp_size_in_bytes for num in (2, 171)
    )
    assert many < 1.05 * two


def test_width():
    assert [boundary_width(*size) for size in ((512, 512), (1024, 2048), (64, 64), (8, 8))] == [14, 46, 2, 1]
    assert boundary_width(1024, 2048, 0.005) == 11
