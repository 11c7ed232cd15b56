"""Between the two: latents for PyTorch to train on, and the network it trained as a model of ours.

python benchmarks/peer/bridge.py export CONFIG LATENTS     images, splits and codec are those of the config
python benchmarks/peer/bridge.py adopt CONFIG LATENTS OUT  OUT/unet.safetensors -> OUT/export, for `semflow evaluate`
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from semflow_jax import noise
from semflow_jax.codec import load_codec
from semflow_jax.config_file import load_config
from semflow_jax.data.pipeline import make_eval_batches
from semflow_jax.data.prepare import ensure
from semflow_jax.data.records import load_info, open_records
from semflow_jax.errors import UserError
from semflow_jax.mask_code import make_mask_code
from semflow_jax.models.build import abstract_unet, count_params, make_velocity_fn
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.pipeline import EXPORT, SemFlow, make_config
from semflow_jax.sampling import Sampler
from semflow_jax.weights.load import fill, load_safetensors

OFFICIAL = ConfigDict({"name": "colour", "palette": "grid", "pixel": 0.1, "region": 0.0})
BATCH_SIZE = 16
NUM_TEST = 16  # images whose paths both sides integrate
MAX_ERROR = 1e-3  # of the ends of their paths, relative


def make_parts(c: ConfigDict):
    """The network's shape, without our `skip`, and a sampler with the official mask code."""
    if c.codec.name == "patch":
        raise UserError("codec.name: a pretrained autoencoder expected, got 'patch'; the official recipe has one")
    codec = load_codec(c.codec)
    m = {key: value for key, value in c.model.to_dict().items() if key not in ("skip", "remat")}
    unet = UNetConfig(in_channels=codec.channels, out_channels=codec.channels, **m)
    code = make_mask_code(OFFICIAL, codec, load_info(ensure(c.data)).num_classes, {})
    return unet, Sampler(make_velocity_fn(unet), codec, code)


def export(c: ConfigDict, out: pathlib.Path, draws: int) -> None:
    """Writes train.npz, z0 [n 2 h w c] of images and their mirror images and z1 [n 2 draws h w c] of their perturbed
    masks, in float16; test.npz, z0 and z1 of some test images; network.json; data.json, where the data are.
    """
    unet, sampler = make_parts(c)
    data_dir = ensure(c.data)

    @jax.jit
    def encode(frozen, image, label, key):
        z1 = jax.lax.map(lambda k: sampler.encode_mask(frozen, label, k), jax.random.split(key, draws))
        return sampler.encode_image(frozen, image), z1

    records, key = open_records(data_dir, "train"), jax.random.key(c.seed)
    found: dict[str, list[np.ndarray]] = {"z0": [], "z1": []}
    for start in range(0, len(records), BATCH_SIZE):
        chosen = [records[min(i, len(records) - 1)] for i in range(start, start + BATCH_SIZE)]  # one shape
        num = min(BATCH_SIZE, len(records) - start)
        pictures, labels = (np.stack([example[name] for example in chosen]) for name in ("image", "label"))
        sides = []
        for mirrored, step in enumerate((1, -1)):
            k = jax.random.fold_in(key, 2 * start + mirrored)
            sides.append(encode(sampler.frozen, pictures[:, :, ::step], labels[:, :, ::step], k))
        found["z0"].append(np.stack([z0[:num] for z0, _ in sides], 1).astype(np.float16))
        found["z1"].append(np.stack([np.moveaxis(z1[:, :num], 0, 1) for _, z1 in sides], 1).astype(np.float16))
    batch = next(make_eval_batches(data_dir, "test", NUM_TEST, limit=NUM_TEST))
    keys = noise.example_keys(key, jnp.asarray(batch["index"]))
    z0 = sampler.encode_image(sampler.frozen, jnp.asarray(batch["image"]))
    z1 = sampler.encode_mask(sampler.frozen, jnp.asarray(batch["label"]), keys)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "test.npz", z0=z0, z1=z1)
    (out / "network.json").write_text(json.dumps(dataclasses.asdict(unet), indent=1))
    (out / "data.json").write_text(json.dumps({"dir": str(data_dir)}))
    np.savez(out / "train.npz", **{name: np.concatenate(parts) for name, parts in found.items()})


def adopt(c: ConfigDict, latents: pathlib.Path, out: pathlib.Path) -> None:
    """Saves PyTorch's network as a model, after a look at whether both find the same ends of the same paths.

    Raises:
        UserError: they do not, or the networks have other parameters.
    """
    unet, sampler = make_parts(c)
    path = out / "unet.safetensors"
    params = fill(abstract_unet(unet), load_safetensors(path), place=path, put=jnp.asarray)
    with c.unlocked():
        c.sampling.update(solver="euler", steps=25)
    info = load_info(ensure(c.data))
    config = make_config(c, unet, sampler.codec, sampler.code, info)
    flow = SemFlow(config, params, sampler.codec, sampler.code, None, f"# The official recipe on {info.name}\n")
    with np.load(latents / "test.npz") as begin, np.load(out / "ends.npz") as end:
        ways = {"z1": (sampler.to_mask, begin["z0"]), "z0": (sampler.to_image, begin["z1"])}
        for name, (solve, z) in ways.items():
            solve = jax.jit(solve, static_argnums=(3, 4))
            ours, theirs = solve(params, sampler.frozen, jnp.asarray(z), 25, "euler"), end[name]
            error = float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))
            print(f"{name} after 25 steps, here and in PyTorch: relative difference {error:.1e}")
            if not error <= MAX_ERROR:
                raise UserError(f"{path}: both networks must agree to {MAX_ERROR}, found {error}; they are not alike")
    flow.save_pretrained(out / EXPORT)
    print(f"{count_params(params):,} parameters, as many as ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "adopt"))
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("latents", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path, nargs="?")
    parser.add_argument("--draws", type=int, default=8, help="perturbations of each mask")
    args = parser.parse_args()
    c = load_config(args.config)
    if args.what == "export":
        export(c, args.latents, args.draws)
    else:
        adopt(c, args.latents, args.out)


if __name__ == "__main__":
    main()
