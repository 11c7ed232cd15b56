"""Stable Diffusion 1.5 in small, as diffusers and transformers write it; its networks for comparison."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

WIDTHS = (32, 64, 64, 64)
VAE_WIDTHS = (32, 32, 64, 64)
CONTEXT = 32
SIZE = (64, 128)  # of pictures, the smallest that differs in height and width
SCALE = 0.18215
VOCAB = {"!": 0, "<|startoftext|>": 49406, "<|endoftext|>": 49407}


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where it lies, and the modules of torch that were saved there."""

    path: pathlib.Path
    unet: object
    vae: object
    text: object

    def context(self):
        """[1 77 d] of the empty prompt."""
        import torch

        ids = torch.full((1, 77), 49407)
        ids[0, 0] = 49406
        return self.text(ids).last_hidden_state


def make_networks():
    """UNet, autoencoder and text tower; constants at the start are moved, so that swapped ones show."""
    torch, diffusers, transformers = map(pytest.importorskip, ("torch", "diffusers", "transformers"))
    torch.set_num_threads(1)  # networks so small are slower with more
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=WIDTHS, cross_attention_dim=CONTEXT, attention_head_dim=8, sample_size=64
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=VAE_WIDTHS,
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=512,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=CONTEXT,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=49408,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    with torch.no_grad():
        for network in (unet, vae, text):
            network.eval().requires_grad_(False)
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        vae.decoder.conv_out.weight.mul_(10)  # colours that reach all over the palette
    return unet, vae, text


def write(path: pathlib.Path) -> Folder:
    unet, vae, text = make_networks()
    unet.save_pretrained(path / "unet")
    vae.save_pretrained(path / "vae")
    text.save_pretrained(path / "text_encoder")
    tokenizer = path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(VOCAB))
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    return Folder(path, unet, vae, text)


def to_torch(x, dtype="float32"):
    """b h w c -> b c h w."""
    import torch

    return torch.from_numpy(np.array(x)).movedim(-1, 1).to(getattr(torch, dtype))


def to_numpy(x) -> np.ndarray:
    """The inverse."""
    return x.movedim(1, -1).numpy()


def relative_rms(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))
