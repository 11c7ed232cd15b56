"""The recipe that did best in docs/results.md: CamVid, or another config's data, codec and network behind a colon.

SEMFLOW_SHARED=../shared python main.py --config=configs/semflow_plus.py --workdir=runs/plus
SEMFLOW_SHARED=../shared python main.py --config=configs/semflow_plus.py:ccp_fashion --workdir=runs/plus_fashion
"""

import importlib


def get_config(data: str = "camvid"):
    c = importlib.import_module(f"configs.{data}").get_config()
    with c.unlocked():
        c.batch_size = 16
        c.data.latents = True  # the image encoder takes longer than a step of the network
        c.mask_code.name = "learned"
        c.mask_code.pixel = 1.0
        c.mask_code.region = 0.0
        c.mask_code.learned.encoder = "codec"
        c.mask_code.learned.noise = 0.7
        c.mask_code.learned.steps = 400
        c.mask_code.learned.batch_size = 8
        c.mask_code.learned.lr = 4e-3
        c.optim.warmup = 50
    return c.lock()
