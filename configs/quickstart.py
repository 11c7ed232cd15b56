"""Avatars from nothing on a laptop with two cores, in under ten minutes: `bash launch/quickstart.sh`."""

from configs import base


def get_config():
    c = base.get_config()
    with c.unlocked():
        c.num_steps = 1200
        c.batch_size = 16
        c.cpu_devices = 2
        c.data.name = "avatars"
        c.data.size = (64, 64)
        c.data.num_train = 4000
        c.data.num_val = 200
        c.codec.whiten = 0.5
        c.mask_code.name = "linear"
        c.mask_code.pixel = 0.1
        c.mask_code.region = 2.0
        c.model.block_out_channels = (40, 64, 80)
        c.model.skip = True
        c.optim.lr = 2e-3
        c.optim.warmup = 100
        c.optim.b2 = 0.99
        c.optim.ema = 0.995
        c.optim.flatten = True
        c.sampling.steps = 10
        c.eval.limit = 64
        c.eval.batch_size = 40
        c.log_every = 20
        c.eval_every = 400
        c.checkpoint_every = 200
    return c.lock()
