"""Weights of open_clip by their tags, which it downloads if necessary."""

import open_clip
from torch import nn

from simplclip.common.errors import first_line
from simplclip.models.weights import CheckpointError


def download(name: str, tag: str, argument: str = "source") -> nn.Module:
    """Returns an open_clip model with the weights of a tag, which open_clip downloads if needed.

    Its activation is that of the weights, see `needs_quick_gelu`. argument: its name in errors.
    Raises CheckpointError for an unknown tag or a failed download.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise CheckpointError(
            f"{argument}: expected a tag of {name}, one of {', '.join(tags) or 'none'}, got {tag!r}"
        )
    options = {"force_quick_gelu": True} if needs_quick_gelu(name, tag) else {}
    try:
        return open_clip.create_model(name, pretrained=tag, **options)
    except Exception as error:  # the download may raise many types
        reason = first_line(error)
        raise CheckpointError(
            f"{argument}: open_clip could not get {name}/{tag}: {reason}; or name its file"
        ) from None


def needs_quick_gelu(name: str, tag: str) -> bool:
    """Whether the weights of a tag were trained with QuickGELU, which the configuration of the
    open_clip model does not mention.

    open_clip itself then only warns, and computes other features.
    """
    trained_with: bool = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    return trained_with and "quick_gelu" not in open_clip.get_model_config(name)
