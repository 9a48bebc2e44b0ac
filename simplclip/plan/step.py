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
from simplclip.common.errors import InputError, UserError
from simplclip.models.inherit import frozen_modules
from simplclip.nn import SimplifiedBlock
from simplclip.ops.similarity.chunks import SCRATCH_BYTES_ELSEWHERE
from simplclip.plan.meter import Meter, Work, fake_device
from simplclip.train import setup
from simplclip.train import step as steps
from simplclip.train.config import Config

FEW, MANY = 128, 512  # pairs of the towers' two passes
OF_LOSS = 4096  # pairs of the loss's pass, at which it works in chunks


class Pass(NamedTuple):
    """A forward pass. Sizes are bytes beside the state of the training."""

    kept: int  # when it ends, for backward
    peak: int  # while it or the beginning of its backward runs
    works: list[Work]


class Row(NamedTuple):
    """A step of a plan. micro_batch: None: the whole batch. peak: bytes of torch's allocator."""

    batch_size: int
    micro_batch: int | None
    peak: int
    works: list[Work]


class Step:
    """The step of a config on a device, in the context `planned`; `model`: the model."""

    def __init__(
        self, config: Config, prepared: Any, meter: Meter, precision: str, teacher: Any
    ) -> None:
        """Makes the state of the training, and counts it and an update.

        prepared, precision, teacher: as of setup.make_state.
        """
        self.config, self.model, self._meter = config, prepared.model, meter
        # where texts are computed at their length
        self._mean_tokens = None if prepared.crop is None else config.data.mean_tokens
        modules = [self.model, *prepared.folded.values()]
        with meter:
            meter.hold([(*module.parameters(), *module.buffers()) for module in modules])
            device = torch.device("cuda:0" if meter.device == "cuda" else "cpu")
            self._state = setup.make_state(
                config, device, precision, prepared=prepared, teacher=teacher
            )
            self._state.step = busiest_step(config)
            optimizer = self._state.optimizer
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            meter.start()
            optimizer.step()
            self._update = Pass(0, meter.peak, meter.works)
            optimizer.zero_grad(set_to_none=True)
        self._bytes = meter.live  # of weights, averages and the optimizer's moments
        visual = {id(parameter) for parameter in self.model.visual.parameters()}
        self._text_gradients = sum(p.nbytes for p in trained if id(p) not in visual)

    @functools.cached_property
    def cacheable(self) -> bool:
        """Whether the model allows gradient caching."""
        with contextlib.suppress(InputError):
            gradient_cache.check(self.model)
            return True
        return False

    def row(self, pairs: int, micro: int | None, memory: int) -> Row:
        """Predicts a step of so many pairs, `micro` at a time.

        memory: the device's bytes, of which gradient caching may fill a part with outputs of
        frozen beginnings.
        """
        mean_tokens = self._mean_tokens if micro is None else None
        encoded, frozen_bytes = self._encode(micro or pairs, mean_tokens)
        loss, features = self._loss(pairs)
        peak, works = max(encoded.peak, encoded.kept + loss.peak), []
        if micro is not None:
            kept = (pairs - micro) * frozen_bytes
            kept *= kept <= memory / steps.KEPT_SHARE
            # all but the last micro-batch are encoded without autograd first; what is frozen, once
            others = pairs // micro - 1
            works = [work._replace(runs=0, times=others) for work in encoded.works]
            works += [w._replace(times=others) for w in encoded.works if w.runs or not kept]
            # when a micro-batch is encoded again there are gradients of features and of texts
            again = (encoded.kept if kept else encoded.peak) + features + self._text_gradients
            peak = round(kept) + features + max(peak, again)
        works += [*encoded.works, *loss.works, *self._update.works]
        return Row(pairs, micro, max(self._bytes + peak, self._update.peak), works)

    def _encode(self, pairs: int, mean_tokens: float | None) -> tuple[Pass, float]:
        """Returns the pass of both towers, and the bytes of a pair after frozen beginnings."""
        few, many = self._passes(mean_tokens)
        share = (pairs - FEW) / (MANY - FEW)

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        works = [
            a._replace(flops=between(a.flops, b.flops), bytes=between(a.bytes, b.bytes))
            for a, b in zip(few[0].works, many[0].works, strict=True)
        ]
        kept, peak = (round(between(*sizes)) for sizes in zip(few[0][:2], many[0][:2]))
        return Pass(kept, peak, works), many[1] / MANY

    @functools.cache  # noqa: B019 (a step lives as long as a plan)
    def _passes(self, mean_tokens: float | None) -> list[tuple[Pass, int]]:
        """Returns the passes of both towers, and bytes of frozen outputs, at FEW and MANY pairs.

        Texts have all tokens, or so many on average; rounding and groups of lengths add less than
        an eighth and 8 tokens for captions like COCO's and CC12M's.
        """
        model: Any = self.model
        tokens = (model if hasattr(model, "context_length") else model.text).context_length
        if mean_tokens is not None:
            tokens = min(tokens, math.ceil(mean_tokens * 9 / 8 + 8))
        frozen: dict[bool, int] = {}  # bytes of the end of a tower's frozen beginning

        def note(in_image: bool, module: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and not output.requires_grad:
                frozen[in_image] = output.nbytes

        hooks = [
            module.register_forward_hook(partial(note, name.startswith("visual")))
            for name, module in frozen_modules(model)
            if self.config.run.keep_frozen and not isinstance(module, nn.Embedding)
        ]
        passes = []
        for pairs in (FEW, MANY):
            image = pairs, 3, *to_2tuple(model.visual.image_size)
            text = pairs, self.config.data.captions_per_image, tokens
            batch = {
                "image": torch.empty(image, dtype=torch.uint8),
                "text": torch.zeros(text, dtype=torch.int64),
            }
            passes.append((self._counted(partial(self._features, batch)), sum(frozen.values())))
        for hook in hooks:
            hook.remove()
        return passes

    def _features(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Returns the features of texts and images, in the trainer's order."""
        features = [each(self._state, batch) for each in (steps.encode_text, steps.encode_image)]
        self._like = [each.new_empty(0, each.shape[1]) for each in features]
        return features

    def _loss(self, pairs: int) -> tuple[Pass, int]:
        """Returns the pass of a loss over features that are given, and their bytes.

        Its multiply-adds grow as the square of the pairs, its bytes as the pairs.
        """
        counted, features = self._counted_loss
        share = pairs / OF_LOSS
        works = [
            work._replace(flops=work.flops * share**2, bytes=work.bytes * share)
            for work in counted.works
        ]
        kept = round(counted.kept * share)
        # backward has a chunk of a matrix of similarities
        captions = self.config.data.captions_per_image
        chunk = min(SCRATCH_BYTES_ELSEWHERE, 2 * pairs * pairs * captions)
        return Pass(kept, max(round(counted.peak * share), kept + chunk), works), pairs * features

    @functools.cached_property
    def _counted_loss(self) -> tuple[Pass, int]:
        """The pass of a loss over the features of OF_LOSS pairs, and the bytes of one pair's."""
        captions = self.config.data.captions_per_image
        batch: dict[str, Tensor] = {"group": torch.arange(OF_LOSS)}
        if self._state.teacher:
            width = self._state.teacher["width"]
            batch["teacher_image"] = torch.empty(OF_LOSS, width, dtype=torch.float16)
            batch["teacher_text"] = torch.empty(OF_LOSS, captions, width, dtype=torch.float16)
        with self._meter:
            text, image = (
                like.new_empty(rows, like.shape[1]).requires_grad_()
                for like, rows in zip(self._like, (OF_LOSS * captions, OF_LOSS))
            )
        counted = self._counted(lambda: steps.compute_losses(self._state, [batch], image, text))
        return counted, (image.nbytes + text.nbytes) // OF_LOSS

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
def planned(
    config: Config, precision: str, device: str = "cuda", teacher_width: int | None = None
) -> Iterator[Step]:
    """Context of the step of a config on a device that need not be there; yields it.

    precision: "fp32", "bf16" or "fp16". device: "cuda" or "cpu". teacher_width: D̂; None: as the
    shards say or, where they are not on this machine, the student's width. Towers are not compiled.
    """
    # memory does not depend on steps, and the data to count may be elsewhere
    count = config.run.steps or 1 << 30
    config = config.replaced(run={"compile": False, "steps": count, "epochs": None})
    with torch.device("meta"):  # folding frozen parts makes new modules
        shapes = setup.shapes_of(config)
        prepared = setup.prepare_model(*shapes, [], config, torch.device(device))
    teacher: Any = None
    if config.loss.needs_teacher:
        width = teacher_width or setup.width_of(config)
        teacher = {"name": "a teacher", "width": width, "logit_scale": 100.0}
        if teacher_width is None:
            with contextlib.suppress(UserError, OSError):
                teacher = data.teacher_stamp(config.data.sidecars)
    with fake_device([prepared.model, *prepared.folded.values()], device) as meter:
        for block in prepared.model.modules():
            if isinstance(block, SimplifiedBlock) and block.recompute:
                block.recompute = False
                vars(block)["forward"] = partial(meter.checkpoint, block.forward)
        yield Step(config, prepared, meter, precision, teacher)


def busiest_step(config: Config) -> int:
    """Returns the first of a run's steps, from 0, with the most active loss terms of a hundred."""
    count = config.run.steps
    assert count is not None  # epochs are steps by now
    numbers = [count * share // 100 for share in range(100)]
    weights = config.loss.weights.values()
    return max(numbers, key=lambda number: sum(each.at(number, count) > 0 for each in weights))
