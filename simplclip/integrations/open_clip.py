"""Puts this library's losses in the place of open_clip's, and its models beside open_clip's, for this process."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any
from unittest import mock

import open_clip
from open_clip.model import CustomTextCLIP
from open_clip.transform import merge_preprocess_dict
from torch import nn

from simplclip import losses, models
from simplclip.models.mobileclip import from_published
from simplclip.models.registry import Spec

LOSSES = {
    "ClipLoss": losses.ClipLoss,
    "SigLipLoss": losses.SigLipLoss,
    "CoCaLoss": losses.CoCaLoss,
    "DistillClipLoss": losses.WIKDLoss,
}
_in_force: list[use_losses] = []
_pairs: list[tuple[type, type]] = []  # open_clip's class and ours, while a use is in force
_registered: dict[str, Spec] = {}
_replaced: list[tuple[ModuleType, str, type]] = []  # names of modules that stood for open_clip's class, and that class


class use_losses(contextlib.AbstractContextManager):
    """Replaces ClipLoss, SigLipLoss, CoCaLoss and DistillClipLoss of open_clip in all loaded modules.

        use_losses()                        # from here on, in this process
        loss = open_clip.create_loss(args)  # makes ours

        with use_losses():                  # or within a block
            ...

    `from open_clip import ClipLoss`, before or after it and under any name, gives ours: each global name of a module that
    stands for one of the classes is replaced, and modules that are imported later take ours from open_clip.loss. It does not
    reach a class that is held otherwise (a local variable, a default value, an item of a container, an attribute of a class),
    losses and subclasses that exist already, and other processes. A subclass made before must call `super().__init__()`;
    with `ClipLoss.__init__(self)` it fails meanwhile.

    Uses may overlap: open_clip's classes return when the last one is undone, in whatever order, to each name that still
    stands for ours. A module outside of open_clip that was first imported meanwhile keeps ours.

    Signatures, values, gradients and distributed modes are open_clip's; see `simplclip.losses`. DistillClipLoss becomes
    WIKDLoss, which lacks the `dist_loss` and `get_logits` that a subclass might call.
    """

    def __init__(self) -> None:
        if not _in_force:
            _pairs[:] = [(getattr(open_clip.loss, name), ours) for name, ours in LOSSES.items()]
        _in_force.append(self)
        for theirs, ours in _pairs:
            for module, name in list(_names_of(theirs)):
                _replaced.append((module, name, theirs))
                setattr(module, name, ours)

    def undo(self) -> None:
        """Puts open_clip's losses back, unless another use is in force."""
        if self not in _in_force:
            return
        _in_force.remove(self)
        if _in_force:
            return
        for theirs, ours in _pairs:
            meanwhile = [(module, name, theirs) for module, name in _names_of(ours) if _is_open_clips(module)]
            for module, name, loss in _replaced + meanwhile:
                if loss is theirs and vars(module).get(name) is ours:
                    setattr(module, name, theirs)
        _replaced.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def register_models() -> list[str]:
    """Makes open_clip know this library's models that have its tokenizer, and returns their names.

        register_models()  # from here on, in this process
        model, _, preprocess = open_clip.create_model_and_transforms("mobileclip-s0", pretrained="mobileclip_s0.pt")
        tokenizer = open_clip.get_tokenizer("mobileclip-s0")

    `pretrained` is a file: of this library, of open_clip, or for mobileclip-s0 and the SiCLIPs made from it of the published
    layout (see `simplclip.models.mobileclip`). All arguments of open_clip.create_model work. Each global name that stands
    for that function is replaced, as by `use_losses`; calls with other names reach open_clip's own, and nothing else of
    open_clip changes. A second call changes nothing.
    """
    factory, first = open_clip.factory, not _registered
    specs = {name: models.spec_of(name) for name in models.names()}
    _registered.update({name: spec for name, spec in specs.items() if spec.vocabulary is None})
    factory._MODEL_CONFIGS.update({name: {**spec.config, "custom_text": True} for name, spec in _registered.items()})
    if first:
        theirs = factory.create_model

        @functools.wraps(theirs)
        def create_model(model_name: str, *args: Any, **options: Any) -> nn.Module:
            if model_name not in _registered:
                return theirs(model_name, *args, **options)
            return _create(theirs, model_name, *args, **options)

        for module, name in list(_names_of(theirs)):
            setattr(module, name, create_model)
    return list(_registered)


def _create(theirs: Callable[..., nn.Module], name: str, *args: Any, **options: Any) -> nn.Module:
    """open_clip's create_model with our model in the place of its own; it sets precision and device, loads and so on."""
    factory = open_clip.factory
    convert = factory.convert_state_dict

    def build(cast_dtype: Any = None, **config: Any) -> nn.Module:
        with mock.patch.object(factory, "CustomTextCLIP", CustomTextCLIP):  # a SiCLIP is made from one of open_clip's
            return models.create(name, **config)

    call = inspect.signature(theirs).bind(name, *args, **options)
    forced = call.arguments.get("force_preprocess_cfg")
    call.arguments["force_preprocess_cfg"] = merge_preprocess_dict(dict(_registered[name].preprocess), forced)
    loading = {"convert_state_dict": lambda model, state: convert(model, from_published(model, state))}
    with mock.patch.multiple(factory, CustomTextCLIP=build, **loading):
        return theirs(*call.args, **call.kwargs)


def _names_of(item: Any) -> Iterator[tuple[ModuleType, str]]:
    """The global names of loaded modules that stand for this class or function."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            yield from ((module, name) for name, value in list(vars(module).items()) if value is item)


def _is_open_clips(module: ModuleType) -> bool:
    return module.__name__.partition(".")[0] in ("open_clip", "open_clip_train")
