"""ADE20K scene parsing, 150 classes, 20210 / 2000 photos, crops of 512 x 512, by the paper's recipe for COCO-Stuff.

semflow prepare ade20k --source ADEChallengeData2016 --out DATA --fit cover
python main.py --config=configs/ade20k.py --config.data.dir=DATA --workdir=runs/ade20k

860M parameters: accelerators. The paper has no figures of this data set.
"""

from configs import paper

DEVICES = 8  # the batch is the paper's on each of them


def get_config():
    c = paper.get_config()
    with c.unlocked():
        c.num_steps = 160_000
        c.batch_size = 16 * DEVICES
        c.data.name = "ade20k"
        c.data.fit = "cover"
        c.optim.lr = 1e-5
        c.optim.schedule = "constant"
        c.optim.warmup = 10_000
    return c.lock()
