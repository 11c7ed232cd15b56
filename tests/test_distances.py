"""evaluate/distances.py: equal to torch-fidelity where that is stable, right where it is not."""

import numpy as np
import pytest
from test_inception import import_reference

from semflow_jax.errors import UserError
from semflow_jax.evaluate.distances import Moments, frechet_distance, kernel_distance, precision_recall


def make_pair(num=(80, 70), dim=16, seed=0):
    """Two sets of correlated features with means and spreads of their own."""
    rng = np.random.default_rng(seed)
    return [rng.normal(0.3, 1, (n, dim)) @ rng.normal(0, 1, (dim, dim)) + rng.normal(0, 1, dim) for n in num]


def moments(x):
    return Moments.empty(x.shape[1]).add(x)


def frechet(x, y):
    return frechet_distance(moments(x), moments(y))


def frechet_of_features(x, y):
    """Without covariances: the root's trace is the nuclear norm of the products of all pairs of deviations."""
    a, b = (z - z.mean(0) for z in (x, y))
    m, n = len(a) - 1, len(b) - 1
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt(m * n)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() / m + np.square(b).sum() / n - 2 * root


def test_frechet_equals_torch_fidelity():
    torch = pytest.importorskip("torch")
    reference = import_reference("torch_fidelity.metric_fid")
    x, y = make_pair()
    stats = [reference.fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
    expected = reference.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_gaussians():
    """In closed form: covariances that commute, and means."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b, shift = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6), rng.normal(size=6)
    gaussians = [
        Moments(11, mean, axes @ np.diag(spread) @ axes.T * 10) for mean, spread in ((np.zeros(6), a), (shift, b))
    ]
    expected = shift @ shift + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(*reversed(gaussians)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num", [(5, 5), (9, 40), (63, 64), (2, 300)])
def test_frechet_of_few_images(num):
    """Singular covariances: the same as from the features themselves."""
    x, y = make_pair(num, dim=64)
    assert frechet(x, y) == pytest.approx(frechet_of_features(x, y), rel=1e-10)


def test_frechet_of_features_that_are_constant_or_copies():
    x, y = make_pair((200, 200), dim=8)
    still = [np.concatenate([z, z, np.ones((200, 3))], axis=1) for z in (x, y)]  # every feature twice, and three still
    assert frechet(*still) == pytest.approx(2 * frechet(x, y), rel=1e-9)
    one = np.ones((3, 8))
    assert frechet(one, one + 2) == pytest.approx(32)


@pytest.mark.parametrize("num", [7, 200])
def test_frechet_of_a_set_and_itself(num):
    (x,) = make_pair((num,), dim=32)
    scale = np.trace(moments(x).covariance)
    assert 0 <= frechet(x, x[::-1]) <= 1e-12 * scale


def test_moments_do_not_depend_on_batches():
    (x,) = make_pair((101,))
    x = x + 1e6  # raw sums of squares would lose most digits
    whole = moments(x)
    np.testing.assert_allclose(whole.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-15)
    for cuts in ([1, 2, 50], [100], [0, 0, 30, 60, 90], range(1, 101)):
        one_by_one, processes = Moments.empty(16), [Moments.empty(16) for _ in range(3)]
        for i, part in enumerate(np.split(x, list(cuts))):
            one_by_one = one_by_one.add(part)
            processes[i % 3] = processes[i % 3].add(part)
        for found in (one_by_one, processes[2].merge(processes[0]).merge(processes[1])):
            assert found.num == 101
            np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-14)
            np.testing.assert_allclose(found.scatter, whole.scatter, rtol=1e-8, atol=1e-6)


def test_moments_take_float32_and_add_in_float64():
    (x,) = make_pair((50,))
    found = moments(x.astype(np.float32))
    assert (found.mean.dtype, found.scatter.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float32).T), rtol=1e-12, atol=1e-12)


def test_one_image_has_no_covariance():
    with pytest.raises(UserError, match="at least 2 images, found 1"):
        frechet(np.ones((1, 4)), np.ones((5, 4)))


@pytest.mark.parametrize(("num", "size"), [((80, 70), 30), ((80, 70), 70), ((60, 60), 60)])
def test_kernel_equals_torch_fidelity(num, size):
    torch = pytest.importorskip("torch")
    reference = import_reference("torch_fidelity.metric_kid")
    x, y = make_pair(num)
    expected = reference.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=10, kid_subset_size=size, rng_seed=7, verbose=False
    )
    found = kernel_distance(x, y, num_subsets=10, subset_size=size, seed=7)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9, abs=1e-9 * found.mean)
    assert found.subset_size == size
    assert found.num_subsets == (1 if num == (60, 60) else 10)  # subsets of all are alike


def test_kernel_of_few_images():
    x, y = make_pair((12, 9))
    found = kernel_distance(x, y)
    assert (found.num_subsets, found.subset_size) == (100, 9)
    assert kernel_distance(x[:9], y) == kernel_distance(x[:9], y, num_subsets=1, subset_size=9)
    with pytest.raises(UserError, match="at least 2 images a set, found 1"):
        kernel_distance(x, y[:1])


def test_kernel_by_hand():
    """From the definition, pair by pair."""
    x, y = make_pair((4, 4), dim=3)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    def within(z):
        return np.mean([kernel(z[i], z[j]) for i in range(4) for j in range(4) if i != j])

    expected = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y).mean == pytest.approx(expected, rel=1e-12)


def test_kernel_is_unbiased():
    """Two sets of one distribution: 0 in the mean, however small they are. The Frechet distance is far from it."""
    rng = np.random.default_rng(0)
    pairs = [rng.normal(size=(2, 8, 4)) for _ in range(600)]
    found = np.array([kernel_distance(x, y).mean for x, y in pairs])
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found))
    assert (found < 0).any()
    assert np.mean([frechet(x, y) for x, y in pairs[:20]]) > 1


def test_precision_and_recall_equal_torch_fidelity():
    torch = pytest.importorskip("torch")
    reference = import_reference("torch_fidelity.metric_prc")
    rng = np.random.default_rng(0)
    real, fake = rng.normal(0, 1, (90, 5)), rng.normal(0.8, 0.7, (110, 5))
    expected = reference.prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), verbose=False)
    found = precision_recall(real, fake, chunk=32)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert 0.1 < found[1] < found[0] < 1


def test_precision_and_recall_of_equal_and_of_far_sets():
    (x,) = make_pair((50,))
    assert precision_recall(x, x[::-1]) == (1, 1)
    assert precision_recall(x + 1e3, x + 1e3) == (1, 1)
    assert precision_recall(x, x + 1e3) == (0, 0)
    same = np.full((6, 16), 3.7)
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(x, np.repeat(x[:1], 50, axis=0)) == (1, 1 / 50)  # one image over and over


def test_precision_and_recall_do_not_depend_on_chunks():
    real, fake = make_pair((40, 33), dim=3)
    found = {precision_recall(real.astype(np.float32), fake.astype(np.float32), chunk=n) for n in (1, 7, 40, 1000)}
    assert len(found) == 1


def test_precision_and_recall_want_more_than_k_images():
    x, y = make_pair((4, 3))
    with pytest.raises(UserError, match="more than k = 3 images a set, found 3"):
        precision_recall(x, y)
    assert precision_recall(x, y, k=2) is not None
