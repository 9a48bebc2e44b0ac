"""One step of training: forward, loss, backward, a check, update.

Plain functions of the `State` that setup.py makes.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from simplclip import gradient_cache
from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, UserError
from simplclip.data.transforms import finish_on_device
from simplclip.train.beginning import find_beginning
from simplclip.train.objective import average_gradient
from simplclip.train.optimizer import learning_rate
from simplclip.train.setup import State

KEPT_SHARE = 10  # of the memory, one part may hold outputs that are kept
MAX_LOGIT_SCALE = math.log(100)  # as in open_clip

Batch = dict[str, Any]


class TrainingError(UserError, RuntimeError):
    """Error that ends training; it says what is saved, and its __cause__ is the error behind it."""


def train_step(state: State, batches: list[Batch]) -> dict[str, float]:
    """Runs one step: changes the weights by the gradient over its micro-batches; returns figures.

    batches: of a loader, dicts with "image", "text", "group" and, with a teacher, "teacher_image"
    and "teacher_text".
    Returns "step" (steps that are now done), "loss", its weighted terms, "logit_scale", with the
    sigmoid loss "logit_bias", "grad_norm" before clipping, and "lr". Raises TrainingError, before
    the update, if one of them is not finite. With fp16 the norm may be infinite: the step is then
    counted, and the scaler leaves the weights as they are.
    """
    optimizer, scaler = state.optimizer, state.scaler
    optimizer.zero_grad(set_to_none=True)
    terms = accumulate_gradients(state, batches)
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, state.config.optim.grad_clip or math.inf)
    figures = {**terms, "logit_scale": state.model.logit_scale.exp()}
    if state.logit_bias is not None:
        figures["logit_bias"] = state.logit_bias
    figures["grad_norm"] = norm
    # The step synchronises once, before the update, so that a bad step does not change the
    # parameters.
    on_device = torch.stack([figure.detach().float().reshape(()) for figure in figures.values()])
    values = dict(zip(figures, on_device.tolist()))
    # The scaler handles an infinite gradient: it skips the step and lowers its scale.
    watched = dict(values)
    if scaler.is_enabled():
        del watched["grad_norm"]
    if not all(math.isfinite(value) for value in watched.values()):
        shown = ", ".join(f"{name}={value:g}" for name, value in watched.items())
        raise TrainingError(
            f"step {state.step + 1}: not finite: {shown}; stopped before the update. Try a new run "
            "with a lower optim.lr, a longer optim.warmup or run.precision=fp32"
        )
    lr = learning_rate(state.config, state.step)
    update(state, lr)
    return {"step": state.step, **values, "lr": lr}


def accumulate_gradients(state: State, batches: list[Batch]) -> dict[str, Tensor]:
    """Adds a step's gradients, scaled by `state.scaler`, to `.grad`; returns detached terms."""
    # in this order the towers run
    encode = {"text": partial(encode_text, state), "image": partial(encode_image, state)}
    for tower, wrapper in state.wrappers.items():
        encode[tower] = partial(wrapper, encode[tower])
    if state.config.data.micro_batch is None:
        (batch,) = batches
        features = {tower: function(batch) for tower, function in encode.items()}
        loss, terms = compute_losses(state, batches, features["image"], features["text"])
        state.scaler.scale(loss).backward()
        return {"loss": loss.detach(), **terms}
    texts, rows = text_batches(state, batches)
    for tower, beginning in state.beginnings.items():
        encode[tower] = partial(beginning.encode, encode[tower])

    def losses_in_order(text: Tensor, image: Tensor) -> Any:
        """Computes the loss of texts, which may be sorted by length, in the order of the images."""
        if rows is not None:
            text = text.index_select(0, rows)
        return compute_losses(state, batches, image, text)

    terms = gradient_cache.backward(
        encode,
        {"image": batches, "text": texts},
        losses_in_order,
        model=nn.ModuleList([state.model, *state.wrappers.values()]),
        scaler=state.scaler,
    )
    return {"loss": reduce(torch.add, terms.values()), **terms}


def update(state: State, lr: float) -> None:
    """Changes weights, scaler and averages by the gradients; counts the step.

    `state.updating` is set meanwhile, since the update cannot be undone.
    """
    state.updating = True
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    with torch.no_grad():
        state.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    if state.ema:
        state.ema.update()
    state.step += 1
    state.updating = False


def compute_losses(
    state: State, batches: list[Batch], image: Tensor, text: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss over all `batches`, and its weighted terms by column, without gradients.

    image, text: features [N, D] and [N k, D] of all batches, with k captions of each image.
    """
    teacher = []
    if state.teacher:
        teacher = _teacher_features(state, state.teacher["width"], batches)
    groups = groups_of(state, batches)
    with hardware.autocast(state.precision, state.device):
        scale, bias = average_gradient(state.model.logit_scale), average_gradient(state.logit_bias)
        return state.objective(state.step, image, text, scale.exp(), bias, groups, *teacher)


def _teacher_features(state: State, expected: int, batches: list[Batch]) -> list[Tensor]:
    """Returns the teacher's features: of images [N, D̂] and of texts [N k, D̂]."""
    features = []
    for name in ("teacher_image", "teacher_text"):
        rows = torch.cat([batch[name] for batch in batches]).flatten(0, -2)
        features.append(rows.to(state.device, non_blocking=True))
    width = features[0].shape[1]
    if width != expected:
        raise InputError(
            f"data.sidecars: expected features of width {expected}, as their meta.json says, got "
            f"features of width {width}"
        )
    return features


def encode_image(state: State, batch: Batch) -> Tensor:
    """Returns normalised features [N, D] of batch["image"] [N, 3, S, S], which may be uint8."""
    images = finish_on_device(
        state.transform, batch["image"], state.device, channels_last=state.channels_last
    )
    with hardware.autocast(state.precision, state.device):
        return state.model.encode_image(images, normalize=True)


def encode_text(state: State, batch: Batch) -> Tensor:
    """Returns normalised features, a row for each caption in batch["text"] [N, k, L] or [n, L]."""
    text = batch["text"].flatten(0, -2)
    if state.prepared.crop is None:  # otherwise TextCrop needs the text on the CPU, and moves it
        text = text.to(state.device, non_blocking=True)
    with hardware.autocast(state.precision, state.device):
        return state.model.encode_text(text, normalize=True)


def keep_frozen(state: State, memory: int | None = None) -> None:
    """Adds the frozen beginnings of the towers to `state.beginnings`, with a line in `state.lines`.

    Gradient caching keeps their outputs, as far as these take a tenth of the memory together.
    memory: bytes of the device, by default of this machine's.
    """
    config = state.config
    if config.data.micro_batch is None or not config.run.keep_frozen:
        return
    try:
        gradient_cache.check(state.model)
    except InputError:  # which the first step raises
        return
    images = config.data.batch_size // ranks.count()
    counts = {"image": images, "text": images * config.data.captions_per_image}
    room = (memory or hardware.total_memory(state.device)) // KEPT_SHARE
    for tower, encode in (("image", encode_image), ("text", encode_text)):
        trial = _trial_batch(state.model, tower)
        found = find_beginning(state.model, partial(encode, state), trial)
        if found is None:
            continue
        beginning, size = found
        size *= counts[tower]
        if size > room:
            beginning.remove()
            continue
        room -= size
        state.beginnings[tower] = beginning
        state.lines.append(
            f"frozen     the {tower} tower's beginning runs once a step; its output takes "
            f"{math.ceil(size / 2**20)} MiB"
        )


def _trial_batch(model: Any, tower: str) -> Batch:
    """Returns a batch of one image [1, 3, S, S] (tower "image") or one text [1, L] ("text")."""
    if tower == "image":
        side = model.visual.image_size
        height, width = (side, side) if isinstance(side, int) else side
        return {"image": torch.zeros(1, 3, height, width, dtype=torch.uint8)}
    length = getattr(model, "context_length", None) or model.text.context_length
    # no run of equal tokens at the end, so that nothing is cropped
    tokens = torch.arange(length) % 2
    return {"text": tokens.unsqueeze(0)}


def text_batches(state: State, batches: list[Batch]) -> tuple[list[Batch], Tensor | None]:
    """Returns the captions of a step as micro-batches of the text tower, and where each went.

    That is the row of each caption's features, int64 [N k], or None. Of cropped texts a micro-batch
    has at most the tokens of its number of full texts; ranks may have different numbers of them.
    """
    if state.prepared.crop is None or len(batches) == 1:
        return batches, None
    texts = torch.cat([batch["text"].flatten(0, -2) for batch in batches])
    parts = state.prepared.crop.split(texts, len(texts) // len(batches) * texts.shape[1])
    rows = torch.cat(parts).argsort().to(state.device)
    return [{"text": texts[part]} for part in parts], rows


def groups_of(state: State, batches: list[Batch]) -> Tensor | None:
    """Returns the groups, int64 [N] on the device; None if all are known to differ."""
    # on the CPU, where reading them waits for nothing
    groups = torch.cat([batch["group"] for batch in batches])
    # those of other ranks are not known
    if ranks.count() == 1 and len(set(groups.tolist())) == len(groups):
        return None
    return groups.to(state.device, non_blocking=True)
