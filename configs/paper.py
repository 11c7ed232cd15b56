"""What the runs of the paper have in common: Stable Diffusion 1.5, its autoencoder, a grid of colours, no average.

A config of its own derives from it; see celebamask_hq.py, coco_stuff.py, cityscapes.py. The weights come from
`--config.init`: a folder of diffusers, a single file, or a repository of the Hugging Face hub.
"""

from configs import base


def get_config():
    c = base.get_config()
    with c.unlocked():
        c.init = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        c.data.size = (512, 512)
        c.data.num_workers = 8
        c.mesh.data = 1
        c.mesh.fsdp = -1  # what is stored is divided among all devices
        c.mesh.explicit = True  # and each runs its own program: see docs/scaling.md
        c.codec.name = "kl"
        c.codec.dtype = "bfloat16"  # the authors' autoencoder computes in half precision, too
        c.mask_code.palette = "grid"
        c.loss.mask_void = False
        c.model.dtype = "bfloat16"
        c.model.remat = "blocks"
        c.optim.schedule = "linear"
        c.optim.warmup = 500
        c.optim.ema = 0.0  # the paper has none
        c.eval_every = 5000
        c.checkpoint_every = 1000
    return c.lock()
