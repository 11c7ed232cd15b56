"""weights/files.py: which file of a folder holds a network, and what the hub's cache holds."""

import importlib
import json

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors

from semflow_jax.errors import UserError
from semflow_jax.weights import files
from semflow_jax.weights.files import download, find_network, load_all, load_json, load_tensors
from semflow_jax.weights.load import save_safetensors
from semflow_jax.weights.stable_diffusion import find_pretrained

httpx = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])  # or its successor
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(folder, *names, value=0.0):
    """Safetensors files, each with one tensor called after it."""
    for name in names:
        save_safetensors(folder / name, {f"{name.split('.')[0]}.x": np.full((2,), value, np.float32)})


def write_index(folder, name, *shards):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {f"{i}.x": x for i, x in enumerate(shards)}}))


def names(folder, variant=None):
    return [path.name for path in find_network(folder, variant)]


def fail(function, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["diffusion_pytorch_model.safetensors", "model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["pytorch_model.bin", "config.json", "flax_model.msgpack"], "pytorch_model.bin"),
    ],
)
def test_the_plain_file_comes_first(tmp_path, present, chosen):
    for name in present:
        (tmp_path / name).touch()
    assert names(tmp_path) == [chosen]


def test_a_variant_is_that_or_nothing(tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    assert f"{tmp_path}: weights such as diffusion_pytorch_model.fp16.safetensors expected" in fail(
        find_network, tmp_path, "fp16"
    )
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert names(tmp_path, "fp16") == ["diffusion_pytorch_model.fp16.safetensors"]


def test_an_empty_folder(tmp_path):
    assert "weights such as diffusion_pytorch_model.safetensors expected, found none" in fail(find_network, tmp_path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path, variant):
    v = f".{variant}" if variant else ""
    shards = [f"diffusion_pytorch_model{v}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_index(tmp_path, f"diffusion_pytorch_model.safetensors.index{v}.json", *shards[::-1], shards[1])
    write(tmp_path, shards[0])
    message = fail(find_network, tmp_path, variant)
    assert f"missing {shards[1]}; download" in message and shards[0] not in message
    save_safetensors(tmp_path / shards[1], {"second": np.ones(3, np.float16)})
    assert names(tmp_path, variant) == shards
    found = load_all(find_network(tmp_path, variant))
    assert len(found) == 2 and found["second"].dtype == np.float16


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}', "\xff"])
def test_a_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="latin1")
    assert "model.safetensors.index.json: an index of shards expected" in fail(find_network, tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    write(tmp_path, "secret.safetensors")
    write_index(tmp_path / "unet", "model.safetensors.index.json", "../secret.safetensors")
    assert "missing secret.safetensors" in fail(find_network, tmp_path / "unet")


def test_files_by_suffix(tmp_path):
    torch = pytest.importorskip("torch")
    write(tmp_path, "a.safetensors", value=2)
    np.testing.assert_array_equal(load_tensors(tmp_path / "a.safetensors")["a.x"], [2, 2])
    for suffix in files.TORCH_SUFFIXES:
        torch.save({"x": torch.ones(3)}, tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(load_tensors(tmp_path / f"a{suffix}")["x"], [1, 1, 1])
    assert "weights end in .safetensors or .bin, .pt, .pth, .ckpt, got '.h5'" in fail(load_tensors, tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "a JSON file expected, found .*No such file"), ("{", "a JSON file expected"), ("[1]", "found a list")],
)
def test_a_config_that_is_none(tmp_path, content, found):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json: .*{found}"):
        load_json(tmp_path / "config.json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with one repository, as the hub's client lays it out, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--someone--sd"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    folder = root / "snapshots" / COMMIT
    write(folder / "unet", "diffusion_pytorch_model.safetensors", value=3)
    (folder / "unet" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_repository_that_was_downloaded_before(hub, revision):
    folder = find_pretrained("someone/sd", revision, offline=True)
    assert folder == hub
    np.testing.assert_array_equal(load_all(find_network(folder / "unet"))["diffusion_pytorch_model.x"], [3, 3])


@pytest.mark.parametrize(
    ("name", "revision", "place"),
    [
        ("someone/else", None, "someone/else: a folder, or a repository of the Hugging Face hub, expected"),
        ("someone/sd", "v9", "someone/sd: a folder, or a repository of the Hugging Face hub at v9, expected"),
        ("a//b", None, "a//b: "),
        ("/no/where/at all", None, "/no/where/at all: "),
    ],
)
def test_a_repository_that_was_not(hub, name, revision, place):
    assert fail(find_pretrained, name, revision, offline=True).startswith(place)


def make_http_error(kind, status):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/models/someone/sd"))
    return kind(f"{status} Client Error. (Request ID: 1)\n\nWhy: {kind.__name__} of someone/sd.", response=response)


@pytest.mark.parametrize(
    "error",
    [
        make_http_error(errors.GatedRepoError, 403),
        make_http_error(errors.RepositoryNotFoundError, 401),
        make_http_error(errors.RevisionNotFoundError, 404),
        make_http_error(errors.HfHubHTTPError, 503),
        errors.LocalEntryNotFoundError("Got: ConnectError:\nno route"),
        errors.OfflineModeIsEnabled("Cannot reach\nthe hub"),
        httpx.ReadTimeout("in the middle of a file"),
        RuntimeError("Data processing error: CAS service error"),
        OSError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_may_answer(monkeypatch, error):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = fail(download, "someone/sd", ["*.json"])
    assert message.startswith("someone/sd: ") and type(error).__name__ in message
    assert "log in with `hf auth login`" in message
    assert str(error).strip().split("\n")[-1] in message


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    """Of a repository like Stable Diffusion's: one copy of each network, in full precision."""
    needed = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "config.json",
        "README.md",
    ]
    others = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "safety_checker/model.safetensors",
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "model.safetensors",
    ]
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_pretrained("someone/sd", "v1", "secret", offline=True, more=("config.json", "README.md")) == tmp_path
    patterns = asked.pop("allow_patterns")
    assert asked == {"repo_id": "someone/sd", "revision": "v1", "token": "secret", "local_files_only": True}
    assert set(huggingface_hub.utils.filter_repo_objects(needed + others, allow_patterns=patterns)) == set(needed)


def test_a_local_path_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    assert find_pretrained("$WEIGHTS") == tmp_path
