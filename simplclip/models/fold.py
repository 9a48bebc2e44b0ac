"""Folding for inference: branches and batch norms become part of their convolution.

    model = simplclip.fold(model)

timm's `reparameterize_model` merges the branches of FastViT, MobileOne, RepVGG and the like, and of
every module with one of its methods (`fuse`, `reparameterize`, `switch_to_deploy`).
"""

import copy
from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from simplclip.models.inherit import largest_modules
from simplclip.ops import checks

Model = TypeVar("Model", bound=nn.Module)


def fold(model: Model) -> Model:
    """Returns a copy of a model in eval mode, which computes the same with fewer layers.

    It has no branches, and no batch norms in timm's ConvNormAct; other batch norms stay, as those
    of ResNets do. The result is for inference: its weights get no gradient, and its state dict has
    other names.
    """
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    holder = nn.Module()  # timm merges only the children of its argument
    holder.model = copy.deepcopy(model).eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # timm's new layers draw initial weights, which must not change the random numbers of a resumed
    # run.
    with torch.no_grad(), device, torch.random.fork_rng(devices=[]):
        reparameterize_model(holder, inplace=True)
        part: Any
        for part in holder.modules():
            norm = getattr(part, "bn", None)
            # a subclass of the layer may compute something else, e.g. standardise its weight
            plain = isinstance(part, ConvNormAct) and type(part.conv) is nn.Conv2d
            if plain and type(norm) is BatchNormAct2d:
                part.conv = fuse_conv_bn_eval(part.conv, norm)
                part.bn = norm.act
    folded: Model = holder.model.eval()  # timm's new layers are in training mode
    return folded.requires_grad_(False)


def fold_frozen(model: nn.Module) -> dict[str, nn.Module]:
    """Lets frozen modules of a model (see `freeze`) run as folded copies from now on.

    These are the modules in which there is something to fold, the largest that are frozen as one.
    Their `forward` is replaced, in place. Returns the copies, in channels_last, by the modules'
    names.

    The weights must not change afterwards. The copies belong to no module, so that no state dict
    has them, and have to be moved to a device by themselves.
    """
    copies: dict[str, nn.Module] = {}
    for name, module in largest_modules(model).items():
        folded = fold(module)
        if len([*folded.modules()]) != len([*module.modules()]):
            copies[name] = folded.to(memory_format=torch.channels_last)
            # A method, since an attribute that is a module would be part of the model.
            module.forward = folded.__call__
    return copies
