"""Measures PyTorch's all-reduce (gloo, two CPU processes) against `repa-dist bench all-reduce`, in turns.

    python3 tests/comparisons/all_reduce.py [--turns 5] [--check]

Needs what data_loading.py needs, mpirun, and a release build of repa-dist; PyTorch comes into the same
virtual environment. Exit codes: 0 measured, 1 measured but below what --check asks, 2 could not measure.
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

MIB = 1 << 20
SIZES = [1 * MIB, 16 * MIB, 128 * MIB]
RANKS = 2


def gloo_worker(rank: int, seconds: float, port: int, out: str) -> None:
    """One of two processes: times all_reduce in place on float32, rank 0 writes bytes a second."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    rates = {}
    for size in SIZES:
        tensor = torch.ones(size // 4)
        dist.all_reduce(tensor)
        # Both processes have to repeat as often: rank 0 says how often.
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        once = torch.tensor([time.perf_counter() - begin])
        dist.broadcast(once, 0)
        repeats = max(3, int(seconds / once.item()))
        begin = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor)
        rates[size] = repeats * size / (time.perf_counter() - begin)
    if rank == 0:
        Path(out).write_text(json.dumps(rates))
    dist.destroy_process_group()


def gloo_rates(seconds: float, port: int) -> dict[int, float]:
    """Bytes a second ("algorithm" bandwidth as nccl-tests define it) by size."""
    import tempfile

    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/rates.json"
        processes.spawn(gloo_worker, args=(seconds, port, out), nprocs=RANKS)
        return {int(size): rate for size, rate in json.loads(Path(out).read_text()).items()}


def own_rates(binary: Path, seconds: float) -> tuple[dict[int, float], dict[int, float]]:
    """Ours and MPI_Allreduce's, from one call of the binary."""
    command = ["mpirun", "--allow-run-as-root", "-n", str(RANKS), str(binary), "bench", "all-reduce"]
    command += ["--against-mpi", "--json", "--seconds", str(seconds)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if run.returncode != 0:
        fail(f"{' '.join(command)} exited with {run.returncode}:\n{run.stderr}")
    rows = {row["bytes"]: row for row in json.loads(run.stdout)["rows"]}
    rate = "algorithm_bytes_per_second"
    return (
        {size: rows[size]["ours"][rate] for size in SIZES},
        {size: rows[size]["library"][rate] for size in SIZES},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="how often the two sides take turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on a size in a turn")
    parser.add_argument("--binary", type=Path, default=CACHE / "target/release/repa-dist")
    parser.add_argument("--env", type=Path, default=CACHE / "torch-env", help="PyTorch's virtual environment")
    parser.add_argument("--check", action="store_true", help="exit 1 unless 16 and 128 MiB are twice both others")
    arguments = parser.parse_args()
    if not arguments.binary.is_file():
        fail(f"{arguments.binary} is missing: make build, or name it with --binary")
    enter_environment(arguments.env)

    sides: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in SIZES} for name in ("repa-dist", "MPI_Allreduce", "gloo")
    }
    for turn in range(arguments.turns):
        ours, library = own_rates(arguments.binary, arguments.seconds)
        gloo = gloo_rates(arguments.seconds, 29500 + turn)
        for name, rates in (("repa-dist", ours), ("MPI_Allreduce", library), ("gloo", gloo)):
            for size, rate in rates.items():
                sides[name][size].append(rate)
        note(f"turn {turn + 1}/{arguments.turns}: " + ", ".join(f"{s // MIB} MiB {r / 1e9:.1f}" for s, r in ours.items()))

    medians = {name: {s: statistics.median(v) for s, v in by.items()} for name, by in sides.items()}
    print("| GB/s, medians | repa-dist | MPI_Allreduce | gloo | least ratio |")
    print("|---|---:|---:|---:|---:|")
    enough = True
    for size in SIZES:
        ours, library, gloo = (medians[name][size] / 1e9 for name in ("repa-dist", "MPI_Allreduce", "gloo"))
        ratio = ours / max(library, gloo)
        enough &= size == MIB or ratio >= 2.0
        print(f"| {size // MIB} MiB | {ours:.2f} | {library:.2f} | {gloo:.2f} | {ratio:.1f} |")
    return 1 if arguments.check and not enough else 0


if __name__ == "__main__":
    sys.exit(main())
