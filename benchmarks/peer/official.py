"""SemFlow's official recipe in PyTorch, on latents: python benchmarks/peer/official.py LATENTS OUT --seconds 600

LATENTS is a folder of `bridge.py export`. What differs from the authors' runs, and why, stands in README.md.
"""

import argparse
import json
import pathlib
import time

import diffusers
import numpy as np
import torch
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import save_file

TIMESTEPS = 1000  # the network is asked at t * 1000, continuous
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.999), 1e-8, 0.01, 1.0
WARMUP = 500 / 8000  # share of the training, as in the Cityscapes recipe
STEPS = 25  # of Euler
NUM_LOSSES = 100  # kept for a curve


def make_network(shape: dict) -> torch.nn.Module:
    """diffusers' network of our UNetConfig's topology: the keys of both are the same, one for one."""
    attention = shape["attention"]
    net = diffusers.UNet2DConditionModel(
        in_channels=shape["in_channels"],
        out_channels=shape["out_channels"],
        block_out_channels=tuple(shape["block_out_channels"]),
        layers_per_block=shape["layers_per_block"],
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        cross_attention_dim=1,
        attention_head_dim=tuple(shape["num_heads"]),  # diffusers' name for the number of heads
        norm_num_groups=shape["num_groups"],
        use_linear_projection=shape["linear_projection"],
    )
    for block in net.modules():  # self-attention alone
        if isinstance(block, BasicTransformerBlock):
            block.attn2 = block.norm2 = None
    return net


def velocity(net: torch.nn.Module, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return net(z, t * TIMESTEPS, encoder_hidden_states=None).sample


def schedule(progress: float) -> float:
    """Linear up to WARMUP, then linear down to 0 at 1."""
    return min(progress / WARMUP, (1 - progress) / (1 - WARMUP))


class Batches:
    """Endless shuffled batches: every image once an epoch, mirrored by chance, with one of its perturbed masks."""

    def __init__(self, z0: np.ndarray, z1: np.ndarray, batch_size: int, rng: np.random.Generator):
        self.z0, self.z1, self.batch_size, self.rng = z0, z1, batch_size, rng
        self.order = np.empty(0, np.int64)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.order) < self.batch_size:
            self.order = np.concatenate([self.order, self.rng.permutation(len(self.z0))])
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        mirrored = self.rng.integers(self.z1.shape[1], size=len(chosen))
        draw = self.rng.integers(self.z1.shape[2], size=len(chosen))
        return to_torch(self.z0[chosen, mirrored]), to_torch(self.z1[chosen, mirrored, draw])


def to_torch(z: np.ndarray) -> torch.Tensor:
    """[b h w c], any type -> [b c h w] float32."""
    return torch.from_numpy(z.astype(np.float32)).movedim(-1, 1).contiguous()


def train(net: torch.nn.Module, batches: Batches, seconds: float, lr: float) -> dict:
    """Trains for so many seconds by the clock; says how many steps that were."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    losses: list[float] = []
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        optimizer.param_groups[0]["lr"] = lr * schedule(elapsed / seconds)
        z0, z1 = next(batches)
        t = torch.rand(len(z0))
        zt = torch.lerp(z0, z1, t[:, None, None, None])
        loss = torch.nn.functional.mse_loss(velocity(net, zt, t), z1 - z0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    parts = np.array_split(losses, min(NUM_LOSSES, len(losses)))
    rate = len(losses) * batches.batch_size / elapsed
    curve = [float(part.mean()) for part in parts]
    return {"steps": len(losses), "seconds": elapsed, "images_per_second": rate, "losses": curve}


@torch.no_grad()
def integrate(net: torch.nn.Module, z: torch.Tensor, steps: int, to_mask: bool) -> torch.Tensor:
    """Euler from t = 0 to 1 (segmentation), or from 1 to 0 (synthesis)."""
    for i in range(steps):
        t = i / steps if to_mask else 1 - i / steps
        v = velocity(net, z, torch.full((len(z),), t))
        z = z + v / steps if to_mask else z - v / steps
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, required=True, help="of training, by the clock")
    parser.add_argument("--lr", type=float, default=5e-5, help="as for Cityscapes; 1e-5 and 2e-5 for the other sets")
    parser.add_argument("--batch-size", type=int, default=32, help="as for Cityscapes and CelebAMask-HQ")
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    net = make_network(json.loads((args.latents / "network.json").read_text()))
    with np.load(args.latents / "train.npz") as arrays:
        batches = Batches(arrays["z0"], arrays["z1"], args.batch_size, np.random.default_rng(args.seed))
    found = train(net, batches, args.seconds, args.lr)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), args.out / "unet.safetensors")
    with np.load(args.latents / "test.npz") as arrays:
        ends = {
            "z1": integrate(net.eval(), to_torch(arrays["z0"]), STEPS, to_mask=True),
            "z0": integrate(net.eval(), to_torch(arrays["z1"]), STEPS, to_mask=False),
        }
    np.savez(args.out / "ends.npz", **{name: z.movedim(1, -1).numpy() for name, z in ends.items()})
    recipe = {"lr": args.lr, "batch_size": args.batch_size, "seed": args.seed, "threads": args.threads}
    num_params = sum(x.numel() for x in net.parameters())
    (args.out / "train.json").write_text(json.dumps(recipe | {"num_params": num_params} | found, indent=1))
    print(f"{num_params:,} parameters, {found['steps']} steps, loss {found['losses'][-1]:.4f}")


if __name__ == "__main__":
    main()
