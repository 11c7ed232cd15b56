"""COCO-Stuff on 64 chips of TPU v5e: the paper's epochs in twice its batch, laid out for a pod.

Command, in every process (docs/launch.md):
python main.py --config=configs/coco_stuff_pod.py --config.data.source=COCO --workdir=DIR

Never trained: `semflow plan --config=configs/coco_stuff_pod.py --topology=v5e:8x8` says what the TPU's
compiler makes of it, and docs/scaling.md what else was tried. Parameters, moments and average are split over 8 chips
(any multiple of 8 will do) and examples over all; four slices of a batch follow each other between two exchanges.
"""

from configs import coco_stuff


def get_config():
    c = coco_stuff.get_config()
    with c.unlocked():
        c.num_steps = 160_000
        c.batch_size = 256
        c.codec.dtype = "bfloat16"
        c.eval.batch_size = 64
        c.mesh.data = -1
        c.mesh.fsdp = 8
        c.model.dtype = "bfloat16"
        c.model.remat = "none"
        c.optim.accum_steps = 4
        c.optim.ema = 0.9999
    return c.lock()
