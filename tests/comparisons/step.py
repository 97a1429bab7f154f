"""The training step on one device, of `repa-dist bench step` and of PyTorch, in turns.

    python3 tests/comparisons/step.py [--config sit-s2-repa] [--batch 64] [--precision bf16] [--device cuda] [--compile]

The PyTorch side is SiT with REPA's loss, written from the papers (arXiv 2401.08740, 2410.06940) in the way of the
reference: autocast, PyTorch's own attention, fused AdamW, clipping, and the average of the weights. Both sides have as
many parameters, which is checked. Random data: PyTorch's is on the device, repa-dist's goes there with each step. Runs in the Python that it is
started with where that has PyTorch (--device cuda needs one with CUDA), and else in the environment that data_loading.py
makes. Exit codes: 0 measured, 2 could not measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from data_loading import CACHE, enter_environment, fail, note  # noqa: E402

# Width, depth, heads, and the block after which hidden states are aligned.
SHAPES = {
    "sit-s2-repa": (384, 12, 6, 4),
    "sit-b2-repa": (768, 12, 12, 4),
    "sit-l2-repa": (1024, 24, 16, 8),
    "sit-xl2-repa": (1152, 28, 16, 8),
}
TOKENS, PATCH, CLASSES, FEATURES, PROJECTOR = 256, 16, 1000, 768, 2048


def make_model(width: int, depth: int, heads: int, aligned: int) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    def mlp(*sizes: int, activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            layers += [nn.Linear(inputs, outputs), activation()]
        return nn.Sequential(*layers[:-1])

    def modulate(x, shift, scale):
        return x * (1 + scale[:, None]) + shift[:, None]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
            )
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

        def forward(self, x, c):
            shift, scale, gate, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
            h = modulate(self.norm(x), shift, scale)
            q, k, v = self.qkv(h).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate[:, None] * self.out(h)
            return x + gate2[:, None] * self.mlp(modulate(self.norm(x), shift2, scale2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Linear(PATCH, width)
            # Fixed, but among the parameters, as the reference has it.
            self.positions = nn.Parameter(torch.randn(1, TOKENS, width) * 0.02, requires_grad=False)
            self.times, self.labels = mlp(256, width, width), nn.Embedding(CLASSES + 1, width)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
            self.last = nn.Linear(width, PATCH)
            self.projector = mlp(width, PROJECTOR, PROJECTOR, FEATURES)

        def forward(self, x, t, y):
            frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=x.device) / 128)
            angles = t[:, None] * frequencies
            c = self.times(torch.cat([angles.cos(), angles.sin()], 1)) + self.labels(y)
            x = self.patches(x) + self.positions
            for i, block in enumerate(self.blocks):
                x = block(x, c)
                if i + 1 == aligned:
                    projected = self.projector(x)
            shift, scale = self.modulation(c).chunk(2, 1)
            return self.last(modulate(self.norm(x), shift, scale)), projected

    return Model()


class Torch:
    """Steps of PyTorch."""

    def __init__(self, config: str, batch: int, precision: str, device: str, compiled: bool) -> None:
        import torch

        torch.manual_seed(0)
        # The reference allows TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.batch, self.device = batch, device
        self.dtype = {"f32": None, "bf16": torch.bfloat16, "f16": torch.float16}[precision]
        self.model = make_model(*SHAPES[config]).to(device)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.forward = torch.compile(self.model) if compiled else self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "f16")
        self.x = torch.randn(batch, TOKENS, PATCH, device=device)
        self.y = torch.randint(CLASSES, (batch,), device=device)
        self.features = torch.randn(batch, TOKENS, FEATURES, device=device)

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def step(self) -> None:
        import torch
        from torch.nn import functional

        t = torch.rand(self.batch, device=self.device)
        noise = torch.randn_like(self.x)
        mixed = (1 - t)[:, None, None] * self.x + t[:, None, None] * noise
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype is not None):
            velocity, projected = self.forward(mixed, t, self.y)
        denoising = (velocity.float() - (noise - self.x)).square().mean()
        alignment = -functional.cosine_similarity(projected.float(), self.features, dim=-1).mean()
        self.scaler.scale(denoising + 0.5 * alignment).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1e-4)

    def seconds(self, steps: int) -> float:
        import torch

        def now() -> float:
            if self.device != "cpu":
                torch.cuda.synchronize()
            return time.perf_counter()

        times = []
        for _ in range(steps):
            begin = now()
            self.step()
            times.append(now() - begin)
        return statistics.median(times)


def own(arguments: argparse.Namespace) -> dict[str, Any]:
    command = [str(arguments.binary), "bench", "step", "--json", "--steps", str(arguments.steps)]
    command += ["--config", str(arguments.configs / f"{arguments.config}.toml"), f"device={arguments.device}"]
    command += [f"train.global_batch={arguments.batch}", f"train.precision={arguments.precision}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if run.returncode != 0:
        fail(f"{' '.join(command)} exited with {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=SHAPES, default="sit-s2-repa")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=["f32", "bf16", "f16"], default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--binary", type=Path, default=CACHE / "target/release/repa-dist")
    parser.add_argument("--configs", type=Path, default=Path(__file__).resolve().parents[2] / "configs")
    parser.add_argument("--env", type=Path, default=CACHE / "torch-env", help="PyTorch's virtual environment")
    arguments = parser.parse_args()
    if not arguments.binary.is_file():
        fail(f"{arguments.binary} is missing: make build, or name it with --binary")
    if importlib.util.find_spec("torch") is None:
        enter_environment(arguments.env)

    device = "cuda" if arguments.device.startswith("cuda") else arguments.device
    torch_side = Torch(arguments.config, arguments.batch, arguments.precision, device, arguments.compile)
    seconds: dict[str, list[float]] = {"repa-dist": [], "PyTorch": []}
    torch_side.seconds(3)
    for turn in range(arguments.turns):
        ours = own(arguments)
        if ours["parameters"] != torch_side.parameters():
            fail(f"{ours['parameters']} parameters here and {torch_side.parameters()} in PyTorch")
        seconds["repa-dist"].append(ours["step_seconds"])
        seconds["PyTorch"].append(torch_side.seconds(arguments.steps))
        note(f"turn {turn + 1}/{arguments.turns}: " + ", ".join(f"{n} {t[-1]:.4f} s" for n, t in seconds.items()))
    print(f"| {arguments.config}, {arguments.batch} samples, {arguments.precision} | seconds of a step | samples/s |")
    print("|---|---:|---:|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.4f} | {arguments.batch / median:.1f} |")
    print(f"ratio {statistics.median(seconds['PyTorch']) / statistics.median(seconds['repa-dist']):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
