"""The velocity network here and in PyTorch (diffusers, eager): python benchmarks/unet_vs_torch.py --out result.json

Both get the same random weights and inputs and take turns (A B A B ...), so that a busy machine slows both; medians of
wall time (with one thread: of processor time, which other programs hardly touch), and of the turns' ratios.
`--parts forward` needs 9 GB.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

SMALL = {"1M": (24, 48, 64), "4M": (48, 80, 112)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["forward", *SMALL], choices=["forward", *SMALL])
    parser.add_argument("--threads", type=int, default=1, choices=[1, *range(2, (os.cpu_count() or 1) + 1)])
    parser.add_argument("--repeats", type=int, default=5, help="turns of a training step; a forward pass gets half")
    parser.add_argument("--batch", type=int, default=16, help="of a training step, 16 x 16 latents")
    parser.add_argument("--out", type=pathlib.Path, help="file for the figures, json")
    return parser.parse_args()


def compare(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, threads: int) -> dict[str, float]:
    """Median seconds of each and the median ratio; the first turn, which compiles, is left out."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for fn, seconds in zip((ours, theirs), times, strict=True):
            begin = clock()
            fn()
            if turn:
                seconds.append(clock() - begin)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return {"ours_s": statistics.median(times[0]), "torch_s": statistics.median(times[1]), "ratio": ratio}


def make_pair(config):
    """Our parameters and diffusers' network, equal."""
    import diffusers

    from semflow_jax.models.build import abstract_unet
    from semflow_jax.weights.load import fill

    unet = diffusers.UNet2DConditionModel.from_config(config.to_diffusers())
    return fill(abstract_unet(config), {key: x.numpy() for key, x in unet.state_dict().items()}), unet


def make_inputs(config, batch: int, size: int):
    import numpy as np

    rng = np.random.default_rng(0)
    zt = rng.normal(size=(batch, size, size, config.in_channels)).astype(np.float32)
    context = rng.normal(size=(77, config.cross_attention_dim)).astype(np.float32)
    return zt, np.linspace(0.1, 0.9, batch, dtype=np.float32), context


def to_torch(zt, t, context):
    import torch

    context = torch.from_numpy(context)[None].repeat(len(zt), 1, 1)
    return torch.from_numpy(zt).movedim(-1, 1).contiguous(), torch.from_numpy(t) * 1000, context


def run_forward(repeats: int, threads: int) -> dict[str, float]:
    """SD-1.5, float32, 64 x 64 latents, batch 1."""
    import jax
    import torch

    from semflow_jax.models.build import make_velocity_fn
    from semflow_jax.models.unet import UNetConfig

    config = UNetConfig()
    params, unet = make_pair(config)
    inputs = make_inputs(config, 1, 64)
    theirs = to_torch(*inputs)
    params, inputs = jax.device_put((params, inputs))
    velocity_fn = jax.jit(make_velocity_fn(config))
    with torch.inference_mode():
        return compare(
            lambda: jax.block_until_ready(velocity_fn(params, *inputs)), lambda: unet(*theirs), repeats, threads
        )


def run_training(widths: tuple[int, ...], batch: int, repeats: int, threads: int) -> dict[str, float]:
    """Forward, backward, clipping and AdamW, of a small network on 16 x 16 latents of 48 channels."""
    import jax
    import jax.numpy as jnp
    import optax
    import torch

    from semflow_jax.models.build import count_params, make_velocity_fn
    from semflow_jax.models.unet import UNetConfig

    config = UNetConfig(
        in_channels=48,
        out_channels=48,
        block_out_channels=widths,
        layers_per_block=1,
        attention=(False, False, True),
        num_heads=(4, 4, 4),
        cross_attention_dim=64,
        num_groups=8,
    )
    params, unet = make_pair(config)
    inputs = make_inputs(config, batch, 16)
    theirs = to_torch(*inputs)
    velocity_fn = make_velocity_fn(config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.01))

    @jax.jit
    def step(params, opt_state, zt, t, context):
        grads = jax.grad(lambda p: jnp.square(velocity_fn(p, zt, t, context) + zt).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = (jax.device_put(params), optimizer.init(params))

    def ours():
        nonlocal state
        state = jax.block_until_ready(step(*state, *inputs))

    adamw = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.01)

    def torchs():
        adamw.zero_grad()
        (unet(*theirs).sample + theirs[0]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adamw.step()

    return {"params": count_params(params)} | compare(ours, torchs, repeats, threads)


def main() -> None:
    args = parse()
    os.environ["PJRT_NPROC"] = str(args.threads)  # read when jax makes its threads
    if args.threads == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    import jax
    import torch

    torch.set_num_threads(args.threads)
    results = {}
    for part in args.parts:
        if part == "forward":
            results["SD-1.5 forward, float32, 64 x 64 latents, batch 1"] = run_forward(
                (args.repeats + 1) // 2, args.threads
            )
        else:
            figures = run_training(SMALL[part], args.batch, args.repeats, args.threads)
            name = f"training step, {figures['params'] / 1e6:.2f}M parameters, 16 x 16 latents, batch {args.batch}"
            results[name] = figures
    print(f"jax {jax.__version__}, torch {torch.__version__}, {args.threads} thread(s), {platform.machine()}\n")
    print("| | ours, s | torch, s | ours / torch |\n|---|---|---|---|")
    for name, figures in results.items():
        print(f"| {name} | {figures['ours_s']:.3f} | {figures['torch_s']:.3f} | {figures['ratio']:.2f} |")
    if args.out:
        args.out.write_text(json.dumps({"command": sys.argv, "threads": args.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
