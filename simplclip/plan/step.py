"""A training step on fake tensors: what forward passes of the trainer's functions keep and do. The
towers run at two sizes, between which all is a line; the loss runs at one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import partial
from typing import Any, NamedTuple

import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from simplclip import gradient_cache
from simplclip.common.terms import BY_NAME
from simplclip.models.inherit import largest_modules
from simplclip.ops.similarity.sweeps import SCRATCH_BYTES_ELSEWHERE
from simplclip.plan.cards import GIB, Work
from simplclip.plan.meter import Meter, Pass, fake_device
from simplclip.train import setup
from simplclip.train import step as steps
from simplclip.train.config import Config, ConfigError

FEW, MANY = 128, 512  # pairs of the towers' two passes
OF_LOSS = 4096  # pairs of the loss's pass, at which it works in chunks
MOST_PAIRS = 1 << 16  # of a largest batch; CLIP was trained with 32,768
CARD = torch.device("cuda:0")
TEACHER: dict[str, Any] = {"name": "a ViT-L", "width": 768, "logit_scale": 100.0}
# What is assumed to be taken of a device's memory: by the driver, torch's libraries, cuBLAS and
# cuDNN; and the share of the rest that the allocator loses.
LIBRARIES, FRAGMENTATION = 800 << 20, 0.04


def usable(memory: int) -> int:
    """Returns the bytes that the tensors of a step may take of a device's memory."""
    return int((memory - LIBRARIES) * (1 - FRAGMENTATION))


class Row(NamedTuple):
    """A step of a plan. peak: bytes of torch's allocator."""

    batch_size: int
    micro_batch: int | None  # None: the whole batch
    checkpointed: bool  # by gradient checkpointing
    peak: int
    fits: bool
    works: list[Work]


class Step:
    """The step of a config on a device that need not be there; `model` stays on fake tensors."""

    def __init__(self, config: Config, precision: str, device: torch.device = CARD) -> None:
        """Counts the passes from which rows of all sizes follow.

        All terms of the loss that the run has at some step count. A teacher has features as
        TEACHER. Towers are not compiled. precision: "fp32", "bf16" or "fp16".
        """
        self.checkpointed = config.model.grad_checkpointing
        self.config = config = config.replaced(
            model={"grad_checkpointing": False},
            # memory does not depend on steps, and the data to count may be elsewhere
            run={"compile": False, "steps": 1, "epochs": None},
            loss={BY_NAME[term].weight: each.largest for term, each in config.loss.weights.items()},
        )
        with torch.device("meta"):  # folding frozen parts makes new modules
            prepared = setup.prepare_model(*setup.shapes_of(config), [], config, device)
        self.model = prepared.model
        with fake_device([self.model, *prepared.folded.values()], device) as meter:
            teacher = TEACHER if config.loss.needs_teacher else None
            with meter:
                state = setup.make_state(
                    config, device, precision, prepared=prepared, teacher=teacher
                )
            self._count_update(state, meter)
            self._count_loss(state, meter)
            self._towers = {False: self._count_towers(state, meter)}
            for block in setup.checkpoint_blocks(self.model):
                block.recompute = False
                vars(block)["forward"] = partial(meter.checkpoint, block.forward)
            self._towers[True] = self._count_towers(state, meter)

    def _count_update(self, state: setup.State, meter: Meter) -> None:
        """Counts the state of the training, its gradients, and an update."""
        trained = [p for group in state.optimizer.param_groups for p in group["params"]]
        with meter:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        self._update = meter.count(state.optimizer.step).works
        self._most_of_update = meter.peak
        state.optimizer.zero_grad(set_to_none=True)
        self._bytes = meter.live  # of weights, averages and the optimizer's moments
        self._text_gradients = sum(p.nbytes for p in {*trained} - {*self.model.visual.parameters()})

    def _count_towers(self, state: setup.State, meter: Meter) -> tuple[list[Pass], list[Pass]]:
        """Counts passes of both towers over a batch and a micro-batch, and the bytes of a pair
        after frozen beginnings.

        Texts have all tokens, or so many on average; rounding and groups of lengths add less than
        an eighth and 8 tokens for captions like COCO's and CC12M's.
        """
        model, options = self.model, self.config.data
        frozen = {m for m in largest_modules(model).values() if not isinstance(m, nn.Embedding)}
        visual = {*model.visual.modules()}
        ends: dict[bool, float] = {}

        def note(module: nn.Module, inputs: object, output: Any) -> None:
            if module in frozen and isinstance(output, Tensor) and not output.requires_grad:
                ends[module in visual] = output.nbytes / MANY

        def encode(pairs: int, tokens: int) -> list[Tensor]:
            image = torch.empty(pairs, 3, *to_2tuple(model.visual.image_size), dtype=torch.uint8)
            text = torch.zeros(pairs, options.captions_per_image, tokens).long()
            batch = {"image": image, "text": text}
            # in the trainer's order
            return [steps.encode_text(state, batch), steps.encode_image(state, batch)]

        def line(tokens: int) -> list[Pass]:
            return [meter.count(partial(encode, pairs, tokens)) for pairs in (FEW, MANY)]

        whole = (model if hasattr(model, "context_length") else model.text).context_length
        with register_module_forward_hook(note):
            of_batch = of_micro_batch = line(whole)
        if state.prepared.crop is not None and options.mean_tokens is not None:
            of_batch = line(min(whole, math.ceil(options.mean_tokens * 9 / 8 + 8)))
        self._frozen = sum(ends.values()) if self.config.run.keep_frozen else 0
        return of_batch, of_micro_batch

    def _count_loss(self, state: setup.State, meter: Meter) -> None:
        """Counts the pass of a loss over the features of OF_LOSS pairs."""
        texts = OF_LOSS * self.config.data.captions_per_image
        batch = {
            "group": torch.arange(OF_LOSS),
            "teacher_image": torch.empty(OF_LOSS, TEACHER["width"], dtype=torch.float16),
            "teacher_text": torch.empty(texts, TEACHER["width"], dtype=torch.float16),
        }
        width = setup.width_of(self.config)
        with meter:
            image, text = (
                torch.empty(rows, width, device=state.device, requires_grad=True)
                for rows in (OF_LOSS, texts)
            )
        self._features = (image.nbytes + text.nbytes) / OF_LOSS
        self._loss = meter.count(lambda: steps.compute_losses(state, [batch], image, text))

    def row(
        self, pairs: int, micro: int | None, memory: int, checkpointed: bool | None = None
    ) -> Row:
        """Predicts a step of so many pairs, `micro` at a time.

        checkpointed: by gradient checkpointing; None: as the config says.
        memory: the device's bytes, of which gradient caching may fill a part with outputs of
        frozen beginnings. Raises InputError if `micro` is given and the model does not allow it.
        """
        if checkpointed is None:
            checkpointed = self.checkpointed
        encoded = at(micro or pairs, *self._towers[checkpointed][micro is not None])
        # the loss's multiply-adds grow as the square of the pairs, its bytes as the pairs; backward
        # has a chunk of a matrix of similarities
        kept, peak, works = self._loss
        share = pairs / OF_LOSS
        works = [w._replace(flops=w.flops * share**2, bytes=w.bytes * share) for w in works]
        chunk = 2 * pairs * pairs * self.config.data.captions_per_image
        peak = max(peak * share, kept * share + min(SCRATCH_BYTES_ELSEWHERE, chunk))
        peak = max(encoded.peak, encoded.kept + peak)
        works += [*encoded.works, *self._update]
        if micro is not None:
            gradient_cache.check(self.model)
            kept = (pairs - micro) * self._frozen
            kept *= kept <= memory / steps.KEPT_SHARE
            # all but the last micro-batch are encoded without autograd first; what is frozen, once
            times = pairs // micro - 1
            works += [work._replace(runs=0, times=times) for work in encoded.works]
            works += [w._replace(times=times) for w in encoded.works if w.runs or not kept]
            # when a micro-batch is encoded again there are gradients of features and of texts
            features = pairs * self._features
            again = (encoded.kept if kept else encoded.peak) + features + self._text_gradients
            peak = kept + features + max(peak, again)
        peak = round(max(self._bytes + peak, self._most_of_update))
        return Row(pairs, micro, checkpointed, peak, peak <= usable(memory), works)

    def largest(
        self, memory: int, micro: int | None = None, checkpointed: bool | None = None
    ) -> Row | None:
        """Predicts the largest batch of at most MOST_PAIRS that fits; None if none does.

        micro: pairs at a time, of which the batch is a multiple; None: one graph.
        """
        unit = micro or 1
        sizes = range(unit, MOST_PAIRS + 1, unit)

        def exceeds(size: int) -> bool:
            return not self.row(size, micro, memory, checkpointed).fits

        count = bisect_left(sizes, True, key=exceeds)
        return self.row(count * unit, micro, memory, checkpointed) if count else None

    def cached(self, size: int, memory: int, checkpointed: bool | None = None) -> Row:
        """Predicts the step by gradient caching with the largest micro-batch that fits, else 1."""
        for micro in (n for n in range(size - 1, 0, -1) if size % n == 0):
            row = self.row(size, micro, memory, checkpointed)
            if row.fits:
                return row
        return self.row(size, 1, memory, checkpointed)

    def fitting(self, size: int, memory: int) -> Row:
        """Predicts the step of a batch in the cheapest form that fits: in one graph, by gradient
        checkpointing, or by gradient caching, in micro-batches of the largest divisor of `size`
        that fits.

        Raises ConfigError if none fits, InputError if the model does not allow gradient caching.
        """
        for checkpointed in (None, True):
            row = self.row(size, None, memory, checkpointed)
            if row.fits:
                return row
        row = self.cached(size, memory)
        if row.fits:
            return row
        raise ConfigError(
            f"data.batch_size: expected one that fits {usable(memory) / GIB:.2f} GiB one pair at a "
            f"time, got {size:,}"
        )


def at(pairs: int, few: Pass, many: Pass) -> Pass:
    """Returns the pass of so many pairs, on the line through those of FEW and MANY."""
    share = (pairs - FEW) / (MANY - FEW)

    def between(a: float, b: float) -> float:
        return a + share * (b - a)

    works = [
        a._replace(flops=between(a.flops, b.flops), bytes=between(a.bytes, b.bytes))
        for a, b in zip(few.works, many.works, strict=True)
    ]
    return Pass(between(few.kept, many.kept), between(few.peak, many.peak), works)
