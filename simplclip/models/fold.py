"""Folding for inference: branches and batch norms become part of the convolution that they belong to.

    model = simplclip.fold(model.eval())

timm's `reparameterize_model` merges the branches of FastViT, MobileOne, RepVGG and the like, and of every module with one of
its methods (`fuse`, `reparameterize`, `switch_to_deploy`). Then each batch norm that follows a convolution is merged into it.
"""

import copy
import inspect
from collections import Counter
from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d
from timm.utils import reparameterize_model
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from simplclip.common.errors import InputError

__all__ = ["fold"]

Model = TypeVar("Model", bound=nn.Module)

# Exact types, since a subclass may compute something else, e.g. standardise its weight.
_CONVS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)


def fold(model: Model, *, inplace: bool = False) -> Model:
    """Merges branches and batch norms of a model in eval mode, which then computes the same with fewer layers.

    A batch norm is merged where a module has it and a 2-d convolution as children, and a symbolic trace (torch.fx) of the
    module's `forward` shows that the convolution's output goes to this norm alone. The activation in timm's
    `BatchNormAct2d` stays. A layer with hooks, a parametrization, or several owners or calls is left as it is, and so is a
    module that cannot be traced. Blocks of simplclip have no batch norm and do not change.

    Merged weights are new tensors, so that tied weights keep their values elsewhere. The result is for inference: it has no
    statistics to train with, and its state dict has other names.

    inplace: change `model` itself; otherwise a deep copy is changed, and `model` is not.

    Returns the folded model, which is `model` if `inplace`, unless it is itself a module that can be merged.
    Raises InputError if a module is in training mode, where a batch norm uses the statistics of its batch.
    """
    for name, module in model.named_modules():
        if module.training:
            what = f"{type(module).__name__} {name!r}" if name else type(module).__name__
            raise InputError(f"model: expected eval mode (call model.eval() first), got {what} in training mode")
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    holder = nn.Module()  # timm merges only the children of its argument
    holder.model = model if inplace else copy.deepcopy(model)
    # timm's new layers draw initial weights, which must not change the random numbers of a resumed run.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        reparameterize_model(holder, inplace=True)
        owners = Counter(id(child) for module in holder.modules() for child in module._modules.values())
        for module in list(holder.model.modules()):
            for layer, norm in _pairs(module, owners):
                _merge(module, layer, norm)
    folded: Model = holder.model.eval()  # timm's new layers are in training mode
    return folded.requires_grad_(False) if frozen else folded


def _pairs(module: nn.Module, owners: Counter[int]) -> list[tuple[str, str]]:
    """Returns pairs of children that can be merged, by name: a layer, and a batch norm that gets the layer's output. Nothing
    else gets that output."""
    free: dict[str, Any] = {n: m for n, m in module.named_children() if owners[id(m)] == 1 and _plain(m)}
    layers = {n: m for n, m in free.items() if type(m) in _CONVS}
    norms = {n: m for n, m in free.items() if type(m) in _NORMS and m.running_mean is not None}
    if not layers or not norms:
        return []
    # Optional arguments get their defaults: without them a trace could follow the branch of another call.
    arguments = inspect.signature(module.forward).parameters.values()
    given = {a.name: a.default for a in arguments if a.default is not a.empty}
    try:
        nodes = _Tracer().trace(module, given).nodes
    except Exception:  # of any type: data decides what the module computes, or its code cannot be traced
        return []
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    read = {str(node.target).split(".")[0] for node in nodes if node.op == "get_attr"}  # e.g. a weight
    found = []
    for node in nodes:
        layer = node.args[0] if node.op == "call_module" and node.target in norms and node.args else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module" or layer.target not in layers:
            continue
        names = str(layer.target), str(node.target)
        once = all(calls[name] == 1 and name not in read for name in names)
        if once and len(layer.users) == 1 and _channels(layers[names[0]]) == _channels(norms[names[1]]):
            found.append(names)
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _plain(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _channels(module: Any) -> int:
    return len(module.running_mean if hasattr(module, "running_mean") else module.weight)


def _merge(module: nn.Module, layer_name: str, norm_name: str) -> None:
    layer: Any = module._modules[layer_name]
    norm: Any = module._modules[norm_name]
    statistics = norm.running_mean, norm.running_var, norm.eps
    layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, norm.weight, norm.bias)
    rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    setattr(module, norm_name, nn.Sequential(*rest) if rest else nn.Identity())
