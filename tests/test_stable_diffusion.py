"""weights/stable_diffusion.py and pipeline.py on Stable Diffusion in small, against diffusers and transformers.

The reference for the sampling is a loop over diffusers' own networks, as the authors of SemFlow run them.
"""

import copy
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from stable_diffusion_folder import CONTEXT, SCALE, SIZE, WIDTHS, relative_rms, to_numpy, to_torch

from semflow_jax import palette, solve
from semflow_jax.errors import UserError
from semflow_jax.mask_code import make_mask_code
from semflow_jax.models.build import abstract_unet
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.pipeline import NUM_GRID, SemFlow, check_parts
from semflow_jax.weights import stable_diffusion
from semflow_jax.weights.export import to_torch as to_torch_order
from semflow_jax.weights.load import load_safetensors, save_safetensors
from semflow_jax.weights.stable_diffusion import load_context, load_unet, load_vae, open_unet

NUM_STEPS = 25
LATENT = (1, SIZE[0] // 8, SIZE[1] // 8, 4)


@pytest.fixture(scope="module")
def flow(sd_flow):
    return sd_flow


@pytest.fixture(scope="module")
def pictures():
    """One image of smooth noise, one label of large blocks with some void."""
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (1, 8, 16, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    label = np.kron(rng.integers(0, NUM_GRID, (1, 4, 8, 1)), np.ones((1, 16, 16, 1))).astype(np.uint8)
    label[0, :16, :16] = 255
    return image, label


@pytest.fixture(scope="module")
def found(flow, pictures):
    """What passes through the codec in both directions, before any rounding, and what comes out."""
    seen = {}

    def note(name, x):
        jax.debug.callback(lambda x: seen.update({name: np.asarray(x)}), x)
        return x

    codec = dataclasses.replace(
        flow.codec,
        moments=lambda params, picture: (note("begin", flow.codec.moments(params, picture)[0]), None),
        decode=lambda params, z: note("picture", flow.codec.decode(params, note("end", z))),
    )
    code = make_mask_code(ConfigDict(flow.config["mask_code"]), codec, NUM_GRID, {})
    watched = SemFlow(flow.config, flow.params, codec, code, flow.context)
    results = {}
    for name, run in (
        ("segment", lambda: watched.segment(pictures[0])),
        ("synthesize", lambda: watched.synthesize(pictures[1], key=jax.random.key(0))[0]),
    ):
        out = run()
        jax.effects_barrier()
        results[name] = dict(seen, out=out)
    return results


def encode(vae, picture):
    """Pixels in [-1, 1] -> the scaled mode."""
    return vae.encode(picture).latent_dist.mode() * SCALE


def official_loop(unet, z, context, to_mask: bool):
    """Euler over t * 1000 = 0, 40, ... 960, or 1000, 960, ... 40."""
    dt = 1 / NUM_STEPS
    for i in range(NUM_STEPS):
        t = i * dt if to_mask else 1 - i * dt
        v = unet(z, t * 1000, encoder_hidden_states=context.to(z.dtype)).sample
        z = z + dt * v if to_mask else z - dt * v
    return z


def official(sd, pictures, dtype):
    """What `found` should be."""
    unet, vae, context = (x.to(dtype=dtype) for x in (sd.unet, sd.vae, sd.context()))
    key = jax.random.split(jax.random.key(0), 1)[0]  # of the first sample
    label, colours = jnp.asarray(pictures[1]), palette.grid_palette(NUM_GRID)
    coloured = palette.perturb(key, palette.colourise(label, colours), label, NUM_GRID, 0.1, 0.0)
    results = {}
    for name, picture in (("segment", to_torch(pictures[0]).to(dtype) / 127.5 - 1), ("synthesize", to_torch(coloured))):
        begin = encode(vae, picture.to(dtype))
        end = official_loop(unet, begin, context, name == "segment")
        results[name] = {"begin": begin, "end": end, "picture": vae.decode(end / SCALE).sample}
    sd.unet.float(), sd.vae.float()
    return jax.tree.map(to_numpy, results)


def test_context_is_the_text_towers(flow, sd):
    error = relative_rms(flow.context, sd.context()[0])
    print(f"context {list(flow.context.shape)}: relative rms {error:.2e}")
    assert flow.context.shape == (77, CONTEXT) and error < 2e-6


def test_context_is_computed_once(sd, flow, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "fill", None)  # calling it would fail
    np.testing.assert_array_equal(load_context(sd.path), flow.context)


def test_velocity_is_diffusers(flow, sd):
    import torch

    rng = np.random.default_rng(1)
    zt, t = rng.normal(size=LATENT).astype(np.float32), np.float32([0.3137])
    expected = sd.unet(to_torch(zt), torch.from_numpy(t) * 1000, encoder_hidden_states=sd.context()).sample
    error = relative_rms(flow.velocity(jnp.asarray(zt), jnp.asarray(t)), to_numpy(expected))
    print(f"velocity: relative rms {error:.2e}")
    assert error < 1e-5


def test_autoencoder_is_diffusers(flow, sd):
    rng = np.random.default_rng(2)
    image, z = rng.uniform(-1, 1, (1, *SIZE, 3)).astype(np.float32), rng.normal(size=LATENT).astype(np.float32)
    errors = (
        relative_rms(flow.encode(jnp.asarray(image)), to_numpy(encode(sd.vae, to_torch(image)))),
        relative_rms(flow.decode(jnp.asarray(z)), to_numpy(sd.vae.decode(to_torch(z) / SCALE).sample)),
    )
    print(f"encode, decode: relative rms {errors[0]:.2e}, {errors[1]:.2e}")
    assert max(errors) < 1e-5


def test_both_directions_are_the_official_loop(flow, sd, pictures, found):
    import torch

    exact, single = (official(sd, pictures, dtype) for dtype in (torch.float64, torch.float32))
    for name, stages in exact.items():
        for stage, x in stages.items():
            error, theirs = (relative_rms(results[name][stage], x) for results in (found, single))
            print(f"{name}, {stage}: relative rms {error:.2e} of the official loop in float64, torch's {theirs:.2e}")
            assert found[name][stage].shape == x.shape
            assert error < 1e-4

    predicted = found["segment"]["out"]
    gaps = np.linalg.norm(exact["segment"]["picture"][..., None, :] - palette.scale(flow.code.colours), axis=-1)
    nearest, second = np.moveaxis(np.partition(gaps, 1, axis=-1)[..., :2], -1, 0)
    error = np.linalg.norm(found["segment"]["picture"] - exact["segment"]["picture"], axis=-1).max()
    agree, ties = predicted[..., 0] == gaps.argmin(-1), second - nearest < 2 * error  # what rounding can turn
    print(f"classes: {len(np.unique(predicted))}, {(~agree).sum()} of {agree.size} differ, {ties.sum()} are near a tie")
    assert (agree | ties).all() and agree.mean() > 0.999
    assert len(np.unique(predicted)) > 10

    expected = np.clip(np.round((exact["synthesize"]["picture"] + 1) * 127.5), 0, 255)
    levels = np.abs(found["synthesize"]["out"] - expected)
    print(f"grey levels: {(levels > 0).mean():.2%} differ, at most by {levels.max():.0f}")
    assert levels.max() <= 1 and (levels > 0).mean() < 0.01


@pytest.mark.parametrize("num_steps", [1, 7, 25, 30, 64, 333])
def test_times_are_the_official_grid(num_steps):
    """Also where the number of steps does not divide 1000, where the authors' integers take another number of steps."""
    times = []

    def field(z, t):
        jax.debug.callback(lambda t: times.append(float(t[0])), t)
        return z

    for run, grid in (
        (solve.image_to_mask, np.arange(num_steps) / num_steps),
        (solve.mask_to_image, 1 - np.arange(num_steps) / num_steps),
    ):
        times.clear()
        jax.block_until_ready(run(field, jnp.ones((1, 1, 1, 1)), num_steps))
        jax.effects_barrier()
        assert len(times) == num_steps
        np.testing.assert_allclose(1000 * np.float64(times), 1000 * grid, atol=1e-4)  # float32 of 1000 is that coarse


@pytest.fixture(scope="module")
def unet_tensors(sd):
    return dict(load_safetensors(sd.path / "unet" / "diffusion_pytorch_model.safetensors"))


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize(
    ("name", "prefix"), [("face.pt", ""), ("face.pt", "module."), ("x.bin", "unet."), ("x.ckpt", "module.unet.")]
)
def test_weights_of_the_authors(flow, sd, tmp_path, name, prefix):
    """A state dict of the UNet alone, in a file of torch.save; the folder beside it says its shape."""
    import torch

    state = {prefix + key: tensor for key, tensor in sd.unet.state_dict().items()}
    torch.save({"state_dict": state} if name.endswith("ckpt") else state, tmp_path / name)
    config, params = load_unet(sd.path, tmp_path / name)
    assert config == flow.unet
    check_same(params, flow.params)


def test_a_file_without_a_config_is_of_a_published_network(sd, tmp_path, unet_tensors):
    save_safetensors(tmp_path / "x.safetensors", unet_tensors)
    with pytest.raises(UserError, match=r"context 768 or 1024 wide, expected, found widths \[32\]"):
        open_unet(tmp_path / "x.safetensors")
    for config in (stable_diffusion.SD_15, stable_diffusion.SD_21):
        key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        save_safetensors(tmp_path / "x.safetensors", {key: np.zeros((1280, config.cross_attention_dim), np.float32)})
        assert open_unet(tmp_path / "x.safetensors")[0] == config


@pytest.fixture
def unet_dir(sd, tmp_path):
    """A folder with the config alone, for other files of weights."""
    (tmp_path / "unet").mkdir()
    shutil.copy(sd.path / "unet" / "config.json", tmp_path / "unet")
    return tmp_path / "unet"


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "3MB"}])
def test_layouts_of_diffusers(flow, sd, unet_dir, options):
    """As diffusers saves them; half precision comes back in single."""
    import torch

    expected, unet = flow.params, sd.unet
    if "variant" in options:
        expected = {key: x.astype(jnp.float16).astype(jnp.float32) for key, x in expected.items()}
        unet = copy.deepcopy(unet).to(torch.float16)
    unet.save_pretrained(unet_dir, **options)
    assert (len(list(unet_dir.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    for path in (unet_dir, unet_dir.parent):
        config, read = open_unet(path, variant=options.get("variant"))
        assert config == flow.unet
        check_same(read(np.asarray), expected)


def test_files_of_torch_in_a_folder(flow, sd, unet_dir):
    sd.unet.save_pretrained(unet_dir, safe_serialization=False)
    assert not list(unet_dir.glob("*.safetensors"))
    check_same(load_unet(unet_dir)[1], flow.params)


def test_one_file_of_everything(flow, unet_tensors, tmp_path):
    """The UNet under Rombach's names, other networks beside it."""
    from test_keys import make_ldm_unet, prefix, rename_all

    from semflow_jax.weights.keys import LDM_UNET

    shapes = prefix("model.diffusion_model", make_ldm_unet(widths=WIDTHS, context=CONTEXT))
    tensors = {key: unet_tensors[path] for path, key in rename_all(shapes, LDM_UNET).items()}
    assert {key: x.shape for key, x in tensors.items()} == shapes
    others = {"first_stage_model.encoder.conv_in.weight": np.zeros((2, 2)), "betas": np.zeros(3)}
    save_safetensors(tmp_path / "everything.safetensors", tensors | others)
    config, read = open_unet(tmp_path / "everything.safetensors", config=flow.unet)
    check_same(read(np.asarray), flow.params)


def test_every_mistake_in_one_line(sd, unet_dir, unet_tensors):
    tensors = dict(unet_tensors)
    del tensors["conv_in.bias"], tensors["conv_out.weight"]
    tensors["wings.weight"] = np.zeros(3, np.float32)
    tensors["conv_norm_out.bias"] = np.zeros(7, np.float32)
    save_safetensors(unet_dir / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(UserError) as caught:
        load_unet(unet_dir)
    message = str(caught.value)
    for part in (
        *(str(unet_dir), "1 keys without a parameter (wings.weight)", "conv_in.bias, conv_out.weight"),
        *("2 parameters without a key", "1 wrong shapes, axes as in memory (conv_norm_out.bias [7] instead of [32])"),
    ):
        assert part in message
    assert "\n" not in message


def test_a_folder_without_networks(tmp_path):
    for load, part in ((load_unet, "unet"), (load_vae, "vae"), (load_context, "text_encoder")):
        with pytest.raises(UserError, match=f"a folder with {part}/config.json expected, found none"):
            load(tmp_path)


@pytest.mark.parametrize("shape", [(77, CONTEXT + 1), (CONTEXT,), (1, 77, CONTEXT)])
def test_a_context_of_another_width(flow, shape):
    with pytest.raises(UserError, match=r"context: \[n, 32\] expected by the network, got \["):
        check_parts(flow.unet, flow.codec, jnp.zeros(shape))


def test_parts_that_do_not_fit(flow):
    check_parts(flow.unet, flow.codec, flow.context)
    with pytest.raises(UserError, match=r"context: \[n, 32\] expected by the network, got none"):
        check_parts(flow.unet, flow.codec, None)
    with pytest.raises(UserError, match=r"context: none expected by the network, got \[77, 32\]"):
        check_parts(dataclasses.replace(flow.unet, cross_attention_dim=None), flow.codec, flow.context)
    with pytest.raises(UserError, match="AutoencoderKL has latents of 4 channels, the network takes 9 and gives 4"):
        check_parts(dataclasses.replace(flow.unet, in_channels=9), flow.codec, flow.context)


def test_a_flow_that_was_saved_takes_no_other_parts(saved):
    for options in ({"unet": "x.pt"}, {"class_names": ["a"]}, {"context": np.zeros((77, CONTEXT), np.float32)}):
        with pytest.raises(UserError, match="unet, context and class_names are for Stable Diffusion's weights"):
            SemFlow.from_pretrained(saved, **options)


@pytest.fixture(scope="module")
def saved(flow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    flow.save_pretrained(folder)
    return folder


def check_same_flow(again, flow):
    check_same(again.params, flow.params)
    jax.tree.map(np.testing.assert_array_equal, again.frozen, flow.frozen)
    assert json.loads(json.dumps(again.config)) == json.loads(json.dumps(flow.config))
    assert (again.unet, again.codec.config["name"], again.card) == (flow.unet, "kl", flow.card)


def test_saved_and_opened_again(flow, saved):
    again = SemFlow.from_pretrained(saved)
    check_same_flow(again, flow)
    z = jnp.ones(LATENT)
    np.testing.assert_array_equal(again.decode(z), flow.decode(z))


def test_saved_as_orbax_over_other_weights(flow, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    save_safetensors(folder / "model.safetensors", {"stale": np.zeros(3)})
    flow.save_pretrained(folder, file_format="orbax")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "frozen.safetensors", "model.orbax")
    ]
    check_same_flow(SemFlow.from_pretrained(folder), flow)
    with pytest.raises(UserError, match="file_format: one of .*, got 'zip'"):
        flow.save_pretrained(folder, file_format="zip")
    with pytest.raises(UserError, match="dtype: one of .*, got 'float8'"):
        flow.save_pretrained(folder, dtype="float8")


def test_diffusers_opens_what_we_write(flow, sd, tmp_path):
    import diffusers

    flow.save_diffusers(tmp_path)
    unet, problems = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert not any(problems.values())
    for ours, theirs in ((unet, sd.unet), (vae, sd.vae)):
        ours.requires_grad_(False)
        expected = {key: x.numpy() for key, x in theirs.state_dict().items()}
        check_same({key: x.numpy() for key, x in ours.state_dict().items()}, expected)
    rng = np.random.default_rng(3)
    z, image = (to_torch(rng.normal(size=shape)).float() for shape in (LATENT, (1, *SIZE, 3)))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)  # PyTorch's sums vary with alignment
    same(*(network(z, 313.7, encoder_hidden_states=sd.context()).sample for network in (unet, sd.unet)))
    same(*(network.decode(z).sample for network in (vae, sd.vae)))
    same(*(network.encode(image).latent_dist.mode() for network in (vae, sd.vae)))
    config, params = load_unet(tmp_path)
    assert config == flow.unet
    check_same(params, flow.params)
    vae_config, vae_params = load_vae(tmp_path)
    assert dataclasses.asdict(vae_config) == flow.codec.config["vae"]
    check_same(vae_params, flow.codec.params)


def test_types_that_do_not_exist(sd):
    with pytest.raises(UserError, match="dtype: one of .*, got 'float7'"):
        SemFlow.from_pretrained(sd.path, dtype="float7")


LOAD = """
import json, pathlib, sys, threading, jax.numpy as jnp
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.weights.stable_diffusion import open_unet

def anonymous():  # kilobytes; pages of the mapped file are not among them
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.001):
        peaks.append(anonymous())

config, read = open_unet(pathlib.Path(sys.argv[1]))
jnp.zeros(3).block_until_ready()
done, peaks, start = threading.Event(), [], anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
params = read(jnp.asarray)
done.set(), watcher.join()
print(json.dumps({"peak": max(peaks) - start, "end": anonymous() - start, "samples": len(peaks)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_loading_keeps_one_tensor_twice(tmp_path):
    """Beyond the weights and a copy of the largest tensor, 75 MB at most of buffers and libraries."""
    config = UNetConfig(block_out_channels=(320, 640), attention=(True, True), num_heads=(8, 8), layers_per_block=2)
    shapes = {path: x.shape for path, x in abstract_unet(config).items()}
    tensors = to_torch_order({path: np.ones(shape, np.float32) for path, shape in shapes.items()}, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config.to_diffusers()))
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    total, largest = (function(x.nbytes for x in tensors.values()) / 2**20 for function in (sum, max))
    del tensors
    # A fixed threshold, or glibc keeps up to 200 MB of what was freed, by luck, and that is not what is measured.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    peak, end = found["peak"] / 2**10, found["end"] / 2**10
    print(f"weights {total:.0f} MB, largest {largest:.0f}; peak {peak:.0f}, end {end:.0f}, {found['samples']} samples")
    assert found["samples"] > 20
    assert total * 0.95 < end
    assert peak < total + largest + 75
