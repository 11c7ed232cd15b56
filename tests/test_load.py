import jax
import ml_dtypes
import numpy as np
import pytest

from semflow_jax.errors import UserError
from semflow_jax.weights import keys
from semflow_jax.weights.load import fill, load_safetensors, save_safetensors


def make_tensors():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(5, 3, 3, 2)).astype(np.float32),
        "linear.weight": rng.normal(size=(4, 6)).astype(np.float16),
        "token_embedding.weight": rng.normal(size=(7, 4)).astype(ml_dtypes.bfloat16),
        "bias": rng.normal(size=(4,)).astype(np.float32),
        "count": np.array(3, np.int64),
    }


def make_abstract():
    shapes = {
        "conv.weight": (3, 2, 3, 5),
        "linear.weight": (6, 4),
        "token_embedding.weight": (7, 4),
        "bias": (4,),
        "count": (),
    }
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


def test_round_trip_keeps_types_and_values(tmp_path):
    tensors = make_tensors()
    save_safetensors(tmp_path / "new" / "x.safetensors", tensors, {"format": "pt"})
    loaded = load_safetensors(tmp_path / "new" / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        np.testing.assert_array_equal(loaded[key], tensor)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_transposed_views_are_saved_as_they_read(tmp_path):
    tensor = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)
    save_safetensors(tmp_path / "x.safetensors", {"x": tensor, "y": jax.numpy.ones((2, 3)).T})
    loaded = load_safetensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(loaded["x"], tensor)
    assert loaded["y"].shape == (3, 2)


def test_torch_reads_what_is_saved_and_the_other_way_round(tmp_path):
    pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tensors = make_tensors()
    save_safetensors(tmp_path / "ours.safetensors", tensors)
    theirs = load_file(tmp_path / "ours.safetensors")
    save_file(theirs, tmp_path / "theirs.safetensors")
    loaded = load_safetensors(tmp_path / "theirs.safetensors")
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[key].double().numpy(), tensor.astype(np.float64))
        np.testing.assert_array_equal(loaded[key], tensor)


def test_a_failed_save_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"x": np.zeros(3)})
    with pytest.raises(Exception, match="object"):
        save_safetensors(path, {"x": np.array([None])})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    np.testing.assert_array_equal(load_safetensors(path)["x"], np.zeros(3))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent.safetensors: .* found none: .*download"):
        load_safetensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, make_tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="x.safetensors: must be a whole safetensors file, .*download it again"):
        load_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"not json",
        b"\xff\xfe",
        b'{"x": 1}',
        b'{"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8], "extra": 0}}',
        b'{"x": {"dtype": "F32", "shape": [-2], "data_offsets": [16, 8]}}',
    ],
)
def test_damaged_header(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="must be a whole safetensors file"):
        load_safetensors(path)


def test_fill_transposes_and_casts():
    tensors = make_tensors()
    filled = fill(make_abstract(), tensors)
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in filled.values())
    assert filled["conv.weight"][1, 0, 2, 4] == tensors["conv.weight"][4, 2, 1, 0]
    np.testing.assert_array_equal(filled["linear.weight"], tensors["linear.weight"].T.astype(np.float32))
    np.testing.assert_array_equal(
        filled["token_embedding.weight"], tensors["token_embedding.weight"].astype(np.float32)
    )


def test_fill_lists_every_fault_at_once():
    tensors = make_tensors() | {"extra.one": np.zeros(1), "extra.two": np.zeros(1)}
    del tensors["bias"], tensors["count"]
    tensors["linear.weight"] = np.zeros((5, 6))
    with pytest.raises(UserError) as caught:
        fill(make_abstract(), tensors, place="x.safetensors")
    message = str(caught.value)
    assert message.startswith("x.safetensors: ")
    assert "2 keys without a parameter (extra.one, extra.two)" in message
    assert "2 parameters without a key (bias, count)" in message
    assert "1 wrong shapes, axes as in memory (linear.weight [6, 5] instead of [6, 4])" in message
    assert "\n" not in message


def test_fill_refuses_two_keys_for_one_parameter():
    tensors = make_tensors() | {"old.bias": np.zeros(4)}
    with pytest.raises(UserError, match=r"1 keys for a parameter that has one \(old.bias\)"):
        fill(make_abstract(), tensors, [(r"^old\.", "")])


def test_table_renames_and_drops():
    tensors = {f"model.{key}": tensor for key, tensor in make_tensors().items()} | {"model.position_ids": np.zeros(9)}
    assert (
        fill(make_abstract(), tensors, [(r"position_ids$", None), (r"^model\.", "")]).keys() == make_abstract().keys()
    )


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("encoder.11.pool.0.weight", "encoder.layers.11.pool.0.weight"),
        ("decoder.10.conv.0.bias", "decoder.layers.9.conv.0.bias"),
        ("encoder.layers.11.conv.0.bias", "encoder.layers.11.conv.0.bias"),
        ("decoder.layers.9.conv.0.bias", "decoder.layers.9.conv.0.bias"),
    ],
)
def test_tiny_vae_table(key, path):
    assert keys.rename(key, keys.TINY_VAE) == path
