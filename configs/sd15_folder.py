"""Stable Diffusion 1.5 fine-tuned on your folder by the paper's recipe for CelebAMask-HQ: 512 x 512, its colours.

python main.py --config=configs/sd15_folder.py --config.data.source=MY_FOLDER --workdir=runs/mine

860M parameters, trained with AdamW and averaged: accelerators of 16 GB and more. `--config.init` takes any weights of
Stable Diffusion 1 or 2: a folder of diffusers, a single file, a repository of the Hugging Face hub; or a trained flow.
"""

from configs import paper


def get_config():
    c = paper.get_config()
    with c.unlocked():
        c.num_steps = 80_000
        c.batch_size = 32  # the paper's, of each device
        c.data.name = "folder"
        c.loss.mask_void = True
        c.optim.lr = 2e-5
        c.optim.ema = 0.9999
    return c.lock()
