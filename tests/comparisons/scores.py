"""FID, inception score, precision and recall of the same images by `repa-dist evaluate` and by torch-fidelity, in
turns: the figures and the seconds, each with reading weights and images. Weights are those of inception.py's formula,
in a .pth as they are published; images are smooth noise.

    pip install torch numpy safetensors torch-fidelity
    python3 tests/comparisons/scores.py [--images 256] [--device cpu] [--binary FILE]

Exit codes: 0 measured, 1 the figures differ, 2 could not measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch_fidelity  # noqa: E402
from data_loading import CACHE, fail, note  # noqa: E402
from inception import Features, waves  # noqa: E402

# Their names here, and in torch-fidelity.
NAMES = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}


class Images(torch.utils.data.Dataset):
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.pixels[number]


def ours(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    command = [str(arguments.binary), "evaluate", "--json", "--inception", str(folder / "inception.pth"), "--reference",
               str(folder / "reference.npz"), "--images", str(folder / "samples.npz"), f"device={arguments.device}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        fail(f"{' '.join(command)}: {ended.stderr}")
    return json.loads(ended.stdout)


def theirs(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    samples, reference = (Images(np.load(folder / f"{name}.npz")["arr_0"]) for name in ("samples", "reference"))
    found = torch_fidelity.calculate_metrics(
        input1=samples, input2=reference, fid=True, isc=True, prc=True, feature_extractor="inception-v3-compat",
        isc_splits=1, samples_shuffle=False, cuda=arguments.device != "cpu", batch_size=32, verbose=False, cache=False,
        feature_extractor_weights_path=str(folder / "inception.pth"),
    )
    return {name: found[key] for name, key in NAMES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="on each side")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--binary", type=Path, default=CACHE / "target/release/repa-dist")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"repa-dist": [], "torch-fidelity": []}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(Features().model.state_dict(), folder / "inception.pth")
        for seed, side in enumerate(("reference", "samples")):
            np.savez(folder / side, arr_0=waves(arguments.images, arguments.size, arguments.size, seed))
        for turn in range(arguments.turns):
            for who, run in (("repa-dist", ours), ("torch-fidelity", theirs)):
                begun = time.monotonic()
                found[who] = run(arguments, folder)
                seconds[who].append(time.monotonic() - begun)
            note(f"turn {turn + 1}: " + ", ".join(f"{who} {taken[-1]:.1f} s" for who, taken in seconds.items()))
    print(f"| | {' | '.join(NAMES)} | seconds |\n|{'---|' * (len(NAMES) + 2)}")
    for who, figures in found.items():
        print(f"| {who} | {' | '.join(f'{figures[n]:.6g}' for n in NAMES)} | {statistics.median(seconds[who]):.1f} |")
    mine, other = found["repa-dist"], found["torch-fidelity"]
    return int(any(abs(mine[n] - other[n]) > 1e-3 * abs(other[n]) for n in NAMES))


if __name__ == "__main__":
    sys.exit(main())
