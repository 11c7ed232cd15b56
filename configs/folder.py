"""Your own photos and masks: a folder with `images/` and `labels/`, and, if you like, `classes.json` and split lists.

python main.py --config=configs/folder.py --config.data.source=MY_FOLDER --workdir=runs/mine

The defaults suit a few hundred to a few thousand small pictures on one accelerator or a patient CPU.
"""

from configs import base


def get_config():
    c = base.get_config()
    with c.unlocked():
        c.num_steps = 20_000
        c.batch_size = 16
        c.data.name = "folder"
        c.data.size = (128, 128)
        c.codec.whiten = 0.5
        c.mask_code.name = "linear"
        c.mask_code.pixel = 0.1
        c.mask_code.region = 2.0
        c.model.block_out_channels = (64, 96, 128)
        c.model.skip = True
        c.optim.ema = 0.998
        c.optim.flatten = True
        c.eval_every = 2000
    return c.lock()
