"""Measures PyTorch's DataLoader against `repa-dist bench data` on the same samples, in turns.

    python3 tests/comparisons/data_loading.py [--json FILE] [--check]

Needs Python 3.11 with venv and pip, Linux, and a release build of repa-dist. The first run puts
PyTorch into a virtual environment of its own (--env); nothing else on the machine is changed.

Exit codes: 0 measured, 1 measured but below what --check asks, 2 could not measure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

CACHE = Path.home() / ".cache" / "repa-dist"
PACKAGES = ["torch", "numpy", "pillow"]
# Of PyTorch, and threads of repa-dist.
WORKERS = 2

RESOLUTION = 256
LATENT_SHAPE = (4, 32, 32)
CLASSES = 1000
SAMPLES_PER_FOLDER = 1000
SEED = 0
# PNG files of photographs at 256x256 are about this large; the images made here have to be as well,
# since the time to decode one goes with its size.
PNG_KB = (95.0, 135.0)


def fail(message: str) -> NoReturn:
    """Ends with exit code 2, could not measure."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def note(message: str) -> None:
    """Tells what goes on; stdout is kept for the table."""
    print(message, file=sys.stderr, flush=True)


# --- PyTorch's environment ------------------------------------------------------------------------


def enter_environment(env: Path) -> None:
    """Goes on with the script in the virtual environment `env`, made if missing or incomplete."""
    if Path(sys.prefix).resolve() == env.resolve():
        return
    python = env / "bin" / "python"
    if not has_packages(python):
        make_environment(env, python)
    note(f"going on in {env}")
    os.execv(python, [str(python), str(Path(sys.argv[0]).resolve()), *sys.argv[1:]])


def has_packages(python: Path) -> bool:
    """Whether all that is measured can be imported there."""
    if not python.exists():
        return False
    check = subprocess.run([python, "-c", "import torch, numpy, PIL"], capture_output=True, check=False)
    return check.returncode == 0


def make_environment(env: Path, python: Path) -> None:
    """Makes the virtual environment and installs PyTorch into it."""
    # venv empties the folder, which must not be someone's work.
    if env.exists() and any(env.iterdir()) and not (env / "pyvenv.cfg").exists():
        fail(f"{env} is not a virtual environment; name another folder (--env)")
    note(f"installing {', '.join(PACKAGES)} into {env} (once, about 5 GB on disk)")
    env.parent.mkdir(parents=True, exist_ok=True)
    # PyTorch without the CUDA packages that it asks for would be a third of the size, but cannot be
    # imported: its libraries are linked to them.
    for what, command in [
        ("python3 -m venv", [sys.executable, "-m", "venv", "--clear", str(env)]),
        ("pip install", [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]),
    ]:
        # pip's output goes to stderr as well, as stdout is the table's.
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
            fail(
                f"{what} failed for {env} (its message is above). This needs Python's venv and pip "
                "(Debian and Ubuntu: apt-get install python3-venv), PyPI and 6 GB of disk."
            )
    if not has_packages(python):
        fail(f"PyTorch is in {env} but cannot be imported; remove that folder or name another (--env)")


# --- the samples ----------------------------------------------------------------------------------


def make_image(index: int) -> Any:
    """A picture whose spectrum falls as a photograph's does: 1/f, with a little white noise."""
    import numpy as np

    rng = np.random.default_rng([SEED, index])
    fx = np.fft.rfftfreq(RESOLUTION)[None, :]
    fy = np.fft.fftfreq(RESOLUTION)[:, None]
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf

    def field() -> Any:
        """1/f noise of mean 0 and deviation 1."""
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        values = np.fft.irfft2(phase / frequency, s=(RESOLUTION, RESOLUTION))
        return values / values.std()

    # Channels of a photograph have most of their light in common.
    light = field()
    image = np.stack([light + 0.2 * field() for _ in range(3)], axis=-1)
    # Photographs have more contrast than this, but flat parts too. What counts is the file's size,
    # and 4 to 16 gives PNG_KB. Pictures differ in contrast, so their files differ in size.
    image *= rng.uniform(4.0, 16.0)
    image += 128.0 + rng.normal(0.0, 0.5, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def make_sample(tree: Path, index: int) -> None:
    """Writes the image and the latent's moments of one sample."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(make_image(index))
    image.save(tree / "images" / folder_of(index) / f"img{index:08}.png")
    rng = np.random.default_rng([SEED, index, 1])
    mean = rng.normal(0.0, 4.0, LATENT_SHAPE)
    std = np.exp(rng.normal(-4.0, 0.5, LATENT_SHAPE))
    np.save(tree / "vae-sd" / moments_name(index), np.concatenate([mean, std]).astype(np.float32))


def folder_of(index: int) -> str:
    """The sub-folder of a sample."""
    return f"{index // SAMPLES_PER_FOLDER:05}"


def moments_name(index: int) -> str:
    """The latent's file, as dataset.json names it."""
    return f"{folder_of(index)}/img-mean-std-{index:08}.npy"


def make_tree(tree: Path, samples: int) -> None:
    """Makes a tree in the layout of REPA's preprocessing, unless a whole one is there."""
    labels = tree / "vae-sd" / "dataset.json"
    if labels.exists():
        note(f"using the samples in {tree}")
        return
    note(f"making {samples} samples in {tree}")
    import numpy as np

    for folder in sorted({folder_of(i) for i in range(samples)}):
        for top in ["images", "vae-sd"]:
            (tree / top / folder).mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as pool:
        pool.starmap(make_sample, [(tree, i) for i in range(samples)], chunksize=50)
    classes = np.random.default_rng(SEED).integers(0, CLASSES, samples).tolist()
    # Written last: a tree with this file is whole.
    labels.write_text(json.dumps({"labels": [[moments_name(i), c] for i, c in enumerate(classes)]}))


def measure_images(tree: Path) -> tuple[int, float]:
    """How many images the tree has, and their mean size in units of 1000 bytes."""
    sizes = [path.stat().st_size for path in (tree / "images").rglob("*.png")]
    if not sizes:
        fail(f"{tree} has no PNG files in images/; name another folder (--tree)")
    return len(sizes), statistics.fmean(sizes) / 1000


# --- PyTorch's side -------------------------------------------------------------------------------


def repa_dataset(tree: Path, with_images: bool) -> Any:
    """A dataset that reads samples as REPA's own does: Pillow for the image, np.load for the moments."""
    # A class within a function, so that reading a sample does not pay for imports.
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import Dataset

    images_dir, features_dir = tree / "images", tree / "vae-sd"
    image_names = sorted(str(path.relative_to(images_dir)) for path in images_dir.rglob("*.png"))
    feature_names = sorted(str(path.relative_to(features_dir)) for path in features_dir.rglob("*.npy"))
    if len(image_names) != len(feature_names):
        fail(f"{tree} has {len(image_names)} images but {len(feature_names)} latents")
    by_name = dict(json.loads((features_dir / "dataset.json").read_text())["labels"])
    labels = np.array([by_name[name] for name in feature_names], dtype=np.int64)

    class RepaDataset(Dataset):
        """Samples as (image, features, label), or without the image."""

        def __len__(self) -> int:
            return len(feature_names)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            features = torch.from_numpy(np.load(os.path.join(features_dir, feature_names[index])))
            label = torch.tensor(labels[index])
            if not with_images:
                return features, label
            with open(os.path.join(images_dir, image_names[index]), "rb") as file:
                image = np.array(Image.open(file))
            return torch.from_numpy(image.transpose(2, 0, 1)), features, label

    return RepaDataset()


def torch_samples_per_second(tree: Path, with_images: bool, batch: int, seconds: float) -> float:
    """The steady rate of a DataLoader, after one pass that starts the workers and fills the page cache."""
    from torch.utils.data import DataLoader, RandomSampler

    dataset = repa_dataset(tree, with_images)
    loader = DataLoader(
        dataset,
        batch_size=batch,
        # What shuffle=True makes, a new permutation for each pass, but pass after pass without end.
        # At the end of an epoch of so few samples the workers wait for one another, which costs up to
        # 8 % of the rate; ImageNet's epoch is so long that it costs nothing.
        sampler=RandomSampler(dataset, num_samples=sys.maxsize),
        num_workers=WORKERS,
        pin_memory=False,
        drop_last=True,
        persistent_workers=True,
    )
    batches = iter(loader)
    for _ in range(math.ceil(len(dataset) / batch)):
        next(batches)
    samples = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        samples += len(next(batches)[-1])
    return samples / elapsed


# --- repa-dist's side -----------------------------------------------------------------------------


def run_binary(binary: Path, arguments: list[str]) -> str:
    """Runs the binary and gives back what it prints."""
    command = [str(binary), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"`{' '.join(command)}` ended with {done.returncode}:\n{(done.stderr or done.stdout).strip()}")
    return done.stdout


def import_store(binary: Path, tree: Path, store: Path) -> None:
    """Makes a store of the tree's latents."""
    run_binary(binary, ["data", "import", str(tree), "--out", str(store)])


def bench_samples_per_second(binary: Path, data: Path, images: str, batch: int, seconds: float) -> float:
    """The rate of repa-dist's loader over a tree or a store."""
    options = {"images": images, "batch": batch, "threads": WORKERS, "seconds": f"{seconds:g}"}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    arguments = ["bench", "data", str(data), *flags, "--json"]
    printed = run_binary(binary, arguments)
    try:
        rate = float(json.loads(printed)["loader_samples_per_second"])
    except (ValueError, KeyError, TypeError):
        fail(f"`repa-dist {' '.join(arguments)}` printed no loader_samples_per_second:\n{printed.strip()}")
    if rate <= 0:
        fail(f"`repa-dist {' '.join(arguments)}` measured {rate} samples/s")
    return rate


# --- the comparison -------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: the rates of every turn, their medians, and the medians' ratio."""

    name: str
    pytorch: list[float]
    repa_dist: list[float]
    required_ratio: float

    @property
    def medians(self) -> tuple[float, float]:
        """Of PyTorch and of repa-dist."""
        return statistics.median(self.pytorch), statistics.median(self.repa_dist)

    @property
    def ratio(self) -> float:
        """How many times as fast repa-dist is."""
        pytorch, repa_dist = self.medians
        return repa_dist / pytorch

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        pytorch, repa_dist = self.medians
        medians = {"pytorch_median": pytorch, "repa_dist_median": repa_dist, "ratio": self.ratio}
        return asdict(self) | medians


def compare(tree: Path, store: Path, binary: Path, batch: int, seconds: float, turns: int) -> list[Row]:
    """Both sides in turns, so that what else the machine does falls on both."""
    with_images = Row("REPA tree, latents + images", [], [], 3.0)
    latents = Row("REPA tree, latents only", [], [], 3.0)
    # One list: the store is compared with PyTorch reading the tree.
    stored = Row("store, latents only (PyTorch: tree)", latents.pytorch, [], 20.0)

    def pytorch(images: bool) -> float:
        return torch_samples_per_second(tree, images, batch, seconds)

    def ours(data: Path, images: str) -> float:
        return bench_samples_per_second(binary, data, images, batch, seconds)

    steps: list[tuple[str, list[float], Callable[[], float]]] = [
        ("PyTorch, latents + images", with_images.pytorch, lambda: pytorch(True)),
        ("repa-dist, latents + images", with_images.repa_dist, lambda: ours(tree, "decode")),
        ("PyTorch, latents only", latents.pytorch, lambda: pytorch(False)),
        ("repa-dist, latents only", latents.repa_dist, lambda: ours(tree, "none")),
        ("repa-dist, store", stored.repa_dist, lambda: ours(store, "none")),
    ]
    for turn in range(1, turns + 1):
        for name, rates, measure in steps:
            rates.append(measure())
            note(f"turn {turn}/{turns}: {name}: {rates[-1]:,.0f} samples/s")
    return [with_images, latents, stored]


def machine_facts() -> dict[str, Any]:
    """What the figures depend on."""
    import numpy
    import PIL
    import torch

    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }


def print_table(rows: list[Row], facts: dict[str, Any]) -> None:
    """The medians, as a table that can be pasted into a Markdown file."""
    print(f"| {'samples/s':<36} | {'PyTorch':>10} | {'repa-dist':>10} | {'ratio':>7} |")
    print(f"|{'-' * 38}|{'-' * 11}:|{'-' * 11}:|{'-' * 8}:|")
    for row in rows:
        pytorch, repa_dist = row.medians
        print(f"| {row.name:<36} | {pytorch:>10,.0f} | {repa_dist:>10,.0f} | {row.ratio:>6.1f}x |")
    versions = ", ".join(f"{name} {facts[name]}" for name in ["torch", "numpy", "pillow"])
    print(f"\n{facts['cpu']}, {facts['cores']} cores, {versions}")


@contextlib.contextmanager
def folder_or_temporary(folder: Path | None) -> Iterator[Path]:
    """The folder, or else one that is removed at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="repa-tree-") as temporary:
            yield Path(temporary)


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--env", type=Path, default=CACHE / "torch-env", help="PyTorch's virtual environment [%(default)s]")
    add("--binary", type=Path, default=CACHE / "target/release/repa-dist", help="repa-dist [%(default)s]")
    add("--tree", type=Path, help="samples to use, made there if there are none [a temporary folder]")
    add("--samples", type=positive, default=4000, help="samples to make [%(default)s]")
    add("--batch", type=positive, default=256, help="samples a batch [%(default)s]")
    add("--seconds", type=float, default=10.0, help="length of one measurement, at least [%(default)s]")
    add("--turns", type=positive, default=3, help="measurements of each side, in turns [%(default)s]")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add("--check", action="store_true", help="exit 1 unless the ratios are at least 3, 3 and 20")
    arguments = parser.parse_args()
    if not arguments.seconds > 0:
        parser.error("--seconds must be above 0")
    return arguments


def main() -> int:
    """Measures, prints, and checks on request."""
    arguments = parse_arguments()
    # Before anything is installed or made.
    if not os.access(arguments.binary, os.X_OK):
        fail(f"{arguments.binary} is not there; build it (cargo build --release) or name another (--binary)")
    enter_environment(arguments.env)
    temporary = tempfile.TemporaryDirectory(prefix="repa-store-")
    with folder_or_temporary(arguments.tree) as tree, temporary as parent:
        make_tree(tree, arguments.samples)
        samples, png_kb = measure_images(tree)
        note(f"{samples} images, mean PNG: {png_kb:.1f} KB")
        if not PNG_KB[0] <= png_kb <= PNG_KB[1]:
            note(f"warning: that of photographs is {PNG_KB[0]:g} to {PNG_KB[1]:g} KB")
        store = Path(parent) / "store"
        import_store(arguments.binary, tree, store)
        rows = compare(tree, store, arguments.binary, arguments.batch, arguments.seconds, arguments.turns)
    facts = machine_facts()
    print_table(rows, facts)
    if arguments.json is not None:
        settings = {name: getattr(arguments, name) for name in ["batch", "seconds", "turns"]}
        settings |= {"samples": samples, "mean_png_kb": png_kb, "workers": WORKERS}
        report = {"machine": facts, "settings": settings, "rows": [row.to_json() for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    short = [row for row in rows if row.ratio < row.required_ratio]
    if arguments.check:
        for row in short:
            note(f"below the requirement: {row.name}: {row.ratio:.2f}x, not {row.required_ratio:g}x")
    return 1 if arguments.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
