"""Clothing Co-Parsing, 804 / 100 / 100 photos of street fashion at 128 x 96, 17 classes, through the autoencoder TAEF2.

SEMFLOW_SHARED=../shared python main.py --config=configs/ccp_fashion.py --workdir=runs/ccp_fashion

The classes are the merged ones of its classes.json. The paper's colours: see `configs/camvid.py`.
"""

from configs import base


def get_config():
    c = base.get_config()
    with c.unlocked():
        c.num_steps = 1500
        c.batch_size = 8
        c.cpu_devices = 2
        c.data.name = "folder"
        c.data.source = "$SEMFLOW_SHARED/data/ccp_fashion"
        c.data.size = (128, 96)  # of photos whose height is 1.5 times their width
        c.codec.name = "taef2"
        c.codec.path = "$SEMFLOW_SHARED/weights/taef2/taef2_fp16.safetensors"
        c.model.block_out_channels = (64, 96, 128)
        c.model.skip = True
        c.optim.lr = 1e-3
        c.optim.warmup = 100
        c.optim.b2 = 0.99
        c.optim.ema = 0.995
        c.optim.flatten = True
        c.sampling.steps = 10
        c.eval.limit = 32
        c.eval.batch_size = 16
        c.log_every = 25
        c.eval_every = 500
        c.checkpoint_every = 250
    return c.lock()
