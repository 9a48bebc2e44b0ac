"""A training step on fake tensors: what it keeps and what it does, from one forward pass of the
trainer's own functions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from simplclip import data, models
from simplclip.common.errors import UserError
from simplclip.models.inherit import frozen_modules, inherit
from simplclip.models.lora import add_lora
from simplclip.models.packaged import STATES
from simplclip.models.trained import model_options
from simplclip.nn import SimplifiedBlock
from simplclip.ops.similarity.chunks import SCRATCH_BYTES_ELSEWHERE
from simplclip.plan.meter import Meter, Work, fake_device
from simplclip.train import setup
from simplclip.train import step as steps
from simplclip.train.config import Config, corners_of
from simplclip.train.rates import freeze_zeros

CPU = torch.device("cpu")


class Pass(NamedTuple):
    """A forward pass. Sizes are bytes beside those of the state of the training."""

    kept: int  # when it ends, for backward
    peak: int  # while it or the beginning of its backward runs
    works: list[Work]

    def towards(self, other: Pass, share: float) -> Pass:
        """Returns the pass on the line through this one (share 0) and that of another size (1)."""

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        works = [
            a._replace(flops=between(a.flops, b.flops), bytes=between(a.bytes, b.bytes))
            for a, b in zip(self.works, other.works, strict=True)
        ]
        kept, peak = (round(between(*sizes)) for sizes in zip(self[:2], other[:2]))
        return Pass(kept, peak, works)


class Step:
    """The step of a config on a device, in the context `planned`.

    state: bytes of weights, averages and the optimizer's moments. update: bytes while the optimizer
    runs, with all gradients; text_gradients: of these those of what is no image tower. updating:
    the optimizer's work. crops: whether texts are computed at their length. frozen_bytes: what
    gradient caching may keep of a pair, after an `encode`: the output of towers' frozen beginnings.
    """

    def __init__(
        self,
        config: Config,
        prepared: setup.PreparedModel,
        meter: Meter,
        precision: str,
        teacher: Mapping[str, Any] | None,
    ) -> None:
        """Makes the state of the training, and counts it and an update."""
        self.config, self._meter = config, meter
        self.model: Any = prepared.model
        self.crops = prepared.crop is not None and config.data.mean_tokens is not None
        self._frozen: list[tuple[str, nn.Module]] = []
        if config.run.keep_frozen:
            found = frozen_modules(self.model)
            self._frozen = [each for each in found if not isinstance(each[1], nn.Embedding)]
        self.frozen_bytes = 0.0
        modules = [prepared.model, *prepared.folded.values()]
        weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        with meter:
            meter.hold(weights)
            device = torch.device(meter.device, 0) if meter.device == "cuda" else CPU
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
            self.update, self.updating = meter.peak, meter.works
            optimizer.zero_grad(set_to_none=True)
        self.state = meter.live
        visual = {id(parameter) for parameter in prepared.model.visual.parameters()}
        self.text_gradients = sum(p.nbytes for p in trained if id(p) not in visual)

    def encode(self, pairs: int, *, cropped: bool = False) -> Pass:
        """Returns the pass of both towers.

        cropped: texts have their mean length. Rounding and groups of lengths add less than an
        eighth and 8 tokens for captions like COCO's and CC12M's.
        """
        tokens = self._context_length
        mean = self.config.data.mean_tokens
        if cropped and self.crops and mean is not None:
            tokens = min(tokens, math.ceil(mean * 9 / 8 + 8))
        outputs: dict[bool, int] = {}  # bytes of the end of a tower's frozen beginning

        def keep(in_text: bool, module: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and not output.requires_grad:
                outputs[in_text] = output.nbytes

        hooks = [
            module.register_forward_hook(partial(keep, not name.startswith("visual")))
            for name, module in self._frozen
        ]
        batch = self._inputs(pairs, tokens)
        result = self._measured(lambda: self._encode(batch))
        for hook in hooks:
            hook.remove()
        self.frozen_bytes = sum(outputs.values()) / pairs
        return result

    def loss(self, pairs: int) -> tuple[Pass, int]:
        """Returns the pass of a loss over given features, after an `encode`, and their bytes."""
        captions = self.config.data.captions_per_image
        batch: dict[str, Tensor] = {"group": torch.arange(pairs)}
        if self._state.teacher:
            width = self._state.teacher["width"]
            rows = (pairs, captions) if captions > 1 else (pairs,)
            batch["teacher_image"] = torch.empty(pairs, width, dtype=torch.float16)
            batch["teacher_text"] = torch.empty(*rows, width, dtype=torch.float16)
        with self._meter:
            text, image = (
                like.new_empty(rows, like.shape[1]).requires_grad_()
                for like, rows in zip(self._features, (pairs * captions, pairs))
            )
        result = self._measured(
            lambda: steps.compute_losses(self._state, [batch], image, text)
        )
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

    @property
    def _context_length(self) -> int:
        model = self.model
        return (model if hasattr(model, "context_length") else model.text).context_length

    def _encode(self, batch: dict[Any, Any]) -> list[Tensor]:
        """Returns the features of a batch by the trainer's functions, in its order."""
        features = [steps.encode_text(self._state, batch), steps.encode_image(self._state, batch)]
        self._features = [t.new_empty(0, t.shape[1]) for t in features]
        return features

    def _inputs(self, pairs: int, tokens: int) -> dict[Any, Any]:
        """Returns images and texts as the loader gives them, whose values do not matter."""
        captions = self.config.data.captions_per_image
        texts = (pairs, captions, tokens) if captions > 1 else (pairs, tokens)
        side = to_2tuple(self.model.visual.image_size)
        image = torch.empty(pairs, 3, *side, dtype=torch.uint8)
        return {"image": image, "text": torch.zeros(texts, dtype=torch.int64)}


@contextlib.contextmanager
def planned(
    config: Config, precision: str, device: str = "cuda", teacher_width: int | None = None
) -> Iterator[Step]:
    """Context of the step of a config on a device that need not be there; yields it.

    precision: "fp32", "bf16" or "fp16". device: "cuda" or "cpu". teacher_width: D̂; None: as the
    shards say or, where they are not on this machine, the student's width. Only the shapes of
    weights and features matter. Towers are not compiled.
    """
    # memory does not depend on steps, and the data to count may be elsewhere
    steps = config.run.steps or 1 << 30
    config = config.replaced(run={"compile": False, "steps": steps, "epochs": None})
    with torch.device("meta"):  # folding frozen parts makes new modules
        model, frozen = shapes_of(config)
        where = torch.device(device)
        prepared = setup.prepare_model(model, frozen, [], config, precision, where)
    teacher = _teacher(config, teacher_width) if config.loss.needs_teacher else None
    with fake_device([prepared.model, *prepared.folded.values()], device) as meter:
        for block in prepared.model.modules():
            if isinstance(block, SimplifiedBlock) and block.recompute:
                block.recompute = False
                block.forward = partial(meter.checkpoint, block.forward)
        yield Step(config, prepared, meter, precision, teacher)


def _teacher(config: Config, width: int | None) -> dict[str, Any]:
    """Returns what the loss needs to know of a teacher; `width` comes before the stamp's."""
    if width is None:
        try:
            return dict(data.teacher_stamp(config.data.sidecars))
        except (UserError, OSError):
            width = setup.width_of(config)
    return {"name": "a teacher", "width": width, "logit_scale": 100.0}


def shapes_of(config: Config) -> tuple[nn.Module, list[str]]:
    """Returns a run's model on the meta device, and the names of its frozen modules and parameters.

    Nothing is downloaded: where a file of inherit.source is missing, the tensors of the original
    model stand for it.
    """
    name, source = config.model.name, config.inherit.source
    lora = config.model.model_dump()["lora"]
    model = models.create(
        name, device="meta", **model_options(config.model.model_dump(), config.loss.base)
    )
    frozen = list[str]()
    if source is not None:
        sources: list[Any] = [source] if isinstance(source, str) else list(source)
        for index, file in enumerate(sources):
            if file not in STATES and not Path(file).exists():
                sources[index] = models.create(name, device="meta", simplified=False)
        settings = config.inherit
        frozen = inherit(model, sources, train=settings.train, blocks=settings.blocks).names
    frozen, _ = add_lora(model, lora, frozen, config.inherit.train)
    return model, frozen + freeze_zeros(model, config)


def busiest_step(config: Config) -> int:
    """Returns the first step of a run, from 0, with the largest number of active loss terms."""
    schedules, steps = config.loss.weights, config.run.steps
    assert steps is not None  # epochs are steps by now
    corners = corners_of(schedules.values(), steps)
    numbers = sorted({at for corner in corners for at in (corner, corner + 1) if at < steps})
    return max(numbers, key=lambda at: sum(each.at(at, steps) > 0 for each in schedules.values()))
