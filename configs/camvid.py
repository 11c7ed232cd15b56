"""CamVid street scenes, 367 / 101 / 233 photos at 96 x 128, through the tiny autoencoder TAEF2.

SEMFLOW_SHARED=../shared python main.py --config=configs/camvid.py --workdir=runs/camvid

The paper's colours: --config.mask_code.palette=grid --config.mask_code.pixel=0.1 --config.mask_code.region=0.0
"""

from configs import base


def get_config():
    c = base.get_config()
    with c.unlocked():
        c.num_steps = 1500
        c.batch_size = 8
        c.cpu_devices = 2
        c.data.name = "camvid"
        c.data.source = "$SEMFLOW_SHARED/data/camvid"
        c.data.size = (96, 128)
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
