"""The recipe of a model, which `models.create` makes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from open_clip import SimpleTokenizer
from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Spec:
    """The recipe of a model.

    config: open_clip's configuration.
    tokenizer: a function of context_length that makes the tokenizer.
    simplify: the arguments of `simplify`, or None for a model with its own blocks.
    preprocess: fields of open_clip's PreprocessCfg. augment: as of `models.transforms`.
    build: the function that makes the model of the configuration, if open_clip does not.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[..., Tokenizer] = SimpleTokenizer
    simplify: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    augment: str | Mapping[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    build: Callable[..., nn.Module] | None = None
