"""Weak scaling from one to two ranks of one thread each, of `repa-dist bench step` and of PyTorch's
DistributedDataParallel with gloo, in turns.

    python3 tests/comparisons/weak_scaling.py [--turns 3] [--steps 6] [--batch 8] [--check]

Scaling is the time of a step by which both ranks train models of their own at the same time, over the time of the next
one, by which they train one together: so what the two lose by sharing memory and caches does not count as
communication, and other work on the machine meets both. A turn's figure is the median over its pairs of steps. The
PyTorch side is a transformer of SiT-S/2's width, depth and tokens with adaptive normalisation, trained by AdamW; it
stands for DDP's communication, not for the reference's speed. Needs what data_loading.py needs, mpirun, and a release
build of repa-dist. Exit codes: 0 measured, 1 measured but below what --check asks, 2 could not measure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from data_loading import CACHE, enter_environment, fail, note  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = ["mpirun", "--allow-run-as-root"]


def torch_worker(rank: int, steps: int, batch: int, port: int, out: str) -> None:
    """Seconds of each step, of a model of this rank's own and of one that both train, in turns."""
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, depth, tokens = 384, 12, 256

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
            self.modulation = nn.Linear(width, 6 * width)

        def forward(self, x, c):
            shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
            h = self.norms[0](x) * (1 + scale) + shift
            q, k, v = self.qkv(h).unflatten(-1, (3, 6, -1)).permute(2, 0, 3, 1, 4)
            h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate * self.out(h)
            return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.last = nn.Linear(width, 16)

        def forward(self, x, c):
            for block in self.blocks:
                x = block(x, c)
            return self.last(x)

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    models = {"alone": Model(), "together": nn.parallel.DistributedDataParallel(Model())}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
    x, c = torch.randn(batch, tokens, width), torch.randn(batch, width)
    times = {name: [] for name in models}
    for _ in range(steps + 2):
        for name, model in models.items():
            dist.barrier()
            begin = time.perf_counter()
            optimizers[name].zero_grad()
            model(x, c).square().mean().backward()
            optimizers[name].step()
            times[name].append(time.perf_counter() - begin)
    Path(f"{out}-{rank}").write_text(json.dumps({name: seconds[2:] for name, seconds in times.items()}))
    dist.destroy_process_group()


def torch_scaling(steps: int, batch: int, port: int) -> float:
    import tempfile

    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        context = processes.get_context("spawn")
        workers = [
            context.Process(target=torch_worker, args=(rank, steps, batch, port, f"{folder}/r")) for rank in range(2)
        ]
        for rank, worker in enumerate(workers):
            worker.start()
            os.sched_setaffinity(worker.pid, {rank % (os.cpu_count() or 1)})
        for worker in workers:
            worker.join(900)
            if worker.exitcode != 0:
                fail(f"a PyTorch process exited with {worker.exitcode}")
        ranks = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    slowest = {name: [max(pair) for pair in zip(*(rank[name] for rank in ranks))] for name in ranks[0]}
    return statistics.median(alone / together for alone, together in zip(slowest["alone"], slowest["together"]))


def own_scaling(binary: Path, steps: int, batch: int) -> float:
    config = ["-c", str(ROOT / "configs/sit-s2-repa.toml"), "train.threads=1", "train.precision=f32"]
    bench = [str(binary), "bench", "step", "--alone", "--json", "--steps", str(steps), *config]
    command = [*MPIRUN, "--bind-to", "core", "-n", "2", *bench, f"train.global_batch={2 * batch}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if run.returncode != 0:
        fail(f"{' '.join(command)} exited with {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout)["alone"]["scaling"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--binary", type=Path, default=CACHE / "target/release/repa-dist")
    parser.add_argument("--env", type=Path, default=CACHE / "torch-env", help="PyTorch's virtual environment")
    parser.add_argument("--check", action="store_true", help="exit 1 unless 97 %% and above DDP's")
    arguments = parser.parse_args()
    if not arguments.binary.is_file():
        fail(f"{arguments.binary} is missing: make build, or name it with --binary")
    enter_environment(arguments.env)

    ratios: dict[str, list[float]] = {"repa-dist": [], "PyTorch DDP, gloo": []}
    for turn in range(arguments.turns):
        ratios["repa-dist"].append(own_scaling(arguments.binary, arguments.steps, arguments.batch))
        ratios["PyTorch DDP, gloo"].append(torch_scaling(arguments.steps, arguments.batch, 29700 + turn))
        note(f"turn {turn + 1}/{arguments.turns}: " + ", ".join(f"{n} {100 * r[-1]:.1f} %" for n, r in ratios.items()))
    print("| weak scaling, 1 to 2 ranks | turns | median |")
    print("|---|---|---:|")
    for name, values in ratios.items():
        print(f"| {name} | {' / '.join(f'{100 * v:.1f}' for v in values)} % | {100 * statistics.median(values):.1f} % |")
    ours, ddp = (statistics.median(values) for values in ratios.values())
    return 1 if arguments.check and (ours < 0.97 or ours <= ddp) else 0


if __name__ == "__main__":
    sys.exit(main())
