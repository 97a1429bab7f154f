"""Makes the golden cases of kinds `inception` and `scores` in tests/golden: what torch-fidelity's Inception v3, which
is compatible with TensorFlow's, computes with weights by a formula (`spread`), so that 95 MB of them need not be kept;
and ADM's scores of such features, by NumPy from the papers' formulas.

    pip install torch safetensors torch-fidelity
    python3 tests/comparisons/inception.py [FOLDER]
"""

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3

Inception = feature_extractor_inceptionv3.FeatureExtractorInceptionV3


def words(name, count):
    """SplitMix64 from FNV-1a of the name."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def spread(name, shape):
    """Uniform values by name and place: kernels in +-sqrt(6 / inputs of an output), gains and variances in 0.5 to 1.5,
    the rest in +-0.5."""
    unit = (words(name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    if name.endswith(("bn.weight", "running_var")):
        values = unit + np.float32(0.5)
    elif len(shape) > 1:
        values = (2 * unit - 1) * np.float32((6 / np.prod(shape[1:])) ** 0.5)
    else:
        values = unit - np.float32(0.5)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


class OfFormula(Inception):
    """The network with the formula's weights in place of a download."""

    def load_state_dict(self, *_):
        for name, value in self.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                value.copy_(spread(name, tuple(value.shape)))


def waves(count, height, width, seed, steepest=9):
    """Smooth pictures, uint8 [N, H, W, 3]."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    rows, columns = rows[..., None] / height, columns[..., None] / width
    pictures = []
    for _ in range(count):
        a, b, c = generator.uniform(0, steepest, (3, 3))
        pictures.append(np.sin(rows * a + columns * b + c) * 127 + 128)
    return np.stack(pictures).astype(np.uint8)


class Features:
    def __init__(self):
        feature_extractor_inceptionv3.load_state_dict_from_url = lambda *_, **__: None
        self.model = OfFormula("inception", ["2048", "logits_unbiased"])
        self.model.Mixed_6d.branch1x1.register_forward_hook(self.keep)
        print(sum(value.numel() for value in self.model.parameters()), "parameters")

    def keep(self, _module, _inputs, out):
        self.spatial = out.permute(0, 2, 3, 1)[..., :7].flatten(1)

    @torch.no_grad()
    def __call__(self, images):
        pooled, logits = self.model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
        return pooled, self.spatial, logits.double().softmax(1)


def frechet(a, b):
    """With covariances A^T A and B^T B of fewer samples than features, the root of their product has the singular
    values of A B^T as its eigenvalues: exact, where scipy.linalg.sqrtm of so singular a matrix is not."""
    a, b = a.double().numpy(), b.double().numpy()
    between = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    return between @ between + (a * a).sum() + (b * b).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()


def inception_score(probabilities):
    p = probabilities.numpy()
    return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())


def inside(points, centres, neighbour=3):
    """The fraction of the points within a centre's distance to its third neighbour."""
    radii = torch.cdist(centres, centres).sort(1).values[:, neighbour]
    return (torch.cdist(points, centres) <= radii).any(1).double().mean().item()


def save(folder, kind, case):
    for name, values in case.items():
        print(kind, name, tuple(values.shape), values.float().mean().item())
    tensors = {name: values.contiguous() for name, values in case.items()}
    save_file(tensors, folder / f"{kind}.safetensors", {"kind": kind, "config": json.dumps({})})


def main(folder):
    features = Features()
    image = waves(3, 36, 28, 0)
    pooled, spatial, probabilities = features(image)
    save(folder, "inception", {
        "image": torch.from_numpy(image),
        "pooled": pooled,
        "spatial": spatial,
        "probabilities": probabilities.float(),
    })

    reference, samples = waves(20, 24, 24, 1), waves(16, 24, 24, 2, 16)
    theirs, ours = features(reference), features(samples)
    scores = {
        "fid": frechet(ours[0], theirs[0]),
        "sfid": frechet(ours[1], theirs[1]),
        "inception_score": inception_score(ours[2]),
        "precision": inside(ours[0].double(), theirs[0].double()),
        "recall": inside(theirs[0].double(), ours[0].double()),
    }
    print(scores)
    images = {"reference": torch.from_numpy(reference), "samples": torch.from_numpy(samples)}
    save(folder, "scores", images | {name: torch.tensor([float(v)], dtype=torch.float64) for name, v in scores.items()})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden"))
