"""Stable Diffusion 1.5 fine-tuned on your folder by the paper's recipe for CelebAMask-HQ: 512 x 512, its colours.

python main.py --config=configs/sd15_folder.py --config.data.source=MY_FOLDER --workdir=runs/mine

860M parameters, trained with AdamW and averaged: accelerators of 16 GB and more. `--config.init` takes any weights of
Stable Diffusion 1 or 2: a folder of diffusers, a single file, a repository of the Hugging Face hub; or a trained flow.
"""

from configs import base


def get_config():
    c = base.get_config()
    with c.unlocked():
        c.init = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        c.num_steps = 80_000
        c.batch_size = 32  # the paper's, of each device
        c.data.name = "folder"
        c.data.size = (512, 512)
        c.data.num_workers = 8
        c.codec.name = "kl"
        c.mask_code.palette = "grid"
        c.model.dtype = "bfloat16"
        c.model.remat = "blocks"
        c.optim.lr = 2e-5
        c.optim.schedule = "linear"
        c.optim.warmup = 500
        c.optim.ema = 0.9999
        c.eval_every = 5000
        c.checkpoint_every = 1000
    return c.lock()
