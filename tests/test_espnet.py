"""models/espnet.py: the same as the authors' network in PyTorch, written down once more here."""

import jax
import numpy as np
import pytest

from semflow_jax.errors import UserError
from semflow_jax.models.build import make_fns
from semflow_jax.models.espnet import MEAN, STD, ESPNet
from semflow_jax.weights.load import fill, load_safetensors

NUM_OUTPUTS = 12  # CamVid's classes and void


def make(num_classes: int):
    return make_fns(lambda rngs: ESPNet(num_classes, rngs=rngs), "__call__")


def relative_rms(found, expected) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def in_torch(torch, tensors, image):
    """Logits [b h w n] by torch's functions alone, from tensors by key."""
    functional = torch.nn.functional

    def conv(x, key, dilation=1, stride=1):
        weight = tensors[f"{key}.conv.weight"]
        return functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2 * dilation, dilation)

    def norm(x, key):
        names = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(tensors[f"{key}.{name}"] for name in names), False, 0.1, 1e-3)

    def act(x, key):
        return functional.prelu(norm(x, f"{key}.bn"), tensors[f"{key}.act.weight"])

    def pyramid(x, key, stride=1):
        x = conv(x, f"{key}.c1", stride=stride)
        d1, d2, d4, d8, d16 = (conv(x, f"{key}.d{d}", d) for d in (1, 2, 4, 8, 16))
        return torch.cat([d1, d2, d2 + d4, d2 + d4 + d8, d2 + d4 + d8 + d16], 1)

    def blocks(x, key, num):
        for i in range(num):
            x = act(x + pyramid(x, f"{key}.{i}"), f"{key}.{i}.bn")
        return x

    def double(x, key):
        return functional.conv_transpose2d(x, tensors[f"{key}.weight"], stride=2)

    bgr = torch.from_numpy(image[..., ::-1].astype(np.float32)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    x = (bgr - mean) / std / 255
    half = functional.avg_pool2d(x, 3, 2, 1)
    quarter = functional.avg_pool2d(half, 3, 2, 1)
    level1 = act(conv(x, "encoder.level1", stride=2), "encoder.level1")
    x1 = act(torch.cat([level1, half], 1), "encoder.b1")
    first = act(pyramid(x1, "encoder.level2_0", 2), "encoder.level2_0")
    x2 = act(torch.cat([blocks(first, "encoder.level2", 2), first, quarter], 1), "encoder.b2")
    first = act(pyramid(x2, "encoder.level3_0", 2), "encoder.level3_0")
    x3 = act(torch.cat([first, blocks(first, "encoder.level3", 8)], 1), "encoder.b3")
    deep = double(norm(conv(x3, "encoder.classifier"), "br"), "up_l3.0")
    y = act(torch.cat([conv(x2, "level3_C"), deep], 1), "combine_l2_l3.0")
    y = act(pyramid(y, "combine_l2_l3.1"), "combine_l2_l3.1.bn")
    y = act(double(y, "up_l2.0"), "up_l2.1")
    y = act(conv(torch.cat([y, x1], 1), "conv"), "conv")
    return double(y, "classifier").permute(0, 2, 3, 1).numpy()


def make_image(height: int, width: int):
    """Smooth colours with noise."""
    y, x = np.mgrid[:height, :width] / 48
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y)], -1)[None]
    return np.clip(128 + 90 * waves + np.random.default_rng(0).normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def test_equals_torch_with_the_real_weights(shared_dir):
    torch = pytest.importorskip("torch")
    path = shared_dir / "weights" / "espnet" / "espnet_p_2_q_8_camvid.safetensors"
    tensors, image = load_safetensors(path), make_image(96, 128)
    abstract, (logits,) = make(NUM_OUTPUTS)
    found = np.asarray(jax.jit(logits)(fill(abstract, tensors, place=path), image))
    expected = in_torch(torch, {key: torch.from_numpy(x.copy()) for key, x in tensors.items()}, image)
    assert found.shape == expected.shape == (1, 96, 128, NUM_OUTPUTS)
    assert relative_rms(found, expected) <= 1e-5
    assert len(np.unique(found.argmax(-1))) > 1  # what is compared depends on the image


def test_equals_torch_with_random_weights():
    """Without the files too."""
    torch = pytest.importorskip("torch")
    rng, tensors = np.random.default_rng(0), {}
    abstract, (logits,) = make(5)
    for path, leaf in abstract.items():
        if len(leaf.shape) == 4:
            kh, kw, n_in, n_out = leaf.shape
            x = rng.normal(0, np.sqrt(2 / (kh * kw * n_in)), (n_out, n_in, kh, kw))
        else:
            x = rng.uniform(0.5, 1.5, leaf.shape)
        tensors[path] = x.astype(np.float32)
    image = make_image(32, 48)
    found = np.asarray(jax.jit(logits)(fill(abstract, tensors), image))
    expected = in_torch(torch, {key: torch.from_numpy(x) for key, x in tensors.items()}, image)
    assert relative_rms(found, expected) <= 1e-5


def test_sizes_are_multiples_of_8():
    abstract, (logits,) = make(5)
    with pytest.raises(UserError, match="multiple"):
        jax.eval_shape(logits, abstract, np.zeros((1, 100, 128, 3), np.uint8))
