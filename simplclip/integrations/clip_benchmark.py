"""Models of this library in clip-benchmark, as the model type "simplclip".

    python -m simplclip.integrations.clip_benchmark eval --model_type simplclip --model siclip2-s0 --pretrained last.pt ...

takes clip-benchmark's own arguments. In a program, `register()` does the same for `clip_benchmark.models.load_clip`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from torch import nn

from simplclip.evaluation.encoder import load

TYPE = "simplclip"


def load_simplclip(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str = "cpu"
) -> tuple[nn.Module, Callable, Callable]:
    """Returns the model, image transform and tokenizer, with clip-benchmark's signature.

    model_name, pretrained: `source` and `checkpoint` of `simplclip.load`, i.e. a model's name and its checkpoint, or a source
    that needs no checkpoint and "". cache_dir is not used.
    """
    encoder = load(model_name, pretrained or None, device=device)
    return encoder.model, encoder.preprocess, encoder.tokenizer


def register() -> None:
    """Adds the model type "simplclip" to clip-benchmark in this process."""
    from clip_benchmark import models

    models.TYPE2FUNC[TYPE] = load_simplclip
    if TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(TYPE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs clip-benchmark's command. arguments: by default the arguments of this process."""
    from clip_benchmark import cli

    register()
    before = sys.argv
    sys.argv = ["clip_benchmark", *(before[1:] if arguments is None else arguments)]  # it reads arguments only there
    try:
        cli.main()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
