r"""The shipped avatar model: `semflow segment --checkpoint avatars`.

python main.py --config=configs/avatars.py --workdir=runs/avatars
python -c "from semflow_jax import SemFlow; \
    SemFlow.from_pretrained('runs/avatars').save_pretrained('semflow_jax/zoo/avatars', dtype='float16')"

Its figures are in the model card, semflow_jax/zoo/avatars/README.md.
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    with c.unlocked():
        c.num_steps = 14_000
        c.data.num_train = 16_000
        c.data.num_val = 400
        c.model.block_out_channels = (64, 72, 64)
        c.optim.warmup = 500
        c.optim.ema = 0.999
        c.log_every = 50
        c.eval_every = 2000
        c.checkpoint_every = 500
    return c.lock()
