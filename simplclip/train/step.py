"""One step of training: forward, backward, update."""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from simplclip import gradient_cache
from simplclip.common.errors import UserError
from simplclip.train.state import Training

MAX_LOGIT_SCALE = math.log(100)  # as in open_clip
TOWERS = ("text", "image")  # in the order in which they run


class TrainingError(UserError, RuntimeError):
    """Error that ends training. The message says what is saved; the __cause__, if any, is the error behind it."""


def train_step(training: Training, batches: list[dict[str, Any]], terms_of: Any = None) -> dict[str, float]:
    """Runs one step on its micro-batches and returns its figures. terms_of: called in place of `training.terms`."""
    losses = partial(terms_of or training.terms, batches)
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    optimizer.zero_grad(set_to_none=True)
    if training.config.data.micro_batch is None:
        loss, terms = training.together(lambda: losses(**features_of(training, batches[0])))
        scaler.scale(loss).backward()
    else:
        towers = {tower: partial(training.outputs, tower) for tower in TOWERS}
        texts, rows = training.text_batches(batches)

        def in_order(text: Tensor, image: Tensor) -> Any:
            """Computes the loss of texts that were sorted by length in the order of their images."""
            return losses(image=image, text=text if rows is None else text.index_select(0, rows))

        inputs = {"image": batches, "text": texts}
        terms = gradient_cache.backward(towers, inputs, in_order, model=model, scaler=scaler)
        training.together.exchange()
        loss = reduce(torch.add, terms.values())
    scaler.unscale_(optimizer)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, training.config.optim.grad_clip or math.inf)

    # The step synchronises once, before the update, so that a bad step does not change the parameters.
    figures = {"loss": loss, **terms, "logit_scale": model.logit_scale.exp()}
    figures |= {"grad_norm": norm} if training.logit_bias is None else {"logit_bias": training.logit_bias, "grad_norm": norm}
    values = dict(zip(figures, torch.stack([v.detach().float().reshape(()) for v in figures.values()]).tolist()))
    # The scaler handles an infinite gradient: it skips the step and lowers its scale.
    watched = [k for k in values if k != "grad_norm" or not scaler.is_enabled()]
    if not all(math.isfinite(values[k]) for k in watched):
        raise TrainingError(
            f"step {training.step + 1}: not finite: {', '.join(f'{k}={values[k]:g}' for k in watched)}; stopped "
            f"before the update. Try a new run with a lower optim.lr, a longer optim.warmup or run.precision=fp32"
        )
    lr = optimizer.param_groups[0]["lr"]
    training.updating = True
    scaler.step(optimizer)
    scaler.update()
    training.schedule.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    if training.average:
        training.average.update()
    training.step += 1
    training.updating = False
    return {"step": training.step, "epoch": training.epoch, **values, "lr": lr}


def features_of(training: Training, batch: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for tower in TOWERS:
        found |= training.outputs(tower, batch)
    return found
