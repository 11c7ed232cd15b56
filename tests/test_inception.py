"""models/inception.py: equal to torch-fidelity's own module, layer by layer and with its resizing."""

import importlib
import importlib.util
import sys
import types

import jax
import numpy as np
import pytest

from semflow_jax.evaluate import features
from semflow_jax.models.build import make_fns
from semflow_jax.models.inception import InceptionV3, resize_like_tf1
from semflow_jax.weights.load import fill


def stand_in_torchvision():
    """Modules with the names that torch-fidelity and lpips import, and nothing behind them."""
    names = ("", ".datasets", ".transforms", ".transforms.functional", ".models")
    modules = {name: types.ModuleType(f"torchvision{name}") for name in names}
    for name, module in list(modules.items())[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, module)
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules[".datasets"], name, object)
    return {module.__name__: module for module in modules.values()}


def import_reference(name):
    """A module of a package that asks for torchvision, imported without it: there is no CPU build of it everywhere."""
    pytest.importorskip("torch")
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name}: not installed")
    with pytest.MonkeyPatch.context() as patch:  # for the import alone: others look whether there is a torchvision
        for key, module in stand_in_torchvision().items():
            patch.setitem(sys.modules, key, module)
        return importlib.import_module(name)


def randomise(torch, network):
    """Weights that keep the signal's size, and statistics of batch norms that differ from 0 and 1."""
    torch.manual_seed(0)
    for path, x in network.state_dict().items():
        if x.ndim == 4:
            torch.nn.init.kaiming_normal_(x, nonlinearity="relu")
        elif path.endswith(("running_var", "weight")):
            torch.nn.init.uniform_(x, 0.5, 1.5)
        elif x.ndim:
            torch.nn.init.normal_(x, std=0.1)
    return network.eval()


def make_reference(torch):
    """torch-fidelity's network at random weights."""
    module = import_reference("torch_fidelity.feature_extractor_inceptionv3")

    class Reference(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, _):  # asked for by its constructor, of a file that is not here
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        return randomise(torch, Reference("inception", ["2048"]))


def relative_rms(x, reference):
    return np.sqrt(np.mean((np.asarray(x) - reference) ** 2) / np.mean(reference**2))


def call(torch, network, image):
    with torch.no_grad():
        return network(torch.from_numpy(image).permute(0, 3, 1, 2))[0].numpy()


@pytest.fixture(scope="module")
def pair():
    """The reference, and ours as a function of images with the same weights."""
    torch = pytest.importorskip("torch")
    network = make_reference(torch)
    tensors = {key: x.clone().numpy() for key, x in network.state_dict().items()}
    abstract, (extract,) = make_fns(lambda rngs: InceptionV3(rngs=rngs), "__call__")
    params = fill(abstract, tensors, features.INCEPTION, "tensors")
    return network, lambda image: np.asarray(jax.jit(extract)(params, image))


def test_equals_torch_fidelity_with_random_weights(pair):
    torch = pytest.importorskip("torch")
    network, extract = pair
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3), np.uint8)
    found, single = extract(image), call(torch, network, image)
    assert (found.shape, found.dtype) == ((1, 2048), np.float32)
    assert relative_rms(found, single) <= 1e-5


@pytest.mark.slow
def test_equals_torch_fidelity_in_float64(pair, monkeypatch):
    """At the network's own size: positions of the resizing are float32 numbers, in TensorFlow too."""
    torch = pytest.importorskip("torch")
    network, extract = pair
    image = np.random.default_rng(1).integers(0, 256, (2, 299, 299, 3), np.uint8)
    single = call(torch, network, image)
    monkeypatch.setattr(network, "feature_extractor_internal_dtype", torch.float64)
    double = call(torch, network.double(), image)
    network.float()
    error, floor = relative_rms(extract(image), double), relative_rms(single, double)
    assert relative_rms(double[0], double[1]) > 1e-3  # what is compared depends on the image
    print(f"Inception v3: {error:.1e} here, {floor:.1e} PyTorch")
    assert error <= 1e-5


@pytest.mark.parametrize("size", [(40, 56), (299, 299), (512, 300), (1, 3)])
def test_resizes_as_torch_fidelity(size):
    torch = pytest.importorskip("torch")
    reference = import_reference("torch_fidelity.interpolate_compat_tensorflow")
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.float32)
    expected = reference.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(image).permute(0, 3, 1, 2), (299, 299), align_corners=False
    )
    found = resize_like_tf1(jax.numpy.asarray(image), (299, 299))
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


def test_resizing_by_hand():
    """Twice as many pixels: the old ones, and the middles to the right of them; the last one is repeated."""
    image = jax.numpy.asarray([0.0, 4.0, 2.0]).reshape(1, 1, 3, 1)
    np.testing.assert_array_equal(resize_like_tf1(image, (1, 6))[0, 0, :, 0], [0, 2, 4, 3, 2, 2])
    assert resize_like_tf1(image, (5, 3)).shape == (1, 5, 3, 1)
