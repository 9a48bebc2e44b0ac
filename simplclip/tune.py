"""Chooses among the forms of each op by measuring them on this machine; ops read the choices by simplclip.common.tuned.

A candidate is measured through the op, while in force. It is chosen if its results are the default's up to TOLERANCE, and if
it is faster by more than the noise: by MARGIN in the median, slower in one repeat at most, and at no size slower by MARGIN.
"""

from __future__ import annotations

import datetime
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simplclip import ops
from simplclip.common import hardware, machine
from simplclip.common.tuned import SECTION, name_of, trial
from simplclip.ops import backends
from simplclip.ops.mlp.op import HIDDEN, HIDDEN_BYTES
from simplclip.ops.similarity import chunks

if TYPE_CHECKING:  # it needs the extra "train"
    from simplclip.train.settings import Config

MARGIN = 0.03
REPEATS = 7
SAMPLE_SECONDS = 0.02  # about the time of a sample, which has as many calls as fit, but at least one
# The largest difference from the default's results, relative to their largest value: 4 times EPS of selftest.compare for
# float32, and 10 and 5 times EPS for float16 and bfloat16, since both results are rounded.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Attention = tuple[int, int, int, int, bool]  # B, L, H, K, causal
Mlp = tuple[int, int, int]  # tokens, C, F
Run = Callable[[], tuple[Tensor, ...]]  # runs a call and its backward, and returns results and gradients
Times = dict[Any, list[list[float]]]  # candidate -> of each call, the seconds of each repeat


@dataclass(frozen=True)
class Sizes:
    """Sizes of the calls that are measured."""

    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    batches: tuple[int, ...]  # N of the loss
    width: int  # D
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def standard(device: str) -> Sizes:
    """Returns the sizes of ViT-B-32's image and text towers, of ViT-B-16's image tower, and of two batches."""
    batch, sizes = (256, (4096, 32768)) if device == "cuda" else (16, (1024, 4096))
    attentions = (batch, 50, 12, 64, False), (batch, 77, 8, 64, True), (batch // 2, 197, 12, 64, False)
    return Sizes(attentions, ((batch * 77, 512, 2048),), sizes, 512)


def sizes_of(config: Config, device: str) -> Sizes:
    """Returns the sizes of a run, from its model's simplified blocks, its batch size and its precision."""
    from simplclip.memory.step import inputs
    from simplclip.nn import SimplifiedBlock
    from simplclip.train.state import build_model

    most, found = standard(device), dict[tuple[int, int, int, bool], tuple[int, int]]()
    data = config.data
    batch = min(data.batch_size if data.micro_batch == "auto" else data.images_at_a_time, most.attentions[0][0])
    pairs = min(data.batch_size * data.captions_per_image, most.batches[-1])

    def see(block: Any, args: tuple[Tensor, ...]) -> None:
        shape = args[0].shape[1], block.heads, block.width // block.heads, block.causal
        found[shape] = block.width, block.hidden

    model = build_model(config).eval()
    for block in model.modules():
        if isinstance(block, SimplifiedBlock):
            block.register_forward_pre_hook(see)
    image, text = inputs(config.model.name, model, 1, 1, True)
    with torch.no_grad():
        model.encode_text(text)
        width = model.encode_image(image).shape[1]
    precision, _ = hardware.pick_precision(config.run.precision, torch.device(device))
    mlps = dict.fromkeys((batch * length, *widths) for (length, *_), widths in found.items())
    dtype = hardware.DTYPES[precision] or torch.float32
    return Sizes(tuple((batch, *shape) for shape in found), tuple(mlps), (pairs,), width, (dtype,))


@dataclass
class Choice:
    """A choice that ops read by `name`: one of the candidates, of which the first is the default."""

    name: str
    candidates: list[Any]
    calls: list[tuple[str, Run]]  # to measure, each with a text of its size


def of_sizes(sizes: Sizes, device: str) -> Iterator[Choice]:
    """Yields the choices in the order in which they are made. Later choices are measured with earlier choices in force."""
    for dtype in sizes.dtypes:
        classes: dict[str, list[Attention]] = {}
        for shape in sizes.attentions:
            classes.setdefault(backends.choice_of("shaped_attention_fwd", dtype, shape[1]), []).append(shape)
        for name, shapes in classes.items():
            facts = {"length": shapes[0][1], "width": shapes[0][3]}
            names = [n for n in usable("shaped_attention", device, dtype, **facts) if n != "reference"]  # which keeps [L, L]
            calls = [(f"L={shape[1]}", attention(shape, dtype, device)) for shape in shapes]
            yield Choice(name, names, calls)
        whole, alone = (
            [(f"T={t} C={c} F={f}", mlp((t, c, f), dtype, device, backward)) for t, c, f in sizes.mlps]
            for backward in (True, False)
        )
        yield Choice(backends.choice_of("parallel_mlp_fwd", dtype), usable("parallel_mlp", device, dtype), whole)
        yield Choice(name_of(HIDDEN, dtype), around(HIDDEN_BYTES, 4), alone)
        losses = [(f"N={n}", loss(n, sizes.width, dtype, device)) for n in sizes.batches]
        if device == "cuda":
            from simplclip.kernels.mlp import op as kernels

            yield Choice(name_of(kernels.SCRATCH, dtype), around(kernels.SCRATCH_BYTES, 4), whole)
            yield from tiles(dtype, losses)
        defaults = chunks.default_budgets(device)
        yield Choice(name_of(chunks.SCRATCH, dtype), around(defaults[chunks.SCRATCH], 4), losses)
        store = defaults[chunks.STORE]
        yield Choice(name_of(chunks.STORE, dtype), [store, 0, 4 * store], losses)


def usable(op: str, device: str, dtype: torch.dtype, **facts: Any) -> list[str]:
    """Returns the backends that run both the op and its backward, in order of predicted speed."""
    both = f"{op}_fwd", f"{op}_bwd"
    return [n for n in backends.NAMES if all(backends.why_not(each, n, device, dtype, **facts) is None for each in both)]


def around(size: int, factor: int) -> list[int]:
    return [size, size // factor, size * factor]


def tiles(dtype: torch.dtype, losses: list[tuple[str, Run]]) -> Iterator[Choice]:
    from simplclip.kernels import launch, tuning

    precision = launch.precision_of(dtype)
    architecture = launch.architecture_and_processors(torch.empty(0, device="cuda"))[0]
    for op in tuning.TUNED:
        found = tuning.candidates(op, 1, precision, architecture)
        yield Choice(tuning.choice_of(op, 1, precision, architecture), list(found), losses)


class _Values:
    """A source of random tensors, the same tensors in each process."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device, self._generator = dtype, device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=self._generator)).to(self.device, self.dtype).requires_grad_()


def _results(leaves: list[Tensor], call: Callable[[], Tensor], grad: Tensor | None = None) -> Run:
    def run() -> tuple[Tensor, ...]:
        out = call()
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return run


def attention(shape: Attention, dtype: torch.dtype, device: str) -> Run:
    *size, causal = shape
    values = _Values(dtype, device)
    q, k, v, grad = (values(*size) for _ in range(4))
    alpha, beta, gamma = gains = [values(size[2]) for _ in range(3)]
    return _results(
        [q, k, v, *gains], lambda: ops.shaped_attention(q, k, v, alpha, beta, gamma, causal=causal), grad.detach()
    )


def mlp(shape: Mlp, dtype: torch.dtype, device: str, backward: bool) -> Run:
    tokens, c, f = shape
    values = _Values(dtype, device)
    x, first, bias = values(tokens, c), values(f, c, std=c**-0.5), values(f)
    second, grad = values(c, f, std=f**-0.5), values(tokens, c).detach()

    def call() -> Tensor:
        return ops.parallel_mlp(x, first, bias, second, None)

    return _results([x, first, bias, second], call, grad) if backward else lambda: (torch.no_grad()(call)(),)


def loss(n: int, width: int, dtype: torch.dtype, device: str) -> Run:
    values = _Values(dtype, device)
    image, text = (values(n, width, std=width**-0.5) for _ in range(2))
    return _results([image, text], lambda: ops.similarity_loss(image, text, 20.0)["contrastive"])


def _seconds(run: Run, count: int, device: str) -> float:
    """Returns the mean seconds of a call in a sample of `count` calls."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def _wrong(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> str:
    """Returns what is wrong with a candidate's results, or an empty string."""
    for of_call, wanted in zip(found, expected):
        for got, want in zip(of_call, wanted):
            error = (got.float() - want.float()).abs().max().item() / (want.float().abs().max().item() + 1e-30)
            if not error <= max(TOLERANCE[want.dtype], TOLERANCE[wanted[0].dtype]):
                return f"differs from the default by {error:.1e}"
    return ""


def decide(choice: Choice, device: str, made: dict[str, Any], repeats: int = REPEATS) -> dict[str, Any]:
    """Measures a choice. Returns the default, the chosen candidate, and each candidate's milliseconds or why it is left out.

    made: the earlier choices, which are in force.
    """
    default, left_out, expected = choice.candidates[0], dict[str, str](), list[tuple[Tensor, ...]]()
    admitted = []
    for candidate in choice.candidates:
        try:
            with trial(device, {**made, choice.name: candidate}):
                found = [run() for _, run in choice.calls]
            expected = expected or found
            reason = _wrong(found, expected)
        except Exception as error:
            if candidate == default:
                raise
            reason = str(error).splitlines()[0]
        if reason:
            left_out[str(candidate)] = reason
        else:
            admitted.append(candidate)
    del expected, found
    times = _times(choice, admitted, device, made, repeats)
    ms = {str(candidate): round(1e3 * sum(map(statistics.median, of_calls)), 3) for candidate, of_calls in times.items()}
    row = {"choice": choice.name, "calls": ", ".join(what for what, _ in choice.calls)}
    return row | {"default": default, "chosen": fastest(times, default), "candidates": ms | left_out}


def _times(choice: Choice, admitted: list[Any], device: str, made: dict[str, Any], repeats: int) -> Times:
    """Measures the candidates in turns, so that a drift of the machine affects all alike.

    The default is measured first and last in each turn, and the shorter of these two times counts.
    """
    times: Times = {candidate: [[] for _ in choice.calls] for candidate in admitted}
    for place, (_, run) in enumerate(choice.calls):
        count = max(1, int(SAMPLE_SECONDS / _seconds(run, 1, device)))
        for _ in range(repeats):
            turn = []
            for candidate in (*admitted, admitted[0]):
                with trial(device, {**made, choice.name: candidate}):
                    turn.append(_seconds(run, count, device))
            turn[0] = min(turn[0], turn.pop())
            for candidate, seconds in zip(admitted, turn):
                times[candidate][place].append(seconds)
    return times


def fastest(times: Times, default: Any) -> Any:
    """Returns the candidate with the lowest median ratio of its time to the default's, or the default if none beats noise."""
    best, least = default, 1 - MARGIN
    for candidate, of_calls in times.items():
        each = [statistics.median(map(operator.truediv, mine, its)) for mine, its in zip(of_calls, times[default])]
        turns = sorted(sum(mine) / sum(its) for mine, its in zip(zip(*of_calls), zip(*times[default])))
        slower = candidate == default or max(each) > 1 + MARGIN or turns[-2] > 1
        if not slower and statistics.median(turns) < least:
            best, least = candidate, statistics.median(turns)
    return best


def tune(device: str, sizes: Sizes, report: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measures all choices, stores them for this process and later ones, and returns them. report: gets each name."""
    made: dict[str, Any] = {}
    rows = []
    with trial(device, made):
        for choice in of_sizes(sizes, device):
            if len(choice.candidates) > 1 and choice.calls:
                report(choice.name)
                rows.append(decide(choice, device, made))
                if rows[-1]["chosen"] != rows[-1]["default"]:
                    made[choice.name] = rows[-1]["chosen"]
    found = {"date": datetime.date.today().isoformat(), "choices": made, "measured": rows}
    store(device, found)
    return found


def store(device: str, found: dict[str, Any]) -> None:
    """Stores findings; empty findings remove stored ones. Resets torch.compile, whose graphs expect the former backends."""
    machine.store(SECTION, device, found)
    torch.compiler.reset()
