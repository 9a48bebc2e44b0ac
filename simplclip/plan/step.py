"""A training step on fake tensors: what it keeps and does, from forward passes of the trainer's own
functions. The towers run at two sizes, between which all is a line; the loss runs at one.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from simplclip import data, gradient_cache
from simplclip.common.errors import UserError
from simplclip.common.terms import BY_NAME
from simplclip.models.inherit import largest_modules
from simplclip.nn import SimplifiedBlock
from simplclip.ops.similarity.sweeps import SCRATCH_BYTES_ELSEWHERE
from simplclip.plan.meter import Meter, Work, fake_device
from simplclip.train import setup
from simplclip.train import step as steps
from simplclip.train.config import Config

FEW, MANY = 128, 512  # pairs of the towers' two passes
OF_LOSS = 4096  # pairs of the loss's pass, at which it works in chunks
TEACHER_WIDTH = 768  # of a ViT-L


class Pass(NamedTuple):
    """A forward pass. Sizes are bytes beside the state of the training."""

    kept: float  # when it ends, for backward
    peak: float  # while it or the beginning of its backward runs
    works: list[Work]


class Row(NamedTuple):
    """A step of a plan. micro_batch: None: the whole batch. peak: bytes of torch's allocator."""

    batch_size: int
    micro_batch: int | None
    peak: int
    works: list[Work]


class Step:
    """The step of a config on a device, in the context `planned`; `model`: the model."""

    def __init__(self, state: setup.State, meter: Meter) -> None:
        """Counts the state of the training and an update.

        state: on fake tensors, which `meter` holds.
        """
        self.config, self.model, self._state, self._meter = state.config, state.model, state, meter
        self._width = setup.width_of(state.config)
        trained = [p for group in state.optimizer.param_groups for p in group["params"]]
        with meter:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            meter.start()
            state.optimizer.step()
            self._update = Pass(0, meter.peak, meter.works)
            state.optimizer.zero_grad(set_to_none=True)
        self._bytes = meter.live  # of weights, averages and the optimizer's moments
        visual = {id(parameter) for parameter in self.model.visual.parameters()}
        self._text_gradients = sum(p.nbytes for p in trained if id(p) not in visual)

    def row(self, pairs: int, micro: int | None, memory: int) -> Row:
        """Predicts a step of so many pairs, `micro` at a time.

        memory: the device's bytes, of which gradient caching may fill a part with outputs of
        frozen beginnings. Raises InputError if `micro` is given and the model does not allow it.
        """
        encoded, frozen = self._encode(micro or pairs, micro is not None)
        loss = self._loss(pairs)
        peak, works = max(encoded.peak, encoded.kept + loss.peak), []
        if micro is not None:
            gradient_cache.check(self.model)
            kept = (pairs - micro) * frozen
            kept *= kept <= memory / steps.KEPT_SHARE
            # all but the last micro-batch are encoded without autograd first; what is frozen, once
            times = pairs // micro - 1
            works = [work._replace(runs=0, times=times) for work in encoded.works]
            works += [w._replace(times=times) for w in encoded.works if w.runs or not kept]
            # when a micro-batch is encoded again there are gradients of features and of texts
            captions = self.config.data.captions_per_image
            features = 4 * self._width * pairs * (1 + captions)  # in float32
            again = (encoded.kept if kept else encoded.peak) + features + self._text_gradients
            peak = kept + features + max(peak, again)
        works += [*encoded.works, *loss.works, *self._update.works]
        return Row(pairs, micro, round(max(self._bytes + peak, self._update.peak)), works)

    def _encode(self, pairs: int, whole_texts: bool) -> tuple[Pass, float]:
        """Returns the pass of both towers, and the bytes of a pair after frozen beginnings.

        Texts have all tokens, or so many on average; rounding and groups of lengths add less than
        an eighth and 8 tokens for captions like COCO's and CC12M's.
        """
        model, mean = self.model, self.config.data.mean_tokens
        tokens = (model if hasattr(model, "context_length") else model.text).context_length
        if self._state.prepared.crop is not None and mean is not None and not whole_texts:
            tokens = min(tokens, math.ceil(mean * 9 / 8 + 8))
        (few, _), (many, frozen) = (self._towers(size, tokens) for size in (FEW, MANY))
        share = (pairs - FEW) / (MANY - FEW)

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        works = [
            a._replace(flops=between(a.flops, b.flops), bytes=between(a.bytes, b.bytes))
            for a, b in zip(few.works, many.works, strict=True)
        ]
        kept, peak = between(few.kept, many.kept), between(few.peak, many.peak)
        return Pass(kept, peak, works), frozen / MANY

    @functools.cache  # noqa: B019 (a step lives as long as a plan)
    def _towers(self, pairs: int, tokens: int) -> tuple[Pass, int]:
        """Counts the pass of both towers, and the bytes at the ends of their frozen beginnings."""
        ends: dict[bool, int] = {}

        def note(in_image: bool, module: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and not output.requires_grad:
                ends[in_image] = output.nbytes

        hooks = [
            module.register_forward_hook(partial(note, name.startswith("visual")))
            for name, module in largest_modules(self.model).items()
            if self.config.run.keep_frozen and not isinstance(module, nn.Embedding)
        ]
        size = to_2tuple(self.model.visual.image_size)
        batch = {
            "image": torch.empty(pairs, 3, *size, dtype=torch.uint8),
            "text": torch.zeros(pairs, self.config.data.captions_per_image, tokens).long(),
        }
        encoders = steps.encode_text, steps.encode_image  # in the trainer's order
        counted = self._counted(lambda: [encode(self._state, batch) for encode in encoders])
        for hook in hooks:
            hook.remove()
        return counted, sum(ends.values())

    def _loss(self, pairs: int) -> Pass:
        """Returns the pass of a loss over features that are given.

        Its multiply-adds grow as the square of the pairs, its bytes as the pairs.
        """
        kept, peak, works = self._counted_loss
        share = pairs / OF_LOSS
        works = [
            work._replace(flops=work.flops * share**2, bytes=work.bytes * share) for work in works
        ]
        # backward has a chunk of a matrix of similarities
        captions = self.config.data.captions_per_image
        chunk = min(SCRATCH_BYTES_ELSEWHERE, 2 * pairs * pairs * captions)
        return Pass(kept * share, max(peak * share, kept * share + chunk), works)

    @functools.cached_property
    def _counted_loss(self) -> Pass:
        """The pass of a loss over the features of OF_LOSS pairs."""
        texts = OF_LOSS * self.config.data.captions_per_image
        batch: dict[str, Tensor] = {"group": torch.arange(OF_LOSS)}
        if self._state.teacher:
            width = self._state.teacher["width"]
            batch["teacher_image"] = torch.empty(OF_LOSS, width, dtype=torch.float16)
            batch["teacher_text"] = torch.empty(texts, width, dtype=torch.float16)
        with self._meter:
            image, text = (
                torch.empty(rows, self._width, device=self._state.device, requires_grad=True)
                for rows in (OF_LOSS, texts)
            )
        return self._counted(lambda: steps.compute_losses(self._state, [batch], image, text))

    def _counted(self, run: Callable[[], Any]) -> Pass:
        """Counts `run`, and what the beginning of its backward adds."""
        meter = self._meter
        with meter:
            before = meter.start()
            results = run()
            live = meter.live
            del results
        # the gradient of the largest result, or a checkpointed part that runs again
        peak = max(meter.peak, live + max(meter.checkpointed, meter.largest))
        return Pass(live - before, peak - before, meter.works)


@contextlib.contextmanager
def planned(config: Config, precision: str, device: str = "cuda") -> Iterator[Step]:
    """Context of the step of a config on a device that need not be there; yields it.

    All terms of the loss that the run has at some step count. A teacher is the one of the shards
    or, where they are not on this machine, one of TEACHER_WIDTH. Towers are not compiled.
    precision: "fp32", "bf16" or "fp16". device: "cuda" or "cpu".
    """
    weights = config.loss.weights.items()
    config = config.replaced(
        # memory does not depend on steps, and the data to count may be elsewhere
        run={"compile": False, "steps": 1, "epochs": None},
        loss={BY_NAME[term].weight: schedule.largest for term, schedule in weights},
    )
    with torch.device("meta"):  # folding frozen parts makes new modules
        shapes = setup.shapes_of(config)
        prepared = setup.prepare_model(*shapes, [], config, torch.device(device))
    teacher: Any = None
    if config.loss.needs_teacher:
        teacher = {"name": "a teacher", "width": TEACHER_WIDTH, "logit_scale": 100.0}
        with contextlib.suppress(UserError, OSError):
            teacher = data.teacher_stamp(config.data.sidecars)
    modules = [prepared.model, *prepared.folded.values()]
    with fake_device(modules, device) as meter:
        for block in prepared.model.modules():
            if isinstance(block, SimplifiedBlock) and block.recompute:
                block.recompute = False
                vars(block)["forward"] = partial(meter.checkpoint, block.forward)
        with meter:
            meter.hold([(*module.parameters(), *module.buffers()) for module in modules])
            place = torch.device("cuda:0" if device == "cuda" else "cpu")
            state = setup.make_state(config, place, precision, prepared=prepared, teacher=teacher)
        yield Step(state, meter)
