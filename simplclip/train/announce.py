"""What a run says before its first step: the model, the loss, and what computes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from simplclip import models
from simplclip.common import hardware
from simplclip.models.weights import LOADED, TRAINS
from simplclip.ops import backends
from simplclip.train.state import Training


def lines(training: Training, why_precision: str) -> Iterator[str]:
    """The tables of the model and of what it inherits, then lines that begin with what they are about."""
    sigmoid = training.config.loss.base == "sigmoid"
    yield models.summary(training.model, training.config.model.name)
    yield from training.weights.lines() if training.weights else ()
    yield from training.inheritance.lines() if training.inheritance else ()
    served = _backend(training, "similarity_sigmoid" if sigmoid else "similarity_loss_fwd")
    yield f"loss       {_loss(training)}; similarity_loss is served by {served}"
    if sigmoid:
        yield f"logits     {_logits(training)}"
    yield f"blocks     {_blocks(training)}"
    for line in training.folded.lines():
        yield f"frozen     {line}"
    yield f"precision  {training.precision} ({why_precision})"
    threads, workers = torch.get_num_threads(), training.config.data.workers
    yield f"device     {training.device}; CPU threads: {threads}; loader processes: {workers}"


def _loss(training: Training) -> str:
    weights = ", ".join(term.removesuffix("_loss").replace("_", " ") for term in training.config.loss.weights)
    if training.teacher is None:
        return f"{type(training.loss).__name__}: {weights}"
    views = f" of {training.teacher['views']['number']} views of each image" if "views" in training.teacher else ""
    stored = f"features of {training.teacher['name']}, {training.teacher['width']} wide,{views} are read from the data"
    return f"{type(training.loss).__name__}: {weights}; {stored}; no teacher is in memory"


def _logits(training: Training) -> str:
    """The scale and the bias that the run starts with, and where they are from."""
    tables = [table for table in (training.weights, training.inheritance) if table]
    taken = {row.module for table in tables for row in table.rows if row.status in (LOADED, TRAINS)}

    def source(name: str) -> str:
        if training.step:
            return "from the checkpoint"
        if f"init_{name}" in training.config.model.options and not training.weights:
            return f"model.options.init_{name}"
        return "from the weights above" if {"", name} & taken else "as in SigLIP"

    bias = "no bias" if training.logit_bias is None else f"bias {training.logit_bias.item():.4g}"
    scale = f"scale {training.model.logit_scale.exp().item():.4g}"
    return f"{scale} ({source('logit_scale')}), {bias} ({source('logit_bias')})"


def _backend(training: Training, op: str, **call: Any) -> str:
    dtype = hardware.DTYPES[training.precision] or torch.float32
    return backends.select(op, training.device.type, dtype, backends.forced(), **call)[0]


def _blocks(training: Training) -> str:
    """The number of simplified blocks of the model, and the backends that run their parts."""
    if not training.blocks:
        return "none simplified"
    attention = sorted({_backend(training, "shaped_attention_fwd", width=b.width // b.heads) for b in training.blocks})
    mlp = _backend(training, "parallel_mlp_fwd")
    count = len(training.blocks)
    return f"{count} simplified; shaped_attention is served by {' and '.join(attention)}, parallel_mlp by {mlp}"
