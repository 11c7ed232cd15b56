"""COCO-Stuff, 171 classes, 118287 / 5000 photos, square crops of 512 x 512, by the paper's recipe.

semflow prepare coco_stuff --source COCO --out DATA --fit cover
python main.py --config=configs/coco_stuff.py --config.data.dir=DATA --workdir=runs/coco_stuff

860M parameters: accelerators. The paper's mIoU is 38.6, Euler with 25 steps.
"""

from configs import paper

DEVICES = 8  # the batch is the paper's on each of them


def get_config():
    c = paper.get_config()
    with c.unlocked():
        c.num_steps = 320_000
        c.batch_size = 16 * DEVICES
        c.data.name = "coco_stuff"
        c.data.fit = "cover"
        c.model.dtype = "float32"
        c.codec.dtype = "float32"
        c.optim.lr = 1e-5
        c.optim.schedule = "constant"
        c.optim.warmup = 10_000
    return c.lock()
