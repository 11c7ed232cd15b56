"""models/lpips.py: equal to the package lpips, on torchvision's networks at random weights and its own linear heads."""

import jax
import numpy as np
import pytest
from test_inception import import_reference, randomise, relative_rms

from semflow_jax.errors import UserError
from semflow_jax.evaluate import features
from semflow_jax.models.build import make_fns
from semflow_jax.models.lpips import LPIPS, MIN_SIDE
from semflow_jax.weights.load import fill

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")


def make_features(torch, net):
    """torchvision's `features` of AlexNet or VGG16."""
    nn = torch.nn
    if net == "alex":
        layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        for n, m in ((192, 384), (384, 256), (256, 256)):
            layers += [nn.Conv2d(n, m, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.MaxPool2d(3, 2))
    layers, n = [], 3
    for width in VGG16:
        if width == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(n, width, 3, padding=1), nn.ReLU()]
            n = width
    return nn.Sequential(*layers)


def make_reference(torch, net):
    """The package's own module on a network at random weights, and the network."""
    lpips = import_reference("lpips")
    backbone = torch.nn.ModuleDict({"features": randomise(torch, make_features(torch, net))})
    with pytest.MonkeyPatch.context() as patch:
        name = {"alex": "alexnet", "vgg": "vgg16"}[net]
        patch.setattr(lpips.pretrained_networks.tv, name, lambda pretrained: backbone, raising=False)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False), backbone


def make_tensors(reference, backbone):
    """What the two files hold: torchvision's weights, and the package's of channels."""
    lins = {key: x for key, x in reference.state_dict().items() if key.startswith("lin") and "lins" not in key}
    return {key: x.clone().numpy() for key, x in (backbone.state_dict() | lins).items()}


def make_images(size):
    """A pair of images that differ a little, and one of a pair that differ wholly."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    b = np.stack([np.clip(a[0] + rng.normal(0, 0.1, a[0].shape), -1, 1), rng.uniform(-1, 1, a[1].shape)])
    return a, b.astype(np.float32)


@pytest.mark.parametrize(("net", "size"), [("alex", (64, 83)), ("vgg", (32, 33))])
def test_equals_the_package_with_random_weights(net, size):
    torch = pytest.importorskip("torch")
    reference, backbone = make_reference(torch, net)
    abstract, (distance,) = make_fns(lambda rngs: LPIPS(net, rngs=rngs), "__call__")
    params = fill(abstract, make_tensors(reference, backbone), features.LPIPS_BACKBONE, "tensors")
    images = make_images(size)

    def call(dtype):
        network = reference.to(dtype)
        with torch.no_grad():
            return network(*(torch.from_numpy(x).to(dtype).permute(0, 3, 1, 2) for x in images)).numpy()[:, 0, 0, 0]

    found, single, double = jax.jit(distance)(params, *images), call(torch.float32), call(torch.float64)
    print(f"LPIPS {net}: {relative_rms(found, double):.1e} here, {relative_rms(single, double):.1e} PyTorch")
    assert found.shape == (2,) and 0 < found[0] < found[1]
    assert relative_rms(found, double) <= 1e-5
    np.testing.assert_array_equal(jax.jit(distance)(params, images[0], images[0]), 0)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_small_images(net):
    def make(side):
        abstract, (distance,) = make_fns(lambda rngs: LPIPS(net, rngs=rngs), "__call__")
        image = jax.ShapeDtypeStruct((3, side, 80, 3), np.float32)
        return jax.eval_shape(distance, abstract, image, image)

    assert make(MIN_SIDE[net]).shape == (3,)
    with pytest.raises(UserError, match=f"at least {MIN_SIDE[net]} pixels a side, found {MIN_SIDE[net] - 1} x 80"):
        make(MIN_SIDE[net] - 1)
