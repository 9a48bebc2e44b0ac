"""Lines that a run prints before its first step: on the model, the data, the loss, the backends of its ops, and warnings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from simplclip import data, models
from simplclip.common import hardware, ranks
from simplclip.models.crop import lengths_of
from simplclip.ops import backends
from simplclip.train.batches import UNCOUNTED
from simplclip.train.config import keys
from simplclip.train.settings import TERMS, Config
from simplclip.train.state import Training

# Settings that have an effect only if one of the listed settings is set.
EFFECTIVE_WITH = {
    "inherit.train": ["inherit.source"],
    "inherit.blocks": ["inherit.source"],
    "loss.plane": ["loss.pm_weight"],
    "loss.interactive": ["loss.interactive_weight"],
    "eval.every": ["eval.splits"],
}


def lines(training: Training, why_precision: str, source: data.Loader) -> Iterator[str]:
    """Yields the tables of the model and of its inherited weights, then lines that begin with their topic."""
    yield models.summary(training.model, training.config.model.name)
    yield from training.weights.lines() if training.weights else ()
    yield from training.inheritance.lines() if training.inheritance else ()
    yield f"data       {_data(training.config, source)}"
    texts = f"computed at full length: {training.padded}" if training.padded else "computed at their own length"
    yield f"texts      {texts}"
    yield f"loss       {_loss(training)}"
    if training.config.loss.base == "sigmoid":
        bias = "none" if training.logit_bias is None else f"{training.logit_bias.item():.4g}"
        yield f"logits     scale {training.model.logit_scale.exp().item():.4g}, bias {bias}"
    yield f"ops        {_ops(training)}"
    for line in training.folded.lines():
        yield f"frozen     {line}"
    yield f"precision  {training.precision} ({why_precision})"
    threads, workers = torch.get_num_threads(), training.config.data.workers
    several = f"ranks: {ranks.count()}, of each " if ranks.count() > 1 else ""
    yield f"device     {training.device}; {several}CPU threads: {threads}; loader processes: {workers}"
    for line in warnings(training.config, source.samples_per_epoch):
        yield f"warning    {line}"


def _data(config: Config, source: data.Loader) -> str:
    k, samples = config.data.captions_per_image, source.samples_per_epoch
    drawn = f"{k} caption{'s' * (k > 1)} drawn of each"
    if samples is None:
        return f"shards: {len(source.parts):,}; images are not counted ({UNCOUNTED}), {drawn}"
    epoch = source.batches_per_epoch * config.data.images_at_a_time / config.data.batch_size
    length = f"; the run is {config.run.steps / epoch:,.1f} epochs" if epoch else ""
    return f"{samples:,} images, {drawn}: {k * samples:,} pairs and {epoch:,.1f} steps an epoch{length}"


def warnings(config: Config, samples: int | None) -> Iterator[str]:
    """Yields warnings of settings that do not do what they seem to do. samples: the number of samples in an epoch."""
    warmup, size, steps = config.optim.warmup, config.data.batch_size, config.run.steps
    if warmup > steps:
        yield f"optim.warmup = {warmup:,} is longer than the run of {steps:,} steps: the rate does not reach optim.lr"
    if samples is not None and samples < size:
        what = "a step sees some more than once" if config.data.micro_batch else "no batch is full"
        yield f"data.batch_size = {size:,} is more than the {samples:,} images of an epoch: {what}"
    for key, others in EFFECTIVE_WITH.items():
        value = attrgetter(key)(config)
        if value != keys()[key].default and not any(attrgetter(other)(config) for other in others):
            yield f"{key} = {value} has no effect without {' or '.join(others)}"


def first_terms(
    training: Training, show: Callable[[str], None], batches: list[dict[str, Any]], image: Tensor, text: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns `training.terms` of a run's first step. Before that, passes the warnings that need data to `show`."""
    captions = batches[0]["text"]
    if captions.ndim == 3:
        number = captions.shape[1]
        fewer = (captions[:, :, None] == captions[:, None]).all(-1).sum((1, 2)) > number
        if fewer.any():
            told = f"{fewer.sum()} of the first {len(fewer)} images have fewer different captions"
            show(f"warning    data.captions_per_image = {number}: {told}; these are drawn more than once")
    if training.crop is not None:
        mean = (lengths_of(captions.flatten(0, -2)) - 1).double().mean()
        show(f"texts      {mean:.1f} of {captions.shape[-1]} tokens on average (data.mean_tokens for simplclip plan)")
    for line in weak_terms(training, batches, image, text):
        show(f"warning    {line}")
    return training.terms(batches, image, text)


def weak_terms(training: Training, batches: list[dict[str, Any]], image: Tensor, text: Tensor) -> Iterator[str]:
    """Yields a line for each term whose gradient of the features has a norm below a hundredth of the sum of all norms."""
    features = [t.detach().float().requires_grad_() for t in (image, text)]
    objective = training.objective
    weights = {term: schedule.at(training.step, objective.steps) for term, schedule in objective.schedules.items()}
    norms: dict[str, float] = {}
    for term in (term for term, weight in weights.items() if weight):
        training.objective = objective.alone(term)
        gradients = torch.autograd.grad(training.terms(batches, *features)[0], features, materialize_grads=True)
        norms[term] = ranks.total(torch.stack([gradient.norm() for gradient in gradients]).norm() ** 2).sqrt().item()
    training.objective, total = objective, sum(norms.values())
    for term, norm in norms.items():
        if norm < total / 100:
            key = f"loss.{TERMS.get(term, 'contrastive_weight')}"
            tenth = f"; {weights[term] * (total - norm) / (9 * norm):.3g} would give it a tenth" if norm else ""
            yield f"{key} = {weights[term]:g} has {100 * norm / total:.2g}% of the gradient at step 1{tenth}"


def _loss(training: Training) -> str:
    terms = ", ".join(term.removesuffix("_loss").replace("_", " ") for term in training.config.loss.weights)
    told = f"{type(training.loss).__name__}: {terms}"
    if training.teacher:
        told += f"; features of {training.teacher['name']}, {training.teacher['width']} wide, are read from the data; "
        told += "no teacher is in memory"
    return told


def _ops(training: Training) -> str:
    """The backends of a step's ops."""
    calls: list[tuple[str, dict[str, Any]]] = [("parallel_mlp_fwd", {})] * bool(training.blocks)
    calls += [
        ("shaped_attention_fwd", {"width": block.width // block.heads, "length": length})
        for block, length in itertools.product(training.blocks, (1, 197))  # few tokens and many
    ]
    calls += [("similarity_sigmoid" if training.config.loss.base == "sigmoid" else "similarity_loss_fwd", {})]
    how: tuple[Any, ...] = training.device, hardware.DTYPES[training.precision] or torch.float32, backends.forced()
    found: dict[str, dict[str, None]] = {}
    for op, call in calls:
        found.setdefault(op, {})[backends.select(op, *how, **call)[0]] = None
    return ", ".join(f"{op} by {' or, of many tokens, '.join(names)}" for op, names in found.items())
