"""Trains transformers' CLIP and SigLIP models with this library's losses, without the N×N logits of their forward."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import MethodType, TracebackType

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from simplclip import losses
from simplclip.common.errors import InputError

# model -> the class of its forward's result, which is defined in the model's module
OUTPUTS = {
    "AltCLIPModel": "AltCLIPOutput",
    "CLIPModel": "CLIPOutput",
    "ChineseCLIPModel": "ChineseCLIPOutput",
    "MetaClip2Model": "MetaClip2Output",
    "Siglip2Model": "Siglip2Output",
    "SiglipModel": "SiglipOutput",
    "VisionTextDualEncoderModel": "CLIPOutput",
}
LOSS = "simplclip_loss"


class use_losses(contextlib.AbstractContextManager):
    r"""Lets `model(..., return_loss=True)` compute its loss from the features alone, in this model only.

        use_losses(model)                                  # the loss that the model has, from here on
        use_losses(model, ClipPMLoss(pm_weight=1.0))       # another loss
        Trainer(model=model, ...).train()                  # batches with return_loss=True, as the model's own loss needs them

        with use_losses(model):                            # within a block; or: replaced = use_losses(model); replaced.undo()
            ...

    The result has `loss`, `image_embeds`, `text_embeds` and the outputs of the towers, whose `pooler_output` is that of
    `get_image_features` and `get_text_features`. `logits_per_image` and `logits_per_text` are None; a tuple
    (return_dict=False) lacks them. Without return_loss the model computes what it did before, logits included.

    Args:
        model: one of transformers' models in OUTPUTS, from version 5.0 on, before it is wrapped by DistributedDataParallel,
            accelerate or torch.compile. nn.DataParallel is not supported, since its replicas share the forward.
        loss: a module that is called as open_clip's losses are: loss(image_features, text_features, logit_scale, logit_bias).
            The default is `losses.SigLipLoss()` for a model with a logit bias, else `losses.ClipLoss()`; their values and
            gradients are those of the model's own loss. It becomes the submodule `simplclip_loss` of the model, so that what
            it learns is trained and saved with the model; so make the optimizer afterwards.

    Under DistributedDataParallel each rank's loss is that of its own batch, as in transformers and its Trainer. For a loss
    over all ranks give their number, e.g. ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size).

    Raises:
        TypeError: model or loss is of another type.
        ValueError: transformers is too old, or the model's forward is wrapped already; in forward, the numbers of images and
            texts differ.
    """

    def __init__(self, model: PreTrainedModel, loss: nn.Module | None = None) -> None:
        known = next((cls for cls in type(model).__mro__ if cls.__name__ in OUTPUTS), None)
        if known is None or not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected one of transformers' {', '.join(OUTPUTS)}, got {type(model).__name__}")
        version = importlib.metadata.version("transformers")
        if int(version.partition(".")[0]) < 5:
            raise InputError(f"model: expected a model of transformers 5.0 or later, got version {version}")
        if loss is None:
            loss = losses.ClipLoss() if getattr(model, "logit_bias", None) is None else losses.SigLipLoss()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss: expected a module, called as open_clip's losses are, got {type(loss).__name__}")
        self._model: PreTrainedModel | None = model
        self._before, self._forward = getattr(model, LOSS, None), None
        if self._before is None:
            if "forward" in vars(model):
                raise InputError("model: expected the forward of its class, got one that is wrapped, e.g. by accelerate")
            output = getattr(sys.modules[known.__module__], OUTPUTS[known.__name__])
            # A bound method, since accelerate wraps its function and a deepcopy of the model gets a method of its own.
            self._forward = model.forward = MethodType(_with_loss(type(model), output), model)
        setattr(model, LOSS, loss)

    def undo(self) -> None:
        """Puts back the loss that the model had before; a second call does nothing."""
        model, self._model = self._model, None
        if model is None:
            return
        setattr(model, LOSS, self._before)
        if self._before is None:
            delattr(model, LOSS)
            # A forward that has been wrapped since stays, and calls the model's own.
            if vars(model).get("forward") is self._forward:
                del model.forward

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def _with_loss(cls: type[PreTrainedModel], output: type) -> Callable:
    """Returns the forward of the class, changed for calls with return_loss of a model that has a loss of this library."""
    names, of_image, of_text = (_names(f) for f in (cls.forward, cls.get_image_features, cls.get_text_features))

    @can_return_tuple
    def with_loss(self, **inputs):
        image = {name: value for name, value in inputs.items() if name in of_image or name not in of_text}
        text = {name: value for name, value in inputs.items() if name in of_text or name not in of_image}
        image = self.get_image_features(**image, return_dict=True)
        text = self.get_text_features(**text, return_dict=True)
        x, y = image.pooler_output, text.pooler_output
        if len(x) != len(y):
            raise InputError(f"pixel_values: expected as many images as texts for return_loss, {len(y)}, got {len(x)}")
        x, y = (features / features.norm(dim=-1, keepdim=True) for features in (x.to(y.device), y))
        scale, bias = self.logit_scale.exp(), getattr(self, "logit_bias", None)
        loss = getattr(self, LOSS)(x, y, *(t if t is None else t.to(y.device) for t in (scale, bias)))
        return output(loss=loss, text_embeds=y, image_embeds=x, text_model_output=text, vision_model_output=image)

    @functools.wraps(cls.forward)  # the Trainer reads the signature
    def forward(self, *args, **kwargs):
        inputs = dict(zip(names, args)) | kwargs
        if getattr(self, LOSS, None) is None or not inputs.pop("return_loss", False):
            return cls.forward(self, *args, **kwargs)
        return with_loss(self, **inputs)

    return forward


def _names(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind == p.POSITIONAL_OR_KEYWORD]
