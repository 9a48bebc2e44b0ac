"""A training step on fake tensors: what it keeps and does, from a forward pass of the trainer's own
functions at two sizes, between which all is a line.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from simplclip import data, gradient_cache
from simplclip.common.errors import InputError, UserError
from simplclip.models.inherit import largest_modules
from simplclip.nn import SimplifiedBlock
from simplclip.ops.similarity.chunks import SCRATCH_BYTES_ELSEWHERE
from simplclip.plan.meter import Meter, Work, fake_device
from simplclip.train import setup
from simplclip.train import step as steps
from simplclip.train.config import Config, corners_of

FEW, MANY = 128, 512  # pairs of the two passes


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
        # texts are computed at their length
        self._crops = prepared.crop is not None and config.data.mean_tokens is not None
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
        encoded, frozen_bytes = self._encode(micro or pairs, cropped=micro is None and self._crops)
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

    def _encode(self, pairs: int, cropped: bool) -> tuple[Pass, float]:
        """Returns the pass of both towers, and the bytes of a pair after frozen beginnings."""
        few, many = self._passes(cropped)
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
    def _passes(self, cropped: bool) -> list[tuple[Pass, int]]:
        """Returns the passes of both towers, and bytes of frozen outputs, at FEW and MANY pairs.

        Texts have all tokens or, if `cropped`, as many as on average; rounding and groups of
        lengths add less than an eighth and 8 tokens for captions like COCO's and CC12M's.
        """
        data = self.config.data
        model: Any = self.model
        tokens = (model if hasattr(model, "context_length") else model.text).context_length
        if cropped and data.mean_tokens is not None:
            tokens = min(tokens, math.ceil(data.mean_tokens * 9 / 8 + 8))
        frozen: dict[bool, int] = {}  # bytes of the end of a tower's frozen beginning

        def note(in_image: bool, module: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and not output.requires_grad:
                frozen[in_image] = output.nbytes

        hooks = [
            module.register_forward_hook(partial(note, name.startswith("visual")))
            for name, module in largest_modules(model).items()
            if self.config.run.keep_frozen and not isinstance(module, nn.Embedding)
        ]
        passes = []
        for pairs in (FEW, MANY):
            side = to_2tuple(model.visual.image_size)
            images = {"image": torch.empty(pairs, 3, *side, dtype=torch.uint8)}
            texts = {"text": torch.zeros(pairs, data.captions_per_image, tokens, dtype=torch.int64)}

            encode = partial(self._features, images, texts)
            passes.append((self._measured(encode), sum(frozen.values())))
        for hook in hooks:
            hook.remove()
        return passes

    def _features(self, images: dict[str, Tensor], texts: dict[str, Tensor]) -> list[Tensor]:
        """Returns the features of texts and images, in the trainer's order."""
        features = [
            steps.encode_text(self._state, texts),
            steps.encode_image(self._state, images),
        ]
        self._like = [each.new_empty(0, each.shape[1]) for each in features]
        return features

    @functools.cache  # noqa: B019
    def _loss(self, pairs: int) -> tuple[Pass, int]:
        """Returns the pass of a loss over features that are given, and their bytes."""
        captions = self.config.data.captions_per_image
        batch: dict[str, Tensor] = {"group": torch.arange(pairs)}
        if self._state.teacher:
            width = self._state.teacher["width"]
            batch["teacher_image"] = torch.empty(pairs, width, dtype=torch.float16)
            batch["teacher_text"] = torch.empty(pairs, captions, width, dtype=torch.float16)
        with self._meter:
            text, image = (
                like.new_empty(rows, like.shape[1]).requires_grad_()
                for like, rows in zip(self._like, (pairs * captions, pairs))
            )
        result = self._measured(lambda: steps.compute_losses(self._state, [batch], image, text))
        # backward has a chunk of a matrix of similarities
        chunk = min(SCRATCH_BYTES_ELSEWHERE, 2 * pairs * pairs * captions)
        result = result._replace(peak=max(result.peak, result.kept + chunk))
        return result, image.nbytes + text.nbytes

    def _measured(self, run: Callable[[], Any]) -> Pass:
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
    teacher = _teacher(config, teacher_width) if config.loss.needs_teacher else None
    with fake_device([prepared.model, *prepared.folded.values()], device) as meter:
        for block in prepared.model.modules():
            if isinstance(block, SimplifiedBlock) and block.recompute:
                block.recompute = False
                vars(block)["forward"] = partial(meter.checkpoint, block.forward)
        yield Step(config, prepared, meter, precision, teacher)


def _teacher(config: Config, width: int | None) -> Mapping[str, Any]:
    """Returns what the loss needs to know of a teacher; `width` comes before the stamp's."""
    if width is None:
        with contextlib.suppress(UserError, OSError):
            return data.teacher_stamp(config.data.sidecars)
        width = setup.width_of(config)
    return {"name": "a teacher", "width": width, "logit_scale": 100.0}


def busiest_step(config: Config) -> int:
    """Returns the first step of a run, from 0, with the largest number of active loss terms."""
    weights, count = config.loss.weights.values(), config.run.steps
    assert count is not None  # epochs are steps by now
    corners = corners_of(weights, count)
    # a weight may begin at 0
    numbers = sorted(n for n in {*corners, *(n + 1 for n in corners)} if n < count)
    return max(numbers, key=lambda number: sum(each.at(number, count) > 0 for each in weights))
