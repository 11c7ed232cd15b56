"""Stable Diffusion 1 and 2 as published: a folder of diffusers, or one file of everything. Each network by itself.

A folder holds `unet/`, `vae/`, `text_encoder/` and `tokenizer/`, each with a `config.json` and weights. One file of
everything (`v1-5-pruned.safetensors`, `.ckpt`) has the names of Rombach's `ldm` and no config. A UNet alone may also be
a state dict with diffusers' names, such as the SemFlow authors' checkpoints.
"""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from semflow_jax.data.info import cache_dir
from semflow_jax.errors import UserError
from semflow_jax.models.build import Params, abstract_unet, make_fns
from semflow_jax.models.clip_text import CLIPText, CLIPTextConfig, empty_prompt_ids, load_pad_id
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.models.vae import AutoencoderKL, VAEConfig
from semflow_jax.weights import files, keys
from semflow_jax.weights.export import to_torch
from semflow_jax.weights.load import fill, save_safetensors

UNET, VAE, TEXT, TOKENIZER = "unet", "vae", "text_encoder", "tokenizer"
# Of a repository: the weights in full precision, whole or in shards, and none of the other files of everything.
PATTERNS = [f"{part}/*.json" for part in (UNET, VAE, TEXT, TOKENIZER)] + [
    f"{part}/{stem}{shard}.safetensors"
    for part, stem, shard in itertools.product((UNET, VAE, TEXT), files.STEMS, ("", "-*"))
]
SD_15 = UNetConfig()
SD_21 = UNetConfig(num_heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True)
Put = Callable[[np.ndarray], Any]


def find_pretrained(
    path: str,
    revision: str | None = None,
    token: str | bool | None = None,
    offline: bool = False,
    more: Sequence[str] = (),
) -> pathlib.Path:
    """A local file or folder as it is; anything else is a repository of the Hugging Face hub, and downloaded.

    Args: more: files to download beside Stable Diffusion's; the rest: see `files.download`.

    Raises:
        UserError: neither.
    """
    local = pathlib.Path(os.path.expandvars(path)).expanduser()
    if local.exists():
        return local
    return files.download(path, [*PATTERNS, *more], revision, token, offline)


def _part(path: pathlib.Path, name: str) -> pathlib.Path:
    """The folder of one network: below the root, or the path itself."""
    for folder in (path / name, path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: a folder with {name}/config.json expected, found none; download {name}/ whole")


def _read(path: pathlib.Path, name: str, variant: str | None) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """config.json and tensors of a network; a file has no config."""
    if not path.is_dir():
        return None, files.load_tensors(path)
    folder = _part(path, name)
    return files.load_json(folder / "config.json"), files.load_all(files.find_network(folder, variant))


def _is_ldm(tensors: Mapping[str, np.ndarray]) -> bool:
    return any(key.startswith("model.diffusion_model.") for key in tensors)


def _guess_unet(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> UNetConfig:
    """The published network that a file without a config belongs to, by the width of its context."""
    widths = {x.shape[1] for key, x in tensors.items() if key.endswith("attn2.to_k.weight")}
    for config in (SD_15, SD_21):
        if widths == {config.cross_attention_dim}:
            return config
    raise UserError(
        f"{path}: a UNet of Stable Diffusion 1 or 2, with a context 768 or 1024 wide, expected, found widths "
        f"{sorted(widths)}; give the diffusers folder it belongs to"
    )


def open_unet(
    path: pathlib.Path, config: UNetConfig | None = None, variant: str | None = None
) -> tuple[UNetConfig, Callable[[Put], Params]]:
    """The velocity network's config, and a function that reads its weights.

    Args:
        path: a folder of diffusers or its `unet`, one file of everything, or a state dict.
        config: of a file; by default guessed between Stable Diffusion 1 and 2.
        variant: 'fp16' and the like, of the file in a folder.

    Returns:
        The config, and read(put) -> params; `put` says where each tensor goes as soon as it is read, see
        `weights.load.fill`.

    Raises:
        UserError: not there, broken, or not such a network; the function, where names or shapes don't match.
    """
    found, tensors = _read(path, UNET, variant)
    if found is not None:
        config, table = UNetConfig.from_diffusers(found), keys.UNET
    else:
        config, table = config or _guess_unet(tensors, path), keys.LDM_UNET if _is_ldm(tensors) else keys.UNET
    abstract = abstract_unet(config)
    return config, lambda put: fill(abstract, tensors, table, str(path), put)


def load_unet(path: pathlib.Path, unet: pathlib.Path | None = None, put: Put = np.asarray) -> tuple[UNetConfig, Params]:
    """Config and weights of `open_unet`.

    Args: unet: where the weights come from instead; a file has the config in the folder `path`, where there is one.
    """
    file = path / UNET / "config.json"
    config = UNetConfig.from_diffusers(files.load_json(file)) if unet is not None and file.is_file() else None
    config, read = open_unet(path if unet is None else unet, config)
    return config, read(put)


def load_vae(path: pathlib.Path, variant: str | None = None, put: Put = np.asarray) -> tuple[VAEConfig, Params]:
    """The autoencoder's config and weights, from a folder of diffusers or its `vae`, or one file of everything."""
    found, tensors = _read(path, VAE, variant)
    if found is not None:
        config, table = VAEConfig.from_diffusers(found), keys.VAE
    else:
        config, table = VAEConfig(), (*keys.LDM_VAE, *keys.VAE)  # the first leaves diffusers' names as they are
    abstract, _ = make_fns(lambda rngs: AutoencoderKL(config, rngs=rngs))
    return config, fill(abstract, tensors, table, str(path), put)


def load_context(path: pathlib.Path, variant: str | None = None) -> Float[np.ndarray, "n d"]:
    """What the text tower says of the empty prompt, [77, 768] for Stable Diffusion 1; computed once, then cached."""
    if path.is_dir():
        folder = _part(path, TEXT)
        config, table = CLIPTextConfig.from_dict(files.load_json(folder / "config.json")), keys.CLIP_TEXT
        sources = files.find_network(folder, variant)
        pad_id = load_pad_id(folder.with_name(TOKENIZER))
    else:
        config, table, sources, pad_id = CLIPTextConfig(), keys.LDM_CLIP, [path], load_pad_id(path.with_name(TOKENIZER))
    stamp = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    name = hashlib.sha256(repr((config, pad_id, stamp)).encode()).hexdigest()[:16]
    cached = cache_dir() / "contexts" / f"{name}.npy"
    if cached.is_file():
        return np.load(cached)
    abstract, (encode,) = make_fns(lambda rngs: CLIPText(config, rngs=rngs), "__call__")
    params = fill(abstract, files.load_all(sources), table, str(path))
    context = np.asarray(jax.jit(encode)(params, empty_prompt_ids(pad_id))[0])
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_name(f".{name}.{os.getpid()}.npy")
    np.save(part, context)
    os.replace(part, cached)
    return context


def save_diffusers(
    folder: pathlib.Path,
    unet: tuple[UNetConfig, Mapping[str, Array]],
    vae: tuple[VAEConfig, Mapping[str, Array]] | None = None,
) -> None:
    """Writes `unet/` and `vae/` so that diffusers' `from_pretrained` opens them.

    Raises:
        UserError: a UNet that diffusers has no word for; nothing is written then.
    """
    networks: dict[str, tuple[UNetConfig | VAEConfig, Mapping[str, Array]]] = {UNET: unet}
    networks |= {} if vae is None else {VAE: vae}
    configs = {name: config.to_diffusers() for name, (config, _) in networks.items()}
    for name, (_, params) in networks.items():
        file = folder / name / f"{files.STEMS[0]}.safetensors"
        save_safetensors(file, to_torch(params, "float32"), {"format": "pt"})
        file.with_name("config.json").write_text(json.dumps(configs[name], indent=2))
