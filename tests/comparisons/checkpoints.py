"""Measures torch.distributed.checkpoint (two gloo processes, `save` and `async_save`) against
`mpirun -n 2 repa-dist bench checkpoint`, in turns, on the same disk.

    python3 tests/comparisons/checkpoints.py [--turns 3] [--dir DIR] [--check]

Both sides write the same tensors: weights, moving average and both moments of a SiT of some 100 M parameters, each
process half of every tensor. Times are from the call until the checkpoint is durable: PyTorch's writer syncs its
files (`sync_files`), as ours does. Needs what data_loading.py needs, mpirun, and a release build of repa-dist. Exit
codes: 0 measured, 1 measured but below what --check asks, 2 could not measure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from data_loading import CACHE, enter_environment, fail, note  # noqa: E402

RANKS = 2
MODEL = ["model.hidden_size=960", "model.num_heads=12", "train.global_batch=2", "train.threads=1"]
ARRAYS = ("model", "ema", "exp_avg", "exp_avg_sq")


def torch_worker(rank: int, parameters: int, folder: str, port: int, out: str) -> None:
    """One of two processes: seconds of save, and of async_save until its result and until it returns."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    # As many tensors as a model of this size has, so that neither side has one large one.
    rows = 24
    state = {
        f"{name}.{i}": distribute_tensor(torch.randn(rows, parameters // 64 // rows), mesh, [Shard(0)])
        for name in ARRAYS
        for i in range(64)
    }
    seconds = {}
    for how in ("save", "async_save"):
        target = f"{folder}/{how}"
        dist.barrier()
        begin = time.perf_counter()
        writer = dcp.FileSystemWriter(target, sync_files=True)
        if how == "save":
            dcp.save(state, storage_writer=writer)
        else:
            future = dcp.async_save(state, storage_writer=writer)
            seconds["blocked"] = time.perf_counter() - begin
            future.result()
        dist.barrier()
        seconds[how] = time.perf_counter() - begin
    if rank == 0:
        Path(out).write_text(json.dumps(seconds))
    dist.destroy_process_group()


def torch_seconds(parameters: int, folder: Path, port: int) -> dict[str, float]:
    import torch.multiprocessing as processes

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "seconds.json"
    try:
        processes.spawn(torch_worker, args=(parameters, str(folder), port, str(out)), nprocs=RANKS)
        return json.loads(out.read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def own_figures(binary: Path, folder: Path) -> dict:
    command = ["mpirun", "--allow-run-as-root", "-n", str(RANKS), str(binary), "bench", "checkpoint"]
    command += ["--turns", "1", "--json", "--dir", str(folder), *MODEL]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if run.returncode != 0:
        fail(f"{' '.join(command)} exited with {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="how often the two sides take turns")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/repa-dist-comparison"))
    parser.add_argument("--binary", type=Path, default=CACHE / "target/release/repa-dist")
    parser.add_argument("--env", type=Path, default=CACHE / "torch-env", help="PyTorch's virtual environment")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 unless twice as fast to durable, or 80 %% of dd"
    )
    arguments = parser.parse_args()
    if not arguments.binary.is_file():
        fail(f"{arguments.binary} is missing: make build, or name it with --binary")
    enter_environment(arguments.env)

    # The first turn of each side brings both programs' pages into memory, and does not count.
    own_figures(arguments.binary, arguments.dir)
    rows: dict[str, list[float]] = {}
    share = []
    for turn in range(arguments.turns):
        ours = own_figures(arguments.binary, arguments.dir)
        theirs = torch_seconds(ours["bytes"] // 16, arguments.dir / "torch", 29600 + turn)
        share.append(ours["write_share"])
        for name, seconds in (
            ("repa-dist, to durable", ours["write_seconds"]),
            ("repa-dist, training waits", ours["snapshot_seconds"]),
            ("dd with fsync", ours["bytes"] / ours["dd_bytes_per_second"]),
            ("dcp.save, to durable", theirs["save"]),
            ("dcp.async_save, to durable", theirs["async_save"]),
            ("dcp.async_save, training waits", theirs["blocked"]),
        ):
            rows.setdefault(name, []).append(seconds)
        note(f"turn {turn + 1}/{arguments.turns}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in rows.items()))

    medians = {name: statistics.median(seconds) for name, seconds in rows.items()}
    print(f"{ours['bytes'] / 1e9:.2f} GB by {RANKS} processes; medians of {arguments.turns} turns")
    print("| | seconds | GB/s |")
    print("|---|---:|---:|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.2f} | {ours['bytes'] / 1e9 / seconds:.2f} |")
    ratio = min(medians["dcp.save, to durable"], medians["dcp.async_save, to durable"]) / medians["repa-dist, to durable"]
    print(f"to durable: {ratio:.1f} times as fast as the better of save and async_save; {100 * statistics.median(share):.0f} % of dd")
    return 1 if arguments.check and ratio < 2.0 and statistics.median(share) < 0.8 else 0


if __name__ == "__main__":
    sys.exit(main())
