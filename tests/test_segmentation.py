"""evaluate/segmentation.py: its figures against scikit-learn's, and in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semflow_jax.data.info import VOID
from semflow_jax.evaluate.segmentation import confusion_matrix, scores

NUM = 6
NAMES = tuple(f"class {i}" for i in range(NUM))


def make_labels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted ids, half of which agree; some classes are in one of them only, or in none; some void."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(NUM)
    label, other = (rng.choice(ids[:num], (2, 9, 11, 1)).astype(np.uint8) for num in rng.integers(1, NUM, 2))
    prediction = np.where(rng.random(label.shape) < 0.5, label, other)
    return np.where(rng.random(label.shape) < 0.2, np.uint8(VOID), label), prediction


def count(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    return np.asarray(confusion_matrix(jnp.asarray(label), jnp.asarray(prediction), NUM))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_as_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    label, prediction = make_labels(seed)
    matrix = count(label, prediction)
    found = scores(matrix, NAMES)
    true, guess = label[label != VOID], prediction[label != VOID]
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(true, guess, labels=range(NUM)))
    assert found["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(true, guess))
    assert found["miou"] == pytest.approx(metrics.jaccard_score(true, guess, average="macro"))
    assert found["frequency_weighted_iou"] == pytest.approx(metrics.jaccard_score(true, guess, average="weighted"))
    recall = metrics.recall_score(true, guess, labels=np.unique(true), average="macro")
    assert found["mean_accuracy"] == pytest.approx(recall)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, NUM - 1))
def test_foreground_as_scikit_learn(seed, background):
    metrics = pytest.importorskip("sklearn.metrics")
    label, prediction = make_labels(seed)
    found = scores(count(label, prediction), NAMES, background)
    true, guess = label[label != VOID], prediction[label != VOID]
    there = np.setdiff1d(np.union1d(true, guess), background)
    if not there.size:
        assert np.isnan(found["foreground_miou"])
        return
    assert found["foreground_miou"] == pytest.approx(metrics.jaccard_score(true, guess, labels=there, average="macro"))
    fore = true != background
    if not fore.any():
        assert np.isnan(found["foreground_pixel_accuracy"]) and np.isnan(found["foreground_mean_accuracy"])
        return
    weighted = metrics.jaccard_score(true, guess, labels=there, average="weighted")
    assert found["foreground_frequency_weighted_iou"] == pytest.approx(weighted)
    assert found["foreground_pixel_accuracy"] == pytest.approx((true == guess)[fore].mean())
    recall = metrics.recall_score(true, guess, labels=np.setdiff1d(true, background), average="macro")
    assert found["foreground_mean_accuracy"] == pytest.approx(recall)


def test_in_closed_form():
    """Background, 6 of 8 found; one thing that takes 1 of it and loses 1 to it; one that is lost to the first."""
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 2, 0]])
    found = scores(matrix, NAMES[:3], background=0)
    assert found["class_iou"] == {"class 0": 6 / 9, "class 1": 3 / 8, "class 2": 0}
    expected = {
        "miou": (6 / 9 + 3 / 8) / 3,
        "pixel_accuracy": 9 / 14,
        "mean_accuracy": (6 / 8 + 3 / 4) / 3,
        "frequency_weighted_iou": (8 * 6 / 9 + 4 * 3 / 8) / 14,
        "foreground_miou": (3 / 8 + 0) / 2,  # with the 2 pixels of background in the first thing's union
        "foreground_pixel_accuracy": 3 / 6,
        "foreground_mean_accuracy": (3 / 4 + 0) / 2,
        "foreground_frequency_weighted_iou": 4 * 3 / 8 / 6,
    }
    assert {name: found[name] for name in found if name != "class_iou"} == pytest.approx(expected)
    assert not [name for name in scores(matrix, NAMES[:3]) if name.startswith("foreground")]


def test_without_a_pixel():
    found = scores(np.zeros((2, 2), int), NAMES[:2], background=1)
    assert found.pop("class_iou") == {"class 0": None, "class 1": None}
    assert len(found) == 8 and all(np.isnan(x) for x in found.values())


def test_counts_beyond_32_bits():
    found = scores(np.array([[3, 1], [0, 4]]) * 2**40, NAMES[:2])
    assert found["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2) and found["pixel_accuracy"] == 7 / 8
