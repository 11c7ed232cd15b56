"""weights/torch_file.py: what torch.save wrote, equal to the bit, and nothing that is not data."""

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from semflow_jax.errors import UserError
from semflow_jax.weights.torch_file import load_torch

torch = pytest.importorskip("torch")

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def check_equal(found, expected):
    """Bit by bit; numpy has no bfloat16 of its own."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert found[name].shape == tuple(tensor.shape)
        bits = tensor.detach().contiguous()
        bits = bits.view(torch.int16).numpy() if bits.dtype == torch.bfloat16 else bits.numpy()
        np.testing.assert_array_equal(found[name].copy().view(bits.dtype), bits)


def fail(path) -> str:
    with pytest.raises(UserError) as caught:
        load_torch(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: must be ") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(tmp_path, dtype):
    torch.manual_seed(0)
    tensors = {"a": (torch.randn(3, 4, 2) * 50).to(getattr(torch, dtype)), "b.c": torch.ones(5, dtype=torch.float32)}
    check_equal(load_torch(save(tmp_path / "x.pt", tensors)), tensors)


def test_layouts(tmp_path):
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": x,
        "transposed": x.T,
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "sliced": x[1:3, 1::2],
        "expanded": torch.tensor([7.0]).expand(3, 2),
        "scalar": torch.tensor(3.5),
        "last": x.flatten()[-1],
        "empty": torch.zeros(0, 3),
        "empty at the end": x.flatten()[24:],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "channels last": torch.randn(1, 3, 2, 2).to(memory_format=torch.channels_last),
    }
    check_equal(load_torch(save(tmp_path / "x.pt", tensors)), tensors)


def test_a_state_dict_of_a_module(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    check_equal(load_torch(save(tmp_path / "x.bin", network.state_dict())), network.state_dict())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nested_with_other_things(tmp_path, protocol):
    tensors = collections.OrderedDict(a=torch.ones(2), b=torch.zeros(3))
    content = {"epoch": 3, "names": ["x", None, 2.5, (True, b"x")], "state_dict": {"state_dict": tensors, "step": 4}}
    check_equal(load_torch(save(tmp_path / "x.ckpt", content, pickle_protocol=protocol)), tensors)


def test_tensors_are_views_of_the_file(tmp_path):
    (x,) = load_torch(save(tmp_path / "x.pt", {"x": torch.arange(1000.0)})).values()
    assert not x.flags.writeable and not x.flags.owndata


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_payload_is_not_run(tmp_path):
    path = save(tmp_path / "x.pt", {"x": torch.ones(2), "y": Payload(tmp_path / "ran")})
    assert "posix.system in it, which is not data" in fail(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload works where it is run


def test_whole_modules(tmp_path):
    message = fail(save(tmp_path / "x.pt", torch.nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear in it, which is not data" in message and "state_dict()" in message


OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_in_the_format_before_2020(tmp_path, dtype):
    torch.manual_seed(0)
    tensors = {"a": (torch.randn(3, 4, 2) * 50).to(getattr(torch, dtype)), "b.c": torch.ones(5, dtype=torch.float32)}
    check_equal(load_torch(save(tmp_path / "x.pt", tensors, **OLD)), tensors)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_format_before_2020(tmp_path, protocol):
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {"whole": x, "sliced": x[1:3, 1::2], "parameter": torch.nn.Parameter(torch.randn(2, 2))}
    tensors |= torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    path = save(tmp_path / "x.pth", {"state_dict": tensors, "epoch": 3}, pickle_protocol=protocol, **OLD)
    found = load_torch(path)
    check_equal(found, tensors)
    assert not found["whole"].flags.writeable and not found["whole"].flags.owndata


def test_the_format_before_2020_in_real_files(shared_dir):
    for name, num in (("alex", 5), ("vgg", 5), ("squeeze", 7)):
        path = shared_dir / f"weights/lpips_lin/{name}.pth"
        found = load_torch(path)
        assert len(found) == num
        check_equal(found, torch.load(path, map_location="cpu"))


def test_parameters_from_before_pytorch_0_4(tmp_path):
    """They held their tensor, and the tensor's function had its first name."""
    old = Pickled(("torch._utils", "_rebuild_tensor"), *make_tensor().args[:4])
    parameter = Pickled(("torch.nn.parameter", "Parameter"))
    parameter.state = (old, None, None, False, collections.OrderedDict())
    found = load_torch(write_by_hand(tmp_path / "x.pt", {"x": parameter, "y": old}))
    assert found.keys() == {"x", "y"}
    for x in found.values():
        np.testing.assert_array_equal(x, np.arange(12.0).reshape(3, 4))


def test_a_payload_in_the_format_before_2020_is_not_run(tmp_path):
    for content in ({"x": torch.ones(2), "y": Payload(tmp_path / "ran")}, Payload(tmp_path / "ran")):
        assert "posix.system in it, which is not data" in fail(save(tmp_path / "x.pt", content, **OLD))
    with (tmp_path / "x.pt").open("wb") as file:
        pickle.dump(Payload(tmp_path / "ran"), file)
    assert "posix.system in it, which is not data" in fail(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_broken_files_in_the_format_before_2020(tmp_path):
    path = save(tmp_path / "x.pt", {"x": torch.arange(1000.0), "y": torch.ones(3)}, **OLD)
    whole = path.read_bytes()
    for size in (*range(0, len(whole) - 5000, 37), len(whole) - 4000, len(whole) - 17, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "download it again" in fail(path)
    path.write_bytes(pickle.dumps(5) + whole)
    assert "neither a zip archive nor" in fail(path)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"x": 1}, {3: torch.ones(2)}, {}, 5])
def test_no_tensors_by_name(tmp_path, content):
    assert "must be a state dict, found no tensors by name" in fail(save(tmp_path / "x.pt", content))


def test_missing_and_broken_files(tmp_path):
    assert "found none" in fail(tmp_path / "absent.pt")
    path = save(tmp_path / "x.pt", {"x": torch.arange(10_000.0)})
    whole = path.read_bytes()
    for size in (0, 10, 5000, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "download it again" in fail(path)


REBUILD = "torch._utils", "_rebuild_tensor_v2"


class Pickled:
    """A pickle of a name and its arguments, such as torch writes for a tensor."""

    def __init__(self, name, *args):
        self.name, self.args, self.state = name, args, None


def write_by_hand(path, content, storages=None, compression=zipfile.ZIP_STORED):
    """An archive of torch.save with any content; a `Pickled` storage is a persistent id."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, x):
            return ("storage", Name(*x.args[0]), *x.args[1:]) if isinstance(x, Pickled) and x.name is None else None

        def save(self, x, save_persistent_id=True):
            if isinstance(x, Name):
                self.write(pickle.GLOBAL + f"{x.module}\n{x.name}\n".encode())
            elif isinstance(x, Pickled) and x.name is not None:
                self.save(Name(*x.name))
                self.save(x.args)
                self.write(pickle.REDUCE)
                if x.state is not None:
                    self.save(x.state)
                    self.write(pickle.BUILD)
            else:
                super().save(x, save_persistent_id)

    class Name:
        def __init__(self, module, name):
            self.module, self.name = module, name

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        for key, data in (storages or {"0": np.arange(12, dtype=np.float32).tobytes()}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def make_tensor(offset=0, size=(3, 4), stride=(4, 1), num=12, key="0", storage=("torch", "FloatStorage")):
    return Pickled(REBUILD, Pickled(None, storage, key, "cpu", num), offset, size, stride, False, None)


def test_by_hand(tmp_path):
    found = load_torch(write_by_hand(tmp_path / "x.pt", {"x": make_tensor()}))
    np.testing.assert_array_equal(found["x"], np.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize(
    "tensor",
    [
        make_tensor(offset=1),
        make_tensor(size=(4, 4)),
        make_tensor(stride=(5, 1)),
        make_tensor(offset=-1),
        make_tensor(offset=11, stride=(-4, -1)),
        make_tensor(num=11),
        make_tensor(num=-1),
        make_tensor(stride=(2**70, 1), size=(1, 4)),
        make_tensor(size=(-1, 4)),
        make_tensor(size=(3,)),
        make_tensor(size=(3.0, 4)),
        make_tensor(key="1"),
        make_tensor(storage=("torch", "ComplexFloatStorage")),
        make_tensor(storage=("collections", "OrderedDict")),
        Pickled(REBUILD, [1.0] * 12, 0, (3, 4), (4, 1)),
        Pickled(REBUILD),
        Pickled(("builtins", "eval"), "1"),
        Pickled(("numpy", "load"), "/etc/passwd"),
        Pickled(("os\nsystem", "x")),
    ],
)
def test_tensors_that_can_not_be(tmp_path, tensor):
    fail(write_by_hand(tmp_path / "x.pt", {"x": tensor}))


def test_storages_that_can_not_be(tmp_path):
    fail(write_by_hand(tmp_path / "short.pt", {"x": make_tensor()}, {"0": bytes(47)}))
    fail(write_by_hand(tmp_path / "none.pt", {"x": make_tensor()}, {"1": bytes(48)}))
    assert "compressed" in fail(
        write_by_hand(tmp_path / "x.pt", {"x": make_tensor()}, compression=zipfile.ZIP_DEFLATED)
    )


def test_bookkeeping_of_stable_diffusions_files_is_left_out(tmp_path):
    """Their trainer wrote a class as a key and a numpy number beside the weights."""
    scalar = Pickled(("numpy.core.multiarray", "scalar"), Pickled(("numpy", "dtype"), "f8", 0, 1), b"12345678")
    callbacks = {"best_model_score": scalar, "best": Pickled(("_codecs", "encode"), "x", "latin1")}
    checkpoint = Pickled(("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"))
    content = {"callbacks": [checkpoint, callbacks], "state_dict": {"x": make_tensor()}}
    assert load_torch(write_by_hand(tmp_path / "x.ckpt", content)).keys() == {"x"}
