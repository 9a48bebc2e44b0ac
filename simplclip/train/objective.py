"""The objective of a run: a loss of simplclip.losses whose terms have weights that depend on the
step; and with several ranks the averages of its gradients.

Each tower has a wrapper of its own, since `gradient_cache.backward` exchanges a tower's gradients
in its last backward pass. Losses average the gradients of their own parameters; `average_gradient`
does it for logit scale and bias, which a step may not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from simplclip import losses
from simplclip.common import ranks
from simplclip.common.terms import BY_NAME, TERMS
from simplclip.models.naming import SCALARS, tower_of
from simplclip.ops import distributed
from simplclip.train.config import ConfigError
from simplclip.train.sections import LossConfig

Scale = TypeVar("Scale", Tensor, Tensor | None)


def terms_of(columns: Iterable[str]) -> dict[str, str]:
    """Returns terms of the loss by their columns, those of metrics.csv that `columns` has."""
    names = {term.column: term.name for term in TERMS}
    return {column: names[column] for column in columns if column in names}


class Objective:
    """A function that computes the weighted terms of a batch at a step of a run by `loss`.

    `loss` has the largest weight of each term, and so the parameters of all terms of the run; each
    step computes its terms with the weights of the step.
    """

    def __init__(
        self, config: LossConfig, steps: int, width: int, teacher: Mapping[str, Any] | None
    ):
        """Makes `loss` for the present ranks, on torch's default device.

        steps: of the whole run. width: D of the student's features. teacher: its "width" D̂ and
        "logit_scale" if any step needs it; projections map student features to another D̂.
        """
        self.schedules, self.steps = config.weights, steps
        self.loss: Any = _make_loss(config, width, teacher)

    def __call__(
        self,
        step: int,
        image: Tensor,  # [N, D]
        text: Tensor,  # [N k, D], k captions of each image
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None,  # []
        group: Tensor | None,  # [N] int64; None: all are different
        *teacher: Tensor,  # features of images [N, D̂] and of texts [N k, D̂], if there is a teacher
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of the weighted terms, and the terms by their columns in metrics.csv.

        Only the sum has gradients. The terms have one order for the whole run. A term of weight 0
        at `step` is not computed and is 0. Each caption of an image makes a pair with the image;
        pairs of one group are not each other's negatives.
        """
        captions = len(text) // len(image)
        if captions > 1:
            if group is None:
                group = torch.arange(len(image), device=image.device)
            group = group.repeat_interleave(captions, 0)
            image = image.repeat_interleave(captions, 0)
            if teacher:
                teacher_image, teacher_text = teacher
                teacher = (teacher_image.repeat_interleave(captions, 0), teacher_text)
        weights = {term: schedule.at(step, self.steps) for term, schedule in self.schedules.items()}
        total, terms = self.loss.terms(
            image,
            text,
            logit_scale,
            weights={term: weight for term, weight in weights.items() if weight},
            logit_bias=logit_bias,
            ids=group,
            teacher=(*teacher, self.loss.teacher_scale) if teacher else None,
        )
        zero = total.new_zeros(())
        return total, {BY_NAME[term].column: terms.get(term, zero) for term in weights}


def _make_loss(config: LossConfig, width: int, teacher: Mapping[str, Any] | None) -> Any:
    """Returns the loss of an `Objective`, made with the largest weight of each term."""
    options: dict[str, Any] = {"rank": ranks.number(), "world_size": ranks.count()}
    for term in TERMS:  # without a teacher, the base has weight 1
        if teacher is None and not term.needs_plane:
            continue
        options.setdefault(term.weight, 0.0)
        if term.name in config.weights:
            options[term.weight] = config.weights[term.name].largest
        if term.choices:
            options[term.name] = getattr(config, term.name)
    if teacher is None and config.base == "sigmoid":
        return losses.SigLipLoss(**options)
    # Gradients are then right after DDP averages them; SigLipLoss always gathers so.
    options["gather_with_grad"] = True
    if teacher is None:
        return losses.ClipPMLoss(**options)
    widths = {"embed_dim": width, "teacher_dim": teacher["width"]}
    loss = losses.WIKDLoss(divergence="kl", **widths, **options)
    # A tensor made from a number at each step would make the CPU wait for a GPU.
    scale = torch.tensor(float(teacher["logit_scale"]))
    loss.register_buffer("teacher_scale", scale, persistent=False)
    return loss


def share_norms(model: nn.Module, device: torch.device) -> None:
    """Makes batch norms in training mode use the statistics of all ranks, in place.

    Raises ConfigError on a CPU, where torch cannot do that.
    """
    if ranks.count() == 1:
        return
    # unlike torch's own, it keeps timm's activations
    from timm.layers import convert_sync_batchnorm

    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if not isinstance(module, _BatchNorm) or not module.training:
            continue
        if device.type != "cuda":
            raise ConfigError(
                f"model.freeze_norms: expected true for several ranks on a {device.type}, where "
                f"their batch norms would drift; got false and {type(module).__name__} '{name}' in "
                "training mode"
            )
        model.set_submodule(name, convert_sync_batchnorm(module))


class _Weights(nn.Module):
    """A tower's parameters as one module; its forward calls the function that it is given."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, encode: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Returns encode(batch)."""
        return encode(batch)


def wrap(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a wrapper of each tower that trains, by "image" and "text"; {} with one rank.

    wrapper(encode, batch) calls encode(batch); backward then averages the tower's gradients. What
    trains gets the first rank's values. All ranks have to call `wrap`.
    """
    if ranks.count() == 1:
        return {}
    towers: dict[str, list[nn.Parameter]] = {"image": [], "text": []}
    for name, parameter in model.named_parameters():
        if name in SCALARS:
            distributed.from_first_rank([parameter], _everyone())
        elif parameter.requires_grad:
            towers[tower_of(name)].append(parameter)
    trained = {name: _Weights(parameters) for name, parameters in towers.items() if parameters}
    # A tower may have parameters that no feature depends on, for which torch searches.
    # `gradient_cache` takes a single wrapper for one of both towers, in which it allows no such
    # parameters.
    search = len(trained) > 1
    return {
        name: DistributedDataParallel(weights, find_unused_parameters=search)
        for name, weights in trained.items()
    }


def _everyone() -> dist.ProcessGroup:
    """Returns the group of all ranks, which have joined."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def average_gradient(scale: Scale) -> Scale:
    """Returns logit scale or bias; backward averages its gradient over the ranks. None for None.

    All ranks have to run backward. With one rank, or if it does not train, it is returned as it is.
    """
    if ranks.count() == 1 or scale is None or not scale.requires_grad:
        return scale
    return distributed.average_gradients_over_ranks([scale], _everyone())[0]
