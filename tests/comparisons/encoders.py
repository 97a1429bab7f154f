"""Makes the golden cases of kind `encoder` in tests/golden: what timm's and Hugging Face's vision transformers compute,
used as REPA's `load_encoders` and `preprocess_raw_image` use the encoders of each family. Models are small and random.

    pip install torch timm transformers safetensors
    python3 tests/comparisons/encoders.py [FOLDER]
"""

import json
import pathlib
import sys
from functools import partial

import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from transformers import CLIPVisionConfig, CLIPVisionModel

WIDTH, DEPTH, HEADS, PATCH, RESOLUTION = 24, 2, 3, 4, 32
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(x, statistics):
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in statistics)
    return (x - mean) / std


def resized(x):
    return torch.nn.functional.interpolate(x, x.shape[-1] * 224 // 256, mode="bicubic")


def timm(size, **options):
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    return VisionTransformer(img_size=size, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
                             num_classes=0, norm_layer=norm, **options)


def spread(model):
    """Values far from their first ones, so that a norm, a bias or a position left out shows."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.5 if "pos" in name or value.dim() < 2 else 0.25
            value.copy_(torch.randn(value.shape) * scale + (1.0 if name.endswith("weight") and value.dim() < 2 else 0.0))
    return model.eval()


def on_grid(model, side):
    """The model for another grid than its positions were made for, as the reference resamples them."""
    weights = model.state_dict()
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [side, side])
    larger = timm(side * PATCH)
    larger.load_state_dict(weights)
    return larger.eval()


def before_the_norm(model, x):
    """models/mae_vit.py: all blocks, no final norm, without the class token."""
    x = model.patch_embed(x)
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    return x[:, 1:]


def case(family, image):
    x = image.float() / 255.0
    if family == "clip":
        x = normalised(resized(x), CLIP)
        config = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH,
                                  num_attention_heads=HEADS, image_size=x.shape[-1], patch_size=PATCH,
                                  hidden_act="quick_gelu", layer_norm_eps=1e-5)
        model = spread(CLIPVisionModel(config))
        return model.state_dict(), x, model(x).last_hidden_state[:, 1:]
    x = normalised(x, IMAGENET)
    if family == "jepa":
        x = resized(x)
        model = spread(timm(x.shape[-1], class_token=False, global_pool="avg", fc_norm=False))
        return model.state_dict(), x, model.forward_features(x)
    # Made for 7 patches a side, as the published ones are for 14, and used with 8.
    model = spread(timm(RESOLUTION * 7 // 8))
    used = on_grid(model, RESOLUTION // PATCH)
    tokens = before_the_norm(used, x) if family == "mae" else used.forward_features(x)[:, 1:]
    return model.state_dict(), x, tokens


@torch.no_grad()
def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1] / "golden")
    for number, family in enumerate(["dinov1", "mocov3", "mae", "jepa", "clip"]):
        torch.manual_seed(number)
        image = torch.randint(0, 256, (2, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8)
        weights, preprocessed, tokens = case(family, image)
        tensors = {f"weights.{name}": value for name, value in weights.items() if value.is_floating_point()}
        tensors |= {"image": image, "preprocessed": preprocessed, "patch_tokens": tokens}
        config = {"family": family, "num_heads": HEADS, "raw_resolution": RESOLUTION}
        path = folder / f"encoder-{family}.safetensors"
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path,
                  metadata={"kind": "encoder", "config": json.dumps(config)})
        print(path, path.stat().st_size)


main()
