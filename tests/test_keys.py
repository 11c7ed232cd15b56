"""weights/keys.py: the single-file names of Stable Diffusion, against its original layout and diffusers' converters.

The layout is written down here as the original constructors build it (ldm/modules/diffusionmodules/openaimodel.py and
model.py), so that it shares nothing with the tables.
"""

import functools

import jax
import numpy as np
import pytest

from semflow_jax.errors import UserError
from semflow_jax.models.build import abstract_unet, make_fns
from semflow_jax.models.unet import UNetConfig
from semflow_jax.models.vae import AutoencoderKL, VAEConfig
from semflow_jax.weights import keys
from semflow_jax.weights.load import fill

SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("logvar", "scale_factor"),
)


def conv(name, n_in, n_out, side=3):
    return {f"{name}.weight": (n_out, n_in, side, side), f"{name}.bias": (n_out,)}


def linear(name, n_in, n_out, bias=True):
    return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {})


def norm(name, n):
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def make_ldm_vae(widths=(128, 256, 512, 512), layers=2, z=4):
    """{key: shape} of ldm's AutoencoderKL."""

    def resnet(name, n_in, n_out):
        shortcut = conv(f"{name}.nin_shortcut", n_in, n_out, 1) if n_in != n_out else {}
        return (
            norm(f"{name}.norm1", n_in)
            | conv(f"{name}.conv1", n_in, n_out)
            | norm(f"{name}.norm2", n_out)
            | conv(f"{name}.conv2", n_out, n_out)
            | shortcut
        )

    def mid(name, n):
        shapes = resnet(f"{name}.block_1", n, n) | norm(f"{name}.attn_1.norm", n) | resnet(f"{name}.block_2", n, n)
        for part in ("q", "k", "v", "proj_out"):
            shapes |= conv(f"{name}.attn_1.{part}", n, n, 1)
        return shapes

    last, width = widths[-1], widths[0]
    shapes = conv("encoder.conv_in", 3, width)
    for i, n in enumerate(widths):
        for j in range(layers):
            shapes |= resnet(f"encoder.down.{i}.block.{j}", width, n)
            width = n
        if i < len(widths) - 1:
            shapes |= conv(f"encoder.down.{i}.downsample.conv", n, n)
    shapes |= mid("encoder.mid", last) | norm("encoder.norm_out", last) | conv("encoder.conv_out", last, 2 * z)
    shapes |= conv("decoder.conv_in", z, last) | mid("decoder.mid", last)
    for i in reversed(range(len(widths))):
        for j in range(layers + 1):
            shapes |= resnet(f"decoder.up.{i}.block.{j}", width, widths[i])
            width = widths[i]
        if i > 0:
            shapes |= conv(f"decoder.up.{i}.upsample.conv", width, width)
    shapes |= norm("decoder.norm_out", width) | conv("decoder.conv_out", width, 3)
    return shapes | conv("quant_conv", 2 * z, 2 * z, 1) | conv("post_quant_conv", z, z, 1)


def make_ldm_unet(
    widths=(320, 640, 1280, 1280), layers=2, context=768, attention=(True, True, True, False), z=4, flat=False
):
    """{key: shape} of ldm's UNetModel; `flat` as in Stable Diffusion 2, whose proj_in and proj_out are linear."""

    def resnet(name, n_in, n_out):
        shortcut = conv(f"{name}.skip_connection", n_in, n_out, 1) if n_in != n_out else {}
        return (
            norm(f"{name}.in_layers.0", n_in)
            | conv(f"{name}.in_layers.2", n_in, n_out)
            | linear(f"{name}.emb_layers.1", 4 * widths[0], n_out)
            | norm(f"{name}.out_layers.0", n_out)
            | conv(f"{name}.out_layers.3", n_out, n_out)
            | shortcut
        )

    def transformer(name, n):
        block = f"{name}.transformer_blocks.0"
        shapes = norm(f"{name}.norm", n)
        for projection in ("proj_in", "proj_out"):
            shapes |= linear(f"{name}.{projection}", n, n) if flat else conv(f"{name}.{projection}", n, n, 1)
        for part, n_kv in (("attn1", n), ("attn2", context)):
            for projection, n_in in (("to_q", n), ("to_k", n_kv), ("to_v", n_kv)):
                shapes |= linear(f"{block}.{part}.{projection}", n_in, n, bias=False)
            shapes |= linear(f"{block}.{part}.to_out.0", n, n)
        shapes |= linear(f"{block}.ff.net.0.proj", n, 8 * n) | linear(f"{block}.ff.net.2", 4 * n, n)
        for i in (1, 2, 3):
            shapes |= norm(f"{block}.norm{i}", n)
        return shapes

    width = widths[0]
    shapes = linear("time_embed.0", width, 4 * width) | linear("time_embed.2", 4 * width, 4 * width)
    shapes |= conv("input_blocks.0.0", z, width)
    skips, number = [width], 1
    for i, n in enumerate(widths):
        for _ in range(layers):
            shapes |= resnet(f"input_blocks.{number}.0", width, n)
            if attention[i]:
                shapes |= transformer(f"input_blocks.{number}.1", n)
            width = n
            skips.append(width)
            number += 1
        if i < len(widths) - 1:
            shapes |= conv(f"input_blocks.{number}.0.op", n, n)
            skips.append(width)
            number += 1
    shapes |= resnet("middle_block.0", width, width) | transformer("middle_block.1", width)
    shapes |= resnet("middle_block.2", width, width)
    number = 0
    for i in reversed(range(len(widths))):
        for j in range(layers + 1):
            shapes |= resnet(f"output_blocks.{number}.0", width + skips.pop(), widths[i])
            width = widths[i]
            if attention[i]:
                shapes |= transformer(f"output_blocks.{number}.1", width)
            if i > 0 and j == layers:
                shapes |= conv(f"output_blocks.{number}.{1 + attention[i]}.conv", width, width)
            number += 1
    return shapes | norm("out.0", width) | conv("out.2", width, z)


def make_clip(n=768, layers=12):
    """{key: shape} of transformers' CLIPTextModel, which ldm keeps under names of its own only at the front."""
    shapes = {"embeddings.position_ids": (1, 77)}
    shapes |= {"embeddings.token_embedding.weight": (49408, n), "embeddings.position_embedding.weight": (77, n)}
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", n, n)
        shapes |= norm(f"{layer}.layer_norm1", n) | norm(f"{layer}.layer_norm2", n)
        shapes |= linear(f"{layer}.mlp.fc1", n, 4 * n) | linear(f"{layer}.mlp.fc2", 4 * n, n)
    return shapes | norm("final_layer_norm", n)


def prefix(name, shapes):
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def make_single_file():
    """{key: shape} of Stable Diffusion 1.5 with its averaged copy, whose names have lost their dots."""
    unet = make_ldm_unet()
    averaged = {f"diffusion_model{key.replace('.', '')}": shape for key, shape in unet.items()}
    return (
        prefix("model.diffusion_model", unet)
        | prefix("model_ema", averaged | {"decay": (), "num_updates": ()})
        | prefix("first_stage_model", make_ldm_vae())
        | prefix("cond_stage_model.transformer.text_model", make_clip())
        | dict.fromkeys(SCHEDULE, (1000,))
    )


def rename_all(shapes, table):
    """{path: key}; no two keys may share a path."""
    paths = [(keys.rename(key, table), key) for key in shapes]
    kept = {path: key for path, key in paths if path is not None}
    assert len(kept) == sum(path is not None for path, _ in paths)
    return kept


def convert_with_diffusers(convert, config):
    """{diffusers name: ldm key} for the whole file, as diffusers converts it: each tensor holds its key's number."""
    torch = pytest.importorskip("torch")
    single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    shapes = make_single_file()
    tensors = {key: torch.full([1] * len(shape), float(i)) for i, (key, shape) in enumerate(shapes.items())}
    names = list(shapes)
    converted = getattr(single_file_utils, convert)(tensors, **config)
    return {name: names[int(tensor.item())] for name, tensor in converted.items()}


@functools.cache
def full_unet():
    return abstract_unet(UNetConfig())


@functools.cache
def abstract_vae(config):
    return make_fns(lambda rngs: AutoencoderKL(config, rngs=rngs))[0]


def test_unet_is_renamed_as_diffusers_does():
    expected = convert_with_diffusers("convert_ldm_unet_checkpoint", {"config": {"layers_per_block": 2}})
    assert rename_all(make_single_file(), keys.LDM_UNET) == expected
    assert len(expected) == 686


def test_vae_is_renamed_as_diffusers_does():
    blocks = {"down_block_types": [None] * 4, "up_block_types": [None] * 4}
    expected = convert_with_diffusers("convert_ldm_vae_checkpoint", {"config": blocks})
    assert rename_all(make_single_file(), keys.LDM_VAE) == expected
    assert len(expected) == 248


def test_clip_is_renamed_as_diffusers_does():
    expected = convert_with_diffusers("convert_ldm_clip_checkpoint", {})
    del expected["text_model.embeddings.position_ids"]
    assert rename_all(make_single_file(), keys.LDM_CLIP) == expected
    assert len(expected) == 196


def check_names_and_shapes(abstract, shapes, table):
    renamed = rename_all(shapes, table)
    assert renamed.keys() == abstract.keys()
    for path, key in renamed.items():
        shape = tuple(shapes[key][i] for i in keys.axes(path, len(shapes[key])))
        assert abstract[path].shape in (shape, shape[2:]), key  # without the sides of a 1 x 1 convolution


def test_names_and_shapes_fit_the_networks():
    shapes = make_single_file()
    check_names_and_shapes(full_unet(), shapes, keys.LDM_UNET)
    check_names_and_shapes(abstract_vae(VAEConfig()), shapes, keys.LDM_VAE)


def test_names_and_shapes_fit_the_unet_of_stable_diffusion_2():
    config = UNetConfig(num_heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True)
    shapes = prefix("model.diffusion_model", make_ldm_unet(context=1024, flat=True))
    check_names_and_shapes(abstract_unet(config), shapes, keys.LDM_UNET)


def test_files_of_one_network_have_no_prefix():
    assert rename_all(make_ldm_vae() | {"loss.logvar": ()}, keys.LDM_VAE).keys() == abstract_vae(VAEConfig()).keys()
    assert rename_all(make_ldm_unet(), keys.LDM_UNET).keys() == full_unet().keys()


def test_clip_without_its_inner_prefix():
    short = prefix("cond_stage_model.transformer", make_clip())
    assert rename_all(short, keys.LDM_CLIP).keys() == rename_all(make_single_file(), keys.LDM_CLIP).keys()


@pytest.mark.parametrize("table", [keys.LDM_UNET, keys.LDM_VAE, keys.LDM_CLIP])
@pytest.mark.parametrize("key", ["surprise.weight", "model_emax.weight", "betas.weight"])
def test_unknown_keys_are_not_dropped(table, key):
    assert keys.rename(key, table) == key


SMALL = VAEConfig(block_out_channels=(2, 2, 4, 4), num_groups=2)


def make_small_ldm_vae():
    rng = np.random.default_rng(0)
    shapes = prefix("first_stage_model", make_ldm_vae(widths=SMALL.block_out_channels))
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def test_convolutions_of_one_pixel_fill_linear_maps():
    tensors = make_small_ldm_vae()
    filled = fill(abstract_vae(SMALL), tensors, keys.LDM_VAE)
    for half in ("encoder", "decoder"):
        for name, part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            expected = tensors[f"first_stage_model.{half}.mid.attn_1.{name}.weight"][:, :, 0, 0].T
            np.testing.assert_array_equal(filled[f"{half}.mid_block.attentions.0.{part}.weight"], expected)
    assert filled["quant_conv.weight"].shape == (1, 1, 8, 8)


@pytest.mark.parametrize("shape", [(4, 4, 1, 3), (4, 4, 3, 1), (4, 2, 1, 1), (1, 1, 4, 4)])
def test_other_convolutions_do_not(shape):
    tensors = make_small_ldm_vae() | {"first_stage_model.encoder.mid.attn_1.q.weight": np.zeros(shape)}
    with pytest.raises(UserError, match=r"1 wrong shapes.*attn_1\.q\.weight"):
        fill(abstract_vae(SMALL), tensors, keys.LDM_VAE)


def test_linear_maps_do_not_fill_convolutions():
    abstract = {"x.weight": jax.ShapeDtypeStruct((1, 1, 3, 4), np.float32)}
    with pytest.raises(UserError, match="1 wrong shapes"):
        fill(abstract, {"x.weight": np.zeros((4, 3))})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder.mid_block.attentions.0.query.weight", "encoder.mid_block.attentions.0.to_q.weight"),
        ("decoder.mid_block.attentions.0.key.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("decoder.mid_block.attentions.0.value.weight", "decoder.mid_block.attentions.0.to_v.weight"),
        ("encoder.mid_block.attentions.0.proj_attn.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
    ],
)
def test_old_names_of_the_vae(old, new):
    assert keys.rename(old, keys.VAE) == new
    assert new in abstract_vae(SMALL)


def test_new_names_of_the_vae_stay():
    abstract = abstract_vae(SMALL)
    assert list(rename_all(abstract, keys.VAE)) == list(abstract)
