"""Simplified blocks in transformers' CLIP, SigLIP and SigLIP 2 models.

`simplify` imports this for such models only.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer

from simplclip.common.errors import InputError
from simplclip.nn import SimplifiedBlock
from simplclip.ops.modes import has_values

TOWERS = {"text": "text_model", "image": "vision_model"}


class _WithoutLayer(nn.Module):
    """A base class to name before transformers' layer, which then makes no modules of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class EncoderBlock(SimplifiedBlock, _WithoutLayer):
    """A block of a transformers encoder: [B, L, C].

    From the encoder's mask it takes the number of valid tokens.

    Each subclass also derives from the layer that it replaces: transformers finds by class the
    layers to checkpoint, and the layers whose hidden states it returns. mask: the name of the
    tower's argument from which a mask comes, for errors. pools_last: whether the tower pools the
    last token, which then has to be valid. checkpointing: transformers' function for gradient
    checkpointing, if it is enabled. config: the tower's, which may ask for attention weights.
    """

    # whether to check the mask's values: only in a tower's first block, since a check makes a GPU
    # wait
    checks_mask = False

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        config: PreTrainedConfig,
        mask: str = "attention_mask",
        pools_last: bool = False,
        checkpointing: Callable | None = None,
        **options: Any,
    ) -> None:
        """width, heads, mlp_ratio, options: as in `SimplifiedBlock`; the others: see the class."""
        super().__init__(width, heads, mlp_ratio, **options)
        # makes a block that has just begun
        self.fresh = partial(SimplifiedBlock, width, heads, mlp_ratio, **options)
        self.config = config
        self.mask = mask
        self.pools_last = pools_last
        if checkpointing is not None:
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = checkpointing

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Returns the block's output [B, L, C]; kwargs are ignored but for output_attentions.

        attention_mask: as in `_lengths`; None if all tokens are valid.
        """
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise InputError(
                "output_attentions: expected False, since simplified blocks store no attention "
                "weights, got True"
            )
        lengths = None if attention_mask is None else self._lengths(attention_mask)
        return super().forward(hidden_states, lengths)

    def _lengths(self, mask: Tensor) -> Tensor:
        """Returns the lengths [B] of the texts of a mask, counts of valid tokens."""
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):  # flex attention has no tensor
            raise InputError(
                f"{self.mask}: expected a mask [B, L] or [B, 1, L, L], got {type(mask).__name__}"
            )
        visible = mask
        if mask.dtype != torch.bool:
            visible = mask != 0 if mask.dim() == 2 else mask == 0
        # the last token sees every valid token
        rows = visible if mask.dim() == 2 else visible[:, 0, -1]
        lengths = rows.sum(-1)
        if self.checks_mask and not torch.compiler.is_compiling() and has_values(mask):
            self._check_mask(visible, lengths)
        return lengths

    def _check_mask(self, visible: Tensor, lengths: Tensor) -> None:
        """Raises InputError unless valid tokens come first, and padding behind them."""
        tokens = torch.arange(visible.shape[-1], device=visible.device)
        expected = tokens < lengths[:, None]
        if visible.dim() == 4:
            expected = expected[:, None, None]
            if self.causal:
                expected = expected & (tokens <= tokens[:, None])
        if not (visible == expected).all():
            raise InputError(
                f"{self.mask}: expected rows of ones followed by zeros (padding on the right), got "
                "another mask"
            )
        if self.pools_last and (lengths < len(tokens)).any():
            raise InputError(
                f"{self.mask}: expected None or ones, since the model pools the last token, got "
                "padding"
            )


class CLIPBlock(EncoderBlock, CLIPEncoderLayer):
    """The block in the place of CLIPEncoderLayer."""


class SiglipBlock(EncoderBlock, SiglipEncoderLayer):
    """The block in the place of SiglipEncoderLayer."""


class Siglip2Block(EncoderBlock, Siglip2EncoderLayer):
    """The block in the place of Siglip2EncoderLayer."""


# Layer -> its block, and the options of the block in the text and in the image tower.
_BLOCKS: dict[type, tuple[type[EncoderBlock], dict[str, Any], dict[str, Any]]] = {
    CLIPEncoderLayer: (CLIPBlock, {"causal": True}, {}),
    SiglipEncoderLayer: (SiglipBlock, {"pools_last": True}, {}),
    Siglip2EncoderLayer: (Siglip2Block, {"pools_last": True}, {"mask": "pixel_attention_mask"}),
}
_KINDS = ", ".join(layer.__name__ for layer in _BLOCKS)
_BLOCKS |= {entry[0]: entry for entry in _BLOCKS.values()}  # a block can be replaced again


def encoder_layers(
    model: nn.Module, tower: str
) -> Iterator[tuple[str, nn.Module, type[EncoderBlock], dict[str, Any]]]:
    """Yields (path, layer, class, options) for each encoder layer of a tower, "text" or "image".

    class, options: of the block that may replace it, and arguments beside `SimplifiedBlock`'s.
    """
    encoder_model: Any = getattr(model, TOWERS[tower], None)
    layers = getattr(getattr(encoder_model, "encoder", None), "layers", None)
    for index, layer in enumerate(layers or [encoder_model]):
        if type(layer) not in _BLOCKS:
            got = type(layer).__name__
            raise InputError(f"{tower}: expected a transformers encoder with {_KINDS}, got {got}")
        block, text_options, image_options = _BLOCKS[type(layer)]
        options = dict(text_options if tower == "text" else image_options)
        options["config"] = encoder_model.config
        if layer.gradient_checkpointing:
            options["checkpointing"] = layer._gradient_checkpointing_func
        yield f"{TOWERS[tower]}.encoder.layers.{index}", layer, block, options


def _init_weights(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialises a module that a checkpoint lacks, of a block only what was not loaded, in place.

    transformers knows its own modules alone, and would leave a block's gains uninitialised.
    """
    if not isinstance(module, EncoderBlock):
        type(model)._init_weights(model, module)
        return
    fresh = module.fresh().state_dict()
    for name, parameter in module.named_parameters():
        # transformers' mark of what was loaded
        if not getattr(parameter, "_is_hf_initialized", False):
            parameter.copy_(fresh[name])


def prepare_loading(model: Any) -> None:
    """Tells transformers which parameters a model shares, and how its blocks begin, in place.

    So save_pretrained writes one of those that are shared, and from_pretrained sets the others.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._init_weights = partial(_init_weights, part)  # type: ignore[method-assign]
    first: dict[Tensor, str] = {}
    shared: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(parameter, name)
        if source != name:
            shared[name] = source
    # name -> the first name of the same parameter; transformers 5.24 needs only this attribute
    model._tied_weights_keys = shared
    model.all_tied_weights_keys = dict(shared)
