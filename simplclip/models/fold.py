"""Folding for inference: branches and batch norms become part of their convolution.

    model = simplclip.fold(model.eval())

timm's `reparameterize_model` merges the branches of FastViT, MobileOne, RepVGG and the like, and of
every module with one of its methods (`fuse`, `reparameterize`, `switch_to_deploy`). Then each batch
norm that follows a convolution is merged into it. In training, `fold_frozen` lets the frozen parts
of a model run as folded copies.
"""

import copy
import inspect
from collections import Counter
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.models import fastvit
from timm.utils import reparameterize_model
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from simplclip.common.errors import InputError
from simplclip.models import mobileclip
from simplclip.models.inherit import frozen_modules
from simplclip.nn import has_hooks
from simplclip.ops import checks

Model = TypeVar("Model", bound=nn.Module)

# Exact types, since a subclass may compute something else, e.g. standardise its weight.
_CONVS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)


def fold(model: Model) -> Model:
    """Returns a copy of a model in eval mode that computes the same with fewer layers.

    It has no branches and batch norms. A batch norm is merged where a symbolic trace (torch.fx) of
    a module's `forward` shows that a 2-d convolution passes its output only to this norm. The
    activation in timm's `BatchNormAct2d` stays. A layer with hooks, a parametrization, or several
    owners or calls is left as it is, and so is a module that cannot be traced.

    Tied weights keep their values elsewhere. The result is for inference: its weights get no
    gradient, and its state dict has other names. Raises InputError if a module is in training mode,
    where a batch norm uses its batch's statistics.
    """
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    for name, module in model.named_modules():
        if module.training:
            kind = type(module).__name__
            raise InputError(
                f"model: expected eval mode (call model.eval() first), got {kind} {name!r} in "
                "training mode"
            )
    holder = nn.Module()  # timm merges only the children of its argument
    holder.model = copy.deepcopy(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # timm's new layers draw initial weights, which must not change the random numbers of a resumed
    # run.
    with torch.no_grad(), device, torch.random.fork_rng(devices=[]):
        reparameterize_model(holder, inplace=True)
        owners: Counter[int] = Counter()
        for module in holder.modules():
            owners.update(map(id, module._modules.values()))
        for module in list(holder.model.modules()):
            for conv, norm in _pairs(module, owners):
                _merge(module, conv, norm)
    folded: Model = holder.model.eval()  # timm's new layers are in training mode
    return folded.requires_grad_(False)


class _Tracer(fx.Tracer):
    """A tracer into no child."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _pairs(module: nn.Module, owners: Counter[int]) -> list[tuple[str, str]]:
    """Returns names of children (convolution, its batch norm) that can be merged."""
    convs = set()
    norms = set()
    child: Any
    for name, child in module.named_children():
        if owners[id(child)] > 1 or has_hooks(child):
            continue
        if type(child) in _CONVS:
            convs.add(name)
        elif type(child) in _NORMS and child.running_mean is not None:
            norms.add(name)
    if not convs or not norms:
        return []
    # Optional arguments get their defaults: without them a trace could follow the branch of another
    # call.
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    try:
        nodes = _Tracer().trace(module, defaults).nodes
    # of any type: data decides what the module computes, or its code cannot be traced
    except Exception:
        return []
    # How often each child is called, or one of its tensors is read.
    uses = Counter(
        str(node.target).split(".")[0] for node in nodes if node.op in ("call_module", "get_attr")
    )
    once = {name for name, count in uses.items() if count == 1}
    convs &= once
    norms &= once
    pairs = []
    for node in nodes:
        if node.op != "call_module" or node.target not in norms or not node.args:
            continue
        conv: Any = node.args[0]
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) > 1:
            continue
        if conv.target in convs:
            pairs.append((conv.target, node.target))
    return pairs


def _merge(module: nn.Module, conv_name: str, norm_name: str) -> None:
    """Folds a batch norm into the convolution before it, both children of `module`, in place."""
    conv: Any = module._modules[conv_name]
    norm: Any = module._modules[norm_name]
    statistics = norm.running_mean, norm.running_var, norm.eps
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, *statistics, norm.weight, norm.bias
    )
    parts = (getattr(norm, "drop", None), getattr(norm, "act", None))
    rest = [part for part in parts if part is not None]
    setattr(module, norm_name, nn.Sequential(*rest) if rest else nn.Identity())


def fold_frozen(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Lets frozen modules of a model (see `freeze`) run as folded copies from now on.

    These are the modules with convolutions and without hooks, the largest that are frozen as one.
    Their `forward` is replaced, in place. Returns the copies by the modules' names.

    dtype: the dtype of the run's autocast, None for fp32. Convolutions and linear layers of the
    copies are stored in it, other tensors in fp32. A module that runs under another autocast does
    not use its copy.

    The weights must not change afterwards. The copies belong to no module, so that no state dict
    has them, and have to be moved to a device by themselves.
    """
    copies: dict[str, nn.Module] = {}
    for name, module in frozen_modules(model):
        folded = _copy(module, dtype)
        if folded is not None:
            copies[name] = folded
            module.forward = partial(_run_folded, module, folded, dtype)
    return copies


def _run_folded(
    module: nn.Module,
    folded: nn.Module,
    dtype: torch.dtype | None,
    x: Tensor,
    *args: Any,
    **options: Any,
) -> Any:
    """Returns folded(x, ...), or under another autocast than `dtype` the module's own forward."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if autocast != dtype:
        return type(module).forward(module, x, *args, **options)
    return folded(x, *args, **options)


def _copy(module: nn.Module, dtype: torch.dtype | None) -> nn.Module | None:
    """Returns a folded copy in channels_last; None if it saves nothing, or if hooks are inside."""
    inside = list(module.modules())
    convolutions = sum(isinstance(inner, _ConvNd) for inner in inside)
    if not convolutions or any(has_hooks(inner) for inner in inside[1:]):
        return None
    folded = fold(module)
    # A vision transformer's patches are a single convolution, with nothing to fold.
    names = [name for name, _ in module.named_modules()]
    if convolutions == 1 and [name for name, _ in folded.named_modules()] == names:
        return None
    if dtype == torch.bfloat16:  # float16 has no exponents for layer scales of 1e-5
        _fold_scales(folded)
    if dtype is not None:
        _cast(folded, dtype)
    return folded.to(memory_format=torch.channels_last)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores a model's convolutions and linear layers in a dtype, in place."""
    for module in list(model.modules()):
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.to(dtype)
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and _is_pointwise(child):
                setattr(module, name, _Pointwise(child))


@torch.no_grad()
def _fold_scales(model: nn.Module) -> None:
    """Multiplies layer scales into their MLP's last layer: in fp32 they would widen its output."""
    block: Any
    for block in model.modules():
        if isinstance(block, fastvit.RepMixerBlock) and isinstance(
            block.layer_scale, fastvit.LayerScale2d
        ):
            scale: Tensor = block.layer_scale.gamma
            block.layer_scale = nn.Identity()  # type: ignore[assignment]
        elif isinstance(block, mobileclip.RepMixerBlock) and block.layer_scale is not None:
            scale = block.layer_scale
            block.layer_scale = None
        else:
            continue
        last = block.mlp.fc2
        last.bias.mul_(scale.flatten())
        last.weight.mul_(scale.reshape(-1, *[1] * (last.weight.dim() - 1)))


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is 1x1 with stride 1, one group and a bias, and without padding."""
    plain = conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return plain and conv.kernel_size == (1, 1) and conv.bias is not None


class _Pointwise(nn.Module):
    """A pointwise convolution [N, C, H, W] -> [N, C', H, W].

    On a GPU it runs as a product, which adds the bias as it writes the result; torch adds that of a
    convolution in a kernel of its own.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or not x.is_contiguous(memory_format=torch.channels_last):
            return self.conv(x)
        pixels = x.permute(0, 2, 3, 1)
        y = F.linear(pixels.flatten(0, 2), self.conv.weight.flatten(1), self.conv.bias)
        return y.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)
