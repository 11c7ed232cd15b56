"""models/efficientnet_lite.py: equal to the network of PyTorch whose real weights it runs."""

import functools
import math

import jax
import numpy as np
import pytest
from PIL import Image
from test_inception import relative_rms

from semflow_jax.evaluate import features
from semflow_jax.models.build import make_fns
from semflow_jax.models.efficientnet_lite import STAGES, EfficientNetLite0, resize_bicubic
from semflow_jax.weights.load import fill, load_safetensors

FILE = "weights/efficientnet_lite0/efficientnet_lite0_fp32.safetensors"


def pad_same(torch, x, kernel, stride):
    """TensorFlow's padding, from its definition."""
    sides = []
    for n in (x.shape[3], x.shape[2]):
        total = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        sides += [total // 2, total - total // 2]
    return torch.nn.functional.pad(x, sides)


def extract_by_hand(torch, tensors, image, dtype):
    """The features in PyTorch, from its functions alone."""
    functional = torch.nn.functional

    def conv(x, path, stride=1):
        weight = tensors[f"{path}.weight"].to(dtype)
        groups = x.shape[1] // weight.shape[1]
        return functional.conv2d(pad_same(torch, x, weight.shape[2], stride), weight, stride=stride, groups=groups)

    def norm(x, path):
        parts = (tensors[f"{path}.{name}"].to(dtype) for name in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts, eps=1e-3)

    x = (torch.from_numpy(image).to(dtype).permute(0, 3, 1, 2) - 127) / 128
    x = functional.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    index = 0
    for num, _, first_stride, expansion, _ in STAGES:
        for i in range(num):
            place, y = f"_blocks.{index}", x
            if expansion > 1:
                y = functional.relu6(norm(conv(y, f"{place}._expand_conv"), f"{place}._bn0"))
            y = conv(y, f"{place}._depthwise_conv", 1 if i else first_stride)
            y = norm(conv(functional.relu6(norm(y, f"{place}._bn1")), f"{place}._project_conv"), f"{place}._bn2")
            x = x + y if i else y
            index += 1
    return functional.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3)).numpy()


def make_pictures():
    """Smooth pictures with noise: what ImageNet's weights answer to."""
    y, x = np.mgrid[:224, :224] / 224
    waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((1, 2), (3, -1), (5, 4))]
    noise = np.random.default_rng(0).normal(0, 12, (2, 224, 224, 3))
    pictures = np.stack([np.stack(waves, -1), np.stack(waves[::-1], -1) ** 3])
    return np.clip(128 + 90 * pictures + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def weights(shared_dir):
    return shared_dir / FILE


@functools.cache
def extract(path):
    """Our features of the pictures."""
    net = features.load_features("efficientnet_lite0", path)
    return np.asarray(jax.jit(net.features)(net.params, make_pictures()))


def test_equals_torch_with_the_real_weights(weights):
    torch = pytest.importorskip("torch")
    real, found = make_pictures(), extract(weights)
    from safetensors.torch import load_file

    assert (found.shape, found.dtype) == ((2, 1280), np.float32)
    assert relative_rms(found, extract_by_hand(torch, load_file(weights), real, torch.float32)) <= 1e-5
    assert relative_rms(found[0], found[1]) > 0.1  # what is compared depends on the image


def test_equals_its_package(weights):
    torch = pytest.importorskip("torch")
    real, found = make_pictures(), extract(weights)
    from safetensors.torch import load_file

    package = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    package.load_state_dict(load_file(weights))
    with torch.no_grad():
        maps = package.extract_features((torch.from_numpy(real).float().permute(0, 3, 1, 2) - 127) / 128)
    assert relative_rms(found, maps.mean((2, 3)).numpy()) <= 1e-5


@pytest.mark.slow
def test_equals_torch_in_float64(weights):
    torch = pytest.importorskip("torch")
    real, found = make_pictures(), extract(weights)
    from safetensors.torch import load_file

    tensors = load_file(weights)
    single, double = (extract_by_hand(torch, tensors, real, dtype) for dtype in (torch.float32, torch.float64))
    error, floor = relative_rms(found, double), relative_rms(single, double)
    print(f"EfficientNet-Lite0: {error:.1e} here, {floor:.1e} PyTorch")
    assert error <= 1e-5


def test_equals_torch_with_random_weights():
    """Without the file too; batch norms whose statistics are not 0 and 1."""
    torch = pytest.importorskip("torch")
    real = make_pictures()[:1]
    abstract, (extract_fn,) = make_fns(lambda rngs: EfficientNetLite0(rngs=rngs), "__call__")
    rng = np.random.default_rng(0)
    tensors = {}
    for path, leaf in abstract.items():
        if len(leaf.shape) == 4:
            kh, kw, cin, cout = leaf.shape
            x = rng.normal(0, np.sqrt(2 / (kh * kw * cin)), (cout, cin, kh, kw))
        elif path.endswith(("weight", "running_var")):
            x = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            x = rng.normal(0, 0.1, leaf.shape)
        tensors[path] = x.astype(np.float32)
    params = fill(abstract, tensors, features.EFFICIENTNET_LITE0, "tensors")
    reference = extract_by_hand(torch, {k: torch.from_numpy(x) for k, x in tensors.items()}, real, torch.float32)
    assert relative_rms(jax.jit(extract_fn)(params, real), reference) <= 1e-5


def test_the_real_weights_are_of_this_network(weights):
    abstract, _ = make_fns(lambda rngs: EfficientNetLite0(rngs=rngs), "__call__")
    params = fill(abstract, load_safetensors(weights), features.EFFICIENTNET_LITE0, weights)
    assert sum(x.size for x in params.values()) == 3_413_024  # 4.7 M with the classifier, as published


@pytest.mark.parametrize("size", [(64, 96), (300, 500), (224, 100)])
def test_resizes_as_pillow(size):
    channel = np.random.default_rng(0).uniform(60, 190, size).astype(np.float32)
    expected = np.asarray(Image.fromarray(channel).resize((224, 224), Image.Resampling.BICUBIC))
    found = resize_bicubic(jax.numpy.asarray(channel)[None, :, :, None], (224, 224))[0, :, :, 0]
    np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=2e-3)


def test_an_image_of_the_networks_size_stays():
    image = jax.numpy.asarray(np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3)), np.float32)
    np.testing.assert_array_equal(resize_bicubic(image, (224, 224)), image)
