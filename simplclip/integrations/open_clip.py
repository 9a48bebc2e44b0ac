"""Puts this library's losses in the place of open_clip's, and its models beside open_clip's.

Both for this process; exports count as models.
"""

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
import torch
from open_clip.transform import merge_preprocess_dict
from torch import nn

from simplclip import losses, models
from simplclip.common.errors import InputError
from simplclip.models.mobileclip import from_published
from simplclip.models.registry import Spec
from simplclip.models.trained import check_options

LOSSES = {
    "ClipLoss": losses.ClipLoss,
    "SigLipLoss": losses.SigLipLoss,
    "CoCaLoss": losses.CoCaLoss,
    "DistillClipLoss": losses.WIKDLoss,
}
# open_clip's prefixes of the names of a folder, and of one on Hugging Face's hub
FOLDER, HUB = "local-dir:", "hf-hub:"
OURS = "simplclip"  # the key of this library's part of a configuration
_PAIRS = [(getattr(open_clip.loss, name), replacement) for name, replacement in LOSSES.items()]
_registered: dict[str, Spec] = {}


class use_losses(contextlib.AbstractContextManager):
    """Replaces open_clip's ClipLoss, SigLipLoss, CoCaLoss and DistillClipLoss in loaded modules.

        use_losses()                        # from here on, in this process
        loss = open_clip.create_loss(args)  # makes ours

        with use_losses():                  # or within a block
            ...

    Each global name of a module that stands for one of the classes is replaced, and modules that
    are imported later take this library's classes from open_clip.loss. So `from open_clip import
    ClipLoss` gives this library's class, before or after the use and under any name. Not replaced
    are classes that are held otherwise (a local variable, a default value, an item of a container,
    an attribute of a class), existing losses and subclasses, and other processes. An existing
    subclass must call `super().__init__()`; while the losses are replaced, its
    `ClipLoss.__init__(self)` fails.

    `undo()` gives open_clip's classes back to each replaced name that has not changed since; a
    nested use changes nothing. A module outside of open_clip that was first imported during the use
    keeps this library's classes.

    Signatures, values, gradients and distributed modes are open_clip's; see `simplclip.losses`.
    DistillClipLoss becomes WIKDLoss, which lacks the `dist_loss` and `get_logits` that a subclass
    might call.
    """

    def __init__(self) -> None:
        """Replaces open_clip's losses in all loaded modules at once, until `undo`."""
        # names that stood for open_clip's classes
        self._replaced: list[tuple[ModuleType, str]] = []
        for original, replacement in _PAIRS:
            for module, name in list(_names_of(original)):
                self._replaced.append((module, name))
                setattr(module, name, replacement)

    def undo(self) -> None:
        """Puts open_clip's losses back in all loaded modules; a second call does nothing."""
        replaced = self._replaced
        self._replaced = []
        if not replaced:
            return
        for original, replacement in _PAIRS:
            for module, name in list(_names_of(replacement)):
                package = module.__name__.partition(".")[0]
                if (module, name) in replaced or package in ("open_clip", "open_clip_train"):
                    setattr(module, name, original)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def register_models() -> list[str]:
    """Makes open_clip know this library's models, and the folders of `simplclip export`.

    The folders may be here or on a hub. Returns the models' names.

        register_models()  # from here on, in this process
        model, _, preprocess = open_clip.create_model_and_transforms("local-dir:export")
        tokenizer = open_clip.get_tokenizer("local-dir:export")

    In place of a folder, a model's name with pretrained=FILE works, too. FILE has the layout of
    this library or of open_clip, or, for mobileclip-s0 and SiCLIPs made from it, the published one
    (see `simplclip.models.mobileclip`). All arguments of open_clip's functions work. Each global
    name that stands for open_clip's create_model or get_tokenizer is replaced, as by `use_losses`;
    calls with other names reach open_clip's own. Nothing else of open_clip changes. A second call
    does nothing.

    Raises InputError if options in a folder, which may come from elsewhere, may fetch or unpickle
    files.
    """
    factory = open_clip.factory
    first = not _registered
    for name in models.names():
        spec = models.spec_of(name)
        _registered[name] = spec
        factory._MODEL_CONFIGS[name] = {**spec.config, OURS: {"model": name}}
    if first:
        _replace("create_model", _create_model)
        _replace("get_tokenizer", _get_tokenizer)
    return list(_registered)


def _replace(function: str, ours: Callable[..., Any]) -> None:
    """Replaces a function of open_clip's factory in all loaded modules: ours(original, call)."""
    original = getattr(open_clip.factory, function)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def replacement(*args: Any, **options: Any) -> Any:
        return ours(original, signature.bind(*args, **options))

    for module, name in list(_names_of(original)):
        setattr(module, name, replacement)


def _part_of(name: str) -> dict[str, Any] | None:
    """Returns "simplclip" of the configuration of a registered model or of an export, if any."""
    if name not in _registered and not name.startswith((FOLDER, HUB)):
        return None
    config = open_clip.get_model_config(name)
    part = config.pop(OURS, None)
    if part is None or name in _registered:
        return part
    file = f"{name.removeprefix(FOLDER)}/open_clip_config.json"
    if not isinstance(part, dict) or not isinstance(part.get("model", ""), str):
        raise InputError(
            f"{file}: expected a part {OURS!r} as `simplclip export` writes it, got "
            f"{str(part)[:100]}"
        )
    # open_clip reads the tokenizer from the folder, whatever its name
    config["text_cfg"].pop("hf_tokenizer_name", None)
    options = {key: value for key, value in part.items() if key != "model"}
    check_options(config | options, file)
    return part


def _create_model(original: Callable[..., nn.Module], call: inspect.BoundArguments) -> nn.Module:
    """Calls open_clip's create_model, with this library's model in it, and returns the model."""
    model_name = call.arguments["model_name"]
    if _part_of(model_name) is None:
        return original(*call.args, **call.kwargs)
    factory = open_clip.factory
    convert = factory.convert_state_dict
    if model_name in _registered:  # a folder has its own preprocessing
        forced = call.arguments.get("force_preprocess_cfg")
        call.arguments["force_preprocess_cfg"] = merge_preprocess_dict(
            dict(_registered[model_name].preprocess), forced
        )

    def convert_published(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        return convert(model, from_published(model, state))

    replaced: dict[str, Any] = {
        kind: _builder(getattr(factory, kind)) for kind in ("CLIP", "CustomTextCLIP", "CoCa")
    }
    replaced["convert_state_dict"] = convert_published
    with mock.patch.multiple(factory, **replaced):
        return original(*call.args, **call.kwargs)


def _builder(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns what takes the place of open_clip's class `kind` of models."""

    def build(cast_dtype: torch.dtype | None = None, **config: Any) -> nn.Module:
        """Makes the model of a configuration of open_clip with its part "simplclip"."""
        options = {**config.pop(OURS, {}), **config}
        # A simplified model of open_clip has no name in this library, but all of its configuration.
        unnamed = Spec(build=functools.partial(kind, cast_dtype=cast_dtype))
        return models.create(options.pop("model", unnamed), checkpoint=None, **options)

    return build


def _get_tokenizer(original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
    """Returns open_clip's tokenizer, or the one of a model of this library or of an export."""
    model_name = call.arguments.get("model_name", "")
    name = (_part_of(model_name) or {}).get("model")
    if name is None:
        return original(*call.args, **call.kwargs)
    context_length = call.arguments.get("context_length")
    if not context_length:
        context_length = open_clip.get_model_config(model_name)["text_cfg"]["context_length"]
    return models.tokenizer(name, context_length)


def _names_of(item: object) -> Iterator[tuple[ModuleType, str]]:
    """Yields each module and global name, of all loaded modules, that stands for `item`."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is item:
                yield module, name
