"""Cityscapes, 19 classes, 2975 / 500 street scenes at 512 x 1024, by the paper's recipe.

semflow prepare cityscapes --source CITYSCAPES --out DATA --size 512 1024
python main.py --config=configs/cityscapes.py --config.data.dir=DATA --workdir=runs/cityscapes

860M parameters: accelerators.
"""

from configs import paper

DEVICES = 8  # the batch is the paper's on each of them


def get_config():
    c = paper.get_config()
    with c.unlocked():
        c.num_steps = 8_000
        c.batch_size = 32 * DEVICES
        c.data.name = "cityscapes"
        c.data.size = (512, 1024)
        c.optim.lr = 5e-5
    return c.lock()
