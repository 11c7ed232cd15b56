"""CelebAMask-HQ, 19 classes, 24183 / 2993 / 2824 faces at 512 x 512, by the paper's recipe.

semflow prepare celebamask_hq --source CelebAMask-HQ --out DATA
python main.py --config=configs/celebamask_hq.py --config.data.dir=DATA --workdir=runs/celebamask_hq

860M parameters: accelerators. The paper's synthesis has an FID of 32.6 and an LPIPS of .393, Euler with 25 steps.
"""

from configs import paper

DEVICES = 8  # the batch is the paper's on each of them


def get_config():
    c = paper.get_config()
    with c.unlocked():
        c.num_steps = 80_000
        c.batch_size = 32 * DEVICES
        c.data.name = "celebamask_hq"
        c.optim.lr = 2e-5
    return c.lock()
