"""Tables: how the names and axes of a checkpoint become those of the modules.

Parameter paths are the checkpoint's keys, so a table holds only what differs: rules (pattern, replacement), applied in
order by `re.sub`. A replacement of None drops the tensor on purpose. Keys that no rule matches stay as they are.

Stable Diffusion comes in two forms: diffusers' folders with a file per network, whose names the modules have, and one
file of everything with the names of Rombach's `ldm`, from which each LDM_ table takes its own network.
"""

import re
from collections.abc import Callable, Sequence

Table = Sequence[tuple[str, str | Callable[[re.Match[str]], str] | None]]

# The original files count the decoder's leading clamp as a layer; diffusers, whose keys hold `.layers.`, does not.
TINY_VAE: Table = (
    (r"^encoder\.(?=\d)", "encoder.layers."),
    (r"^decoder\.(\d+)", lambda match: f"decoder.layers.{int(match[1]) - 1}"),
)

# Trainers that wrap the network leave their attribute's name in front.
UNET: Table = ((r"^(module\.)?(unet\.)?", ""),)

# transformers 5 leaves out the prefix; its early versions saved the numbers 0..76 of the positions too.
CLIP_TEXT: Table = (
    (r"position_ids$", None),
    (r"^(?!text_model\.)", "text_model."),
)

# diffusers renamed the attention's layers in 2023; files from before, SD-1.5's among them, keep the old names.
VAE: Table = (
    (r"\.(query|key|value)\.(?=weight$|bias$)", lambda match: f".to_{match[1][0]}."),
    (r"\.proj_attn\.", ".to_out.0."),
)


def _drop(*prefixes: str) -> Table:
    """Rules that leave out networks by prefix, the averaged copy, and the buffers of the noise schedule."""
    return (
        (rf"^({'|'.join(prefixes)}|model_ema)\.", None),
        (r"^(betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|scale_factor)$", None),
    )


# Levels count by resolution on both paths, diffusers' in the order they run. For files with four levels.
LDM_VAE: Table = (
    *_drop("model", "cond_stage_model", "loss"),
    (r"^first_stage_model\.", ""),
    (r"^encoder\.down\.(\d)", r"encoder.down_blocks.\1"),
    (r"^decoder\.up\.(\d)", lambda match: f"decoder.up_blocks.{3 - int(match[1])}"),
    (r"(?<=_blocks\.\d)\.block\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(?<=\.attentions\.0)\.norm\.", ".group_norm."),
    (r"(?<=\.attentions\.0)\.([qkv])\.", r".to_\1."),
    (r"(?<=\.attentions\.0)\.proj_out\.", ".to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def _layer(path: str, index: int, part: str) -> str:
    """Blocks come in threes, one three a level; in a block, 0 is the resnet and 1 the transformer."""
    return f"{path}_blocks.{index // 3}.{('resnets', 'attentions')[int(part)]}.{index % 3}."


# Stable Diffusion 1 and 2: two layers a level. The third block of a level is the down-sampler on the way down; on the
# way up it is a layer with the up-sampler as its last part. Within transformers the names agree.
LDM_UNET: Table = (
    *_drop("first_stage_model", "cond_stage_model"),
    (r"^model\.diffusion_model\.", ""),
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.0\.op\.", lambda match: f"down_blocks.{int(match[1]) // 3 - 1}.downsamplers.0.conv."),
    (r"^input_blocks\.(\d+)\.([01])\.", lambda match: _layer("down", int(match[1]) - 1, match[2])),
    (r"^middle_block\.([02])\.", lambda match: f"mid_block.resnets.{int(match[1]) // 2}."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^output_blocks\.(\d+)\.[12]\.conv\.", lambda match: f"up_blocks.{int(match[1]) // 3}.upsamplers.0.conv."),
    (r"^output_blocks\.(\d+)\.([01])\.", lambda match: _layer("up", int(match[1]), match[2])),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
)

# Stable Diffusion 1's text tower, a CLIPTextModel; some files leave `text_model.` out.
LDM_CLIP: Table = (
    *_drop("model", "first_stage_model"),
    (r"\.position_ids$", None),
    (r"^cond_stage_model\.transformer\.(text_model\.)?", "text_model."),
)


def rename(key: str, table: Table) -> str | None:
    """Returns the parameter path of a checkpoint's key, None where the table drops it."""
    for pattern, replacement in table:
        if replacement is None:
            if re.search(pattern, key):
                return None
        else:
            key = re.sub(pattern, replacement, key)
    return key


def axes(path: str, ndim: int) -> tuple[int, ...]:
    """Returns the order of PyTorch's axes in memory: OIHW -> HWIO, [out, in] -> [in, out]; embeddings stay."""
    if ndim == 4:
        return 2, 3, 1, 0
    if ndim == 2 and not path.endswith("embedding.weight"):
        return 1, 0
    return tuple(range(ndim))
