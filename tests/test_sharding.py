"""The step on meshes of eight virtual devices: the same losses, and every device with its share only."""

import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices
from test_step import NUM_CLASSES, make_config
from test_unet import make_random_params

from semflow_jax import coupling, parallel
from semflow_jax.codec import load_codec
from semflow_jax.data.pipeline import TrainBatches
from semflow_jax.mask_code import make_mask_code
from semflow_jax.models.build import make_velocity_fn
from semflow_jax.models.unet import UNetConfig
from semflow_jax.sampling import Sampler
from semflow_jax.train.checkpoint import Checkpoints
from semflow_jax.train.optim import make_optimizer
from semflow_jax.train.step import make_state, make_train_step

NUM_STEPS = 20
WIDE = {
    "model.block_out_channels": (32, 64),
    "model.attention": (False, True),
    "model.num_heads": (4, 4),
    "model.num_groups": 8,
    "mask_code.pixel": 0.1,
    "optim.lr": 1e-3,
}
SPLIT = "down_blocks.1.resnets.0.conv1.weight"  # [3 3 32 64]
MESHES = {
    "one device": {"mesh.data": 1},
    "data": {},
    "fsdp": {"mesh.fsdp": 8},
    "data x fsdp": {"mesh.fsdp": 4},
    "tensor": {"mesh.tensor": 4},
    "all three": {"mesh.fsdp": 2, "mesh.tensor": 2},
    "accumulated": {"mesh.fsdp": 4, "optim.accum_steps": 2},
    "explicit": {"mesh.explicit": True},
    "explicit fsdp, accumulated": {"mesh.explicit": True, "mesh.fsdp": 4, "optim.accum_steps": 2},
}
SHARES = {  # of the 3 x 3 x 32 x 64 weights of SPLIT, on a device
    "fsdp": (3, 3, 32, 8),
    "data x fsdp": (3, 3, 32, 16),
    "tensor": (3, 3, 32, 16),
    "all three": (3, 3, 16, 32),
    "explicit fsdp, accumulated": (3, 3, 32, 16),
}


def make_parts(**changes):
    """Mesh, step, state in its shards, and frozen parameters."""
    c = make_config(**WIDE | changes)
    devices = jax.devices()[: c.mesh.data] if c.mesh.data > 0 else jax.devices()
    mesh = parallel.make_mesh(c.mesh, devices)
    codec = load_codec(c.codec)
    codec, code = coupling.couple(c.objective, codec, make_mask_code(c.mask_code, codec, NUM_CLASSES, {}))
    unet = UNetConfig(in_channels=codec.channels, out_channels=codec.channels, **c.model)
    sampler = Sampler(make_velocity_fn(unet), codec, code)
    optimizer = make_optimizer(c.optim, 100)
    params = make_random_params(unet)
    layout = parallel.shardings(jax.eval_shape(lambda: make_state(params, optimizer)), mesh)
    state = jax.jit(lambda: make_state(params, optimizer), out_shardings=layout)()
    return mesh, jax.jit(make_train_step(sampler, optimizer, c, mesh), donate_argnums=0), state, sampler.frozen


def make_batch(num: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (num, 16, 16, 3), np.uint8),
        "label": rng.integers(0, NUM_CLASSES + 1, (num, 16, 16, 1)).astype(np.uint8),  # one more: void
        "index": np.arange(num, dtype=np.int32),
    }


def losses_on(changes: dict) -> dict:
    """Losses of `NUM_STEPS` steps, and the shape that a device holds of `SPLIT`."""
    mesh, step, state, frozen = make_parts(**changes)
    batch = parallel.to_global(make_batch(), mesh)
    assert len({str(shard.index) for shard in batch["image"].addressable_shards}) == parallel.num_batch_shards(mesh)
    losses = []
    for _ in range(NUM_STEPS):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    moments = state["opt_state"][1][0]
    shares = [
        x[SPLIT].addressable_shards[0].data.shape for x in (state["params"], state["ema"], moments.mu, moments.nu)
    ]
    assert len(set(shares)) == 1
    return {"losses": losses, "share": shares[0]}


def losses_on_all(*names: str) -> dict:
    return {name: losses_on(MESHES[name]) for name in names}


def losses_of(*changes: dict) -> list[dict]:
    return [losses_on(x) for x in changes]


@pytest.fixture(scope="module")
def found(request):
    """Of those meshes that are asked for: each takes a compilation."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = {spec.params["name"] for spec in chosen if spec is not None}
    return virtual_devices.run("test_sharding", "losses_on_all", "one device", *sorted(names))


def marked(names):
    """Two meshes use all axes and both forms of the step; each of the others is one of their parts."""
    both = ("all three", "explicit fsdp, accumulated")
    return [pytest.param(name, marks=() if name in both else pytest.mark.long) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(list(MESHES)[1:]))
def test_losses_do_not_depend_on_the_mesh(found, name):
    one = found["one device"]["losses"]
    assert len(set(one)) == NUM_STEPS and one[-1] < one[0]
    np.testing.assert_allclose(found[name]["losses"], one, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.long
def test_neither_do_those_of_jumps_and_of_two_halves():
    changes = {"objective": "symmflow", "model.intervals": True, "loss.shortcut_every": 2}
    explicit = {"mesh.explicit": True, "mesh.fsdp": 4}
    one, other = virtual_devices.run("test_sharding", "losses_of", changes | {"mesh.data": 1}, changes | explicit)
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(SHARES))
def test_devices_hold_their_share_only(found, name):
    assert tuple(found[name]["share"]) == SHARES[name]


def save_on_eight(workdir: str) -> str:
    _, step, state, frozen = make_parts(**{"mesh.fsdp": 4, "mesh.tensor": 2})
    state, _ = step(state, frozen, make_batch(), jax.random.key(0))
    checkpoints = Checkpoints(pathlib.Path(workdir))
    checkpoints.save(state, mock.Mock(spec=TrainBatches, seen=16))
    checkpoints.close()
    return parallel.digest(state["params"])


def restore_on_fewer(workdir: str) -> list[str]:
    """Digests of the parameters as 1, 2, 4 and 8 devices read them, in other shards each."""
    digests = []
    _, _, state, _ = make_parts()
    for num in (1, 2, 4, 8):
        mesh = parallel.make_mesh({"fsdp": num}, jax.devices()[:num])
        layout = parallel.shardings(state, mesh)
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
        checkpoints = Checkpoints(pathlib.Path(workdir))
        restored = checkpoints.restore(placed)
        assert restored is not None and restored["params"][SPLIT].sharding == layout["params"][SPLIT]
        digests.append(parallel.digest(restored["params"]))
        checkpoints.close()
    return digests


@pytest.mark.long
@pytest.mark.slow
def test_checkpoints_move_between_meshes(tmp_path):
    saved = virtual_devices.run("test_sharding", "save_on_eight", str(tmp_path))
    assert virtual_devices.run("test_sharding", "restore_on_fewer", str(tmp_path)) == [saved] * 4


def test_shares_of_parameters():
    devices = np.array(jax.devices() * 8).reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, parallel.AXES)
    cases = {
        ("down_blocks.0.resnets.0.conv1.weight", (3, 3, 64, 128)): (None, None, "fsdp", "tensor"),
        ("down_blocks.0.resnets.0.conv2.weight", (3, 3, 128, 64)): (None, None, "tensor", "fsdp"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", (320, 320)): ("fsdp", "tensor"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight", (320, 320)): ("tensor", "fsdp"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", (320, 2560)): ("fsdp", "tensor"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight", (1280, 320)): ("tensor", "fsdp"),
        ("time_embedding.linear_1.weight", (320, 1280)): (None, "fsdp"),
        ("mid_block.resnets.0.norm1.weight", (1280,)): (),
        ("conv_odd.weight", (3, 3, 81, 81)): (None, None, None, None),
    }
    for (path, shape), expected in cases.items():
        assert tuple(parallel.param_spec(path, shape, mesh)) == expected
        whole = parallel.param_spec(path, shape, mesh, fsdp=False)
        assert tuple(whole) == tuple(None if axis == "fsdp" else axis for axis in expected)


def test_moments_and_average_lie_with_their_parameter():
    params = {"conv1.weight": jnp.zeros((3, 3, 64, 64)), "norm.weight": jnp.zeros(8)}
    state = make_state(params, make_optimizer(make_config().optim, 10))
    mesh = jax.sharding.Mesh(np.array(jax.devices() * 8).reshape(2, 4, 1), parallel.AXES)
    layout = parallel.shardings(state, mesh)
    moments = layout["opt_state"][1][0]
    for tree in (layout["params"], layout["ema"], moments.mu, moments.nu):
        assert tree["conv1.weight"].spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")
        assert tree["norm.weight"].spec == jax.sharding.PartitionSpec()
    assert moments.count.spec == layout["step"].spec == jax.sharding.PartitionSpec()
