"""Calls of the public ops as data: tensors by name, in any dtype and layout; and their comparison with plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import plain
import torch
import torch.nn.functional as F
from similarity import make_inputs
from tolerance import assert_within
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import simplclip
from simplclip import losses, ops
from simplclip.nn import SimplifiedBlock


@dataclass
class Call:
    op: str
    tensors: dict[str, Tensor]  # float64, and int64 ids, lengths
    options: dict[str, object] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the tensors that have another than the call's

    def needed(self) -> list[str]:
        """Tensors that have a gradient."""
        return [name for name, t in self.tensors.items() if t.is_floating_point() and not name.startswith("teacher")]

    def typed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        of = {name: wide if name in WIDE else dtype for name in self.tensors} | self.dtypes
        return {name: t.to(of[name]) if t.is_floating_point() else t for name, t in self.tensors.items()}


# Numbers and what acts on statistics: float32 beside half features.
WIDE = {"logit_scale", "logit_bias", "teacher_scale", "interactive_scale", "plane_weight", "plane_bias", "prior"}
WIDE |= {"alpha", "beta", "gamma", "norm_weight", "norm_bias", "attention_gain", "mlp_gain"}


def arguments(call: Call, tensors: dict[str, Tensor]) -> dict[str, object]:
    named = {**tensors, **call.options}
    if call.op == "similarity_loss" and "plane_bias" in named:
        named["plane"] = (named.pop("plane_weight"), named.pop("plane_bias"))
    if call.op == "parallel_mlp":
        named = {"fc1_bias": None, "fc2_bias": None, **named}
    return named


def _plain_similarity(image, text, logit_scale, **named):
    named.pop("scratch_bytes", None), named.pop("store_bytes", None)
    if named.get("ids") is not None and named.get("text_ids") is None:
        named["text_ids"] = named["ids"]
    return plain.similarity_loss(image, text, logit_scale, **named)


PLAIN: dict[str, Callable] = {
    "similarity_loss": _plain_similarity,
    "shaped_attention": plain.shaped_attention,
    "parallel_mlp": plain.parallel_mlp,
    "simplified_block": lambda *, recompute=False, **named: plain.simplified_block(**named),
    "feature_loss": plain.feature_loss,
}


def outputs_of(function: Callable, call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = function(**arguments(call, tensors))
    return out if isinstance(out, dict) else {"out": out}


def run(
    function: Callable,
    call: Call,
    tensors: dict[str, Tensor],
    need: Iterable[str],
    incoming: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Results and the gradients of `need`, d_NAME; `incoming(name, result)`: the gradient that comes to a result."""
    need = list(need)
    leaves = {name: t.detach().requires_grad_(name in need) for name, t in tensors.items()}
    outputs = outputs_of(function, call, leaves)
    found = {name: t.detach() for name, t in outputs.items()}
    if need:
        come = [incoming(name, t) for name, t in outputs.items()]
        differentiable = [(t, g) for t, g in zip(outputs.values(), come) if t.requires_grad]
        grads = [None] * len(need)
        if differentiable:
            results, come = zip(*differentiable)
            grads = torch.autograd.grad(results, [leaves[name] for name in need], come, allow_unused=True)
        for name, grad in zip(need, grads):
            found[f"d_{name}"] = torch.zeros_like(tensors[name]) if grad is None else grad
    return found


def forced(backend: str) -> contextlib.AbstractContextManager:
    """A backend, or with "" the one that comes first."""
    return simplclip.backend(backend) if backend else contextlib.nullcontext()


def function_of(call: Call) -> Callable:
    return getattr(ops, call.op)


LOSS_SCALE = 64  # of the gradients that come to a loss, as a GradScaler's, so that halves hold what goes out


def _least(call: Call, gradient: bool) -> float:
    """Below it a result is 0 by cancellation: some hundredths of what is subtracted, logits, or for gradients scale / N."""
    if call.op == "feature_loss":
        return 1e-2
    if call.op != "similarity_loss":
        return 0.3 if call.op == "simplified_block" else 0.1  # the former's are sums over tokens and widths
    given = {**call.tensors, **call.options}
    scale = max(abs(float(given.get(name, 1))) for name in ("logit_scale", "interactive_scale", "teacher_scale"))
    return max(scale, 1) * (0.05 * LOSS_SCALE / given["image"].shape[0] if gradient else 0.01)


def check(
    call: Call,
    dtype: torch.dtype,
    backend: str,
    need: Iterable[str] | None = None,
    *,
    lay_out: Callable[[str, Tensor], Tensor] = lambda name, t: t,
    roundings: bool = False,
    twice: bool = False,
    seed: int = 0,
    size: float = LOSS_SCALE,
    device: str = "cpu",
) -> None:
    """Results and gradients are within tolerance of float64's: of plain torch's own error, or with `roundings` of what
    roundings may change; with `twice` a second run has the same bits.

    lay_out(name, t): a view that the op gets for t; a gradient's name is "grad NAME".
    size: of the gradients that come to losses.
    """
    need = call.needed() if need is None else need
    kernel = {name: lay_out(name, t.to(device)) for name, t in call.typed(dtype).items()}
    naive = {name: t.cpu().resolve_neg().clone(memory_format=torch.contiguous_format) for name, t in kernel.items()}
    truth = {name: t.double() if t.is_floating_point() else t for name, t in naive.items()}
    narrow = {name: t.to(dtype) if t.is_floating_point() else t for name, t in naive.items()}

    def incoming(name: str, result: Tensor) -> Tensor:
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))
        grad = grad.to(result.device, dtype) * (1 if result.dim() else size)
        return lay_out(f"grad {name}", grad).to(result.dtype)

    def rounding_changes(name: str) -> float:
        """What float64's result changes by when every number that comes in changes by at most a rounding in the dtype."""
        change = 0.0
        for number in range(4):
            g = torch.Generator().manual_seed(number)

            def nearly(t: Tensor) -> Tensor:
                sign = torch.randint(0, 2, t.shape, generator=g) * 2 - 1  # noqa: B023
                return t * (1 + sign * torch.finfo(dtype).eps / 2) if t.is_floating_point() else t

            close = {k: nearly(t) for k, t in truth.items()}
            other = run(PLAIN[call.op], call, close, need, lambda *args: nearly(incoming(*args)))  # noqa: B023
            change = max(change, (other[name] - exact[name]).abs().max().item())
        return change

    with forced(backend):
        found = {name: t.cpu() for name, t in run(function_of(call), call, kernel, need, incoming).items()}
        again = run(function_of(call), call, kernel, need, incoming) if twice else found
    exact = run(PLAIN[call.op], call, truth, need, incoming)
    plain = run(PLAIN[call.op], call, narrow if call.op == "similarity_loss" else naive, need, incoming)
    for name, value in found.items():
        assert value.isfinite().all(), f"{name} is not finite"
        assert torch.equal(value, again[name].cpu()), f"{name}: a second run gave other values"
    for name, value in found.items():
        try:
            least = _least(call, name.startswith("d_"))
            assert_within({name: value}, {name: plain[name]}, {name: exact[name]}, dtype, str(call.options), least)
        except AssertionError:
            error = (value.double() - exact[name]).abs().max().item()
            if not roundings or error > 8 * rounding_changes(name):
                raise


ATTENTION = ("q", "k", "v", "alpha", "beta", "gamma")
MLP = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def similarity_call(n: int, m: int, offset: int = 0, **options) -> Call:
    """`options`: of make_inputs and of similarity_loss."""
    made = ("terms", "plane", "teacher_width", "ids", "scale", "width", "seed")
    leaves, fixed = make_inputs(n, m, offset, **{name: options.pop(name) for name in made if name in options})
    tensors = leaves | {name: fixed.pop(name) for name in ("ids", "text_ids") if name in fixed}
    return Call("similarity_loss", tensors, fixed | options)


def attention_inputs(b=2, length=5, h=3, k=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k_, v = (torch.randn(b, length, h, k, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    gains = [torch.randn(h, generator=g, dtype=torch.float64) for _ in range(3)]
    return q, k_, v, *gains


def mlp_inputs(t=7, c=6, f=10, out=5, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, d=1.0: torch.randn(*shape, generator=g, dtype=torch.float64) * d  # noqa: E731
    tensors = [draw(t, c), 2 * draw(f, c, d=c**-0.5), draw(f), draw(out, f, d=f**-0.5), draw(out)]
    return tensors if bias else [tensors[0], tensors[1], None, tensors[3], None]


def attention_call(*shape: int, **options) -> Call:
    return Call("shaped_attention", dict(zip(ATTENTION, attention_inputs(*shape))), options)


def mlp_call(*shape: int, **options) -> Call:
    return Call("parallel_mlp", dict(zip(MLP, mlp_inputs(*shape))), options)


def block_inputs(b=2, length=5, c=12, heads=3, f=20, norm="layernorm", projections=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, d=1.0: torch.randn(*shape, generator=g, dtype=torch.float64) * d  # noqa: E731
    found = {"x": draw(b, length, c), "qk_weight": draw(2 * c, c, d=c**-0.5), "fc1_weight": draw(f, c, d=c**-0.5)}
    found |= {"fc1_bias": draw(f), "fc2_weight": draw(c, f, d=f**-0.5), "fc2_bias": draw(c)}
    found |= {name: draw(heads) for name in ("alpha", "beta", "gamma")}
    found |= {"norm_weight": 1 + draw(c, d=0.1), "attention_gain": draw(1)[0], "mlp_gain": draw(1)[0]}
    if norm == "layernorm":
        found["norm_bias"] = draw(c)
    if projections:
        found |= {name: draw(c, c, d=c**-0.5) for name in ("value_weight", "output_weight")}
    return found


def check_padding(dtype: torch.dtype, backend: str, causal: bool, device: str = "cpu") -> None:
    """Padded tokens of shaped_attention are not read, and their results and gradients are 0."""
    call = attention_call(3, causal=causal)
    call.tensors["lengths"] = torch.tensor([3, 0, 5])

    def padded_with(value: float) -> dict[str, Tensor]:
        def filled(t: Tensor) -> Tensor:
            t = t.clone()
            t[0, 3:], t[1] = value, value
            return t

        given = {name: filled(t) if name in "qkv" else t for name, t in call.typed(dtype).items()}
        given = {name: t.to(device) for name, t in given.items()}
        return run(function_of(call), call, given, call.needed(), lambda name, t: filled(torch.ones_like(t)))

    with simplclip.backend(backend):
        expected, found = padded_with(1.0), padded_with(torch.nan)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        if value.dim() == 4:
            assert not value[0, 3:].any(), name
            assert not value[1].any(), name


# A small call of each op and loss: its float tensors, and a function of them that returns a number.
TERMS = ("contrastive", "pair_matching", "relational", "interactive", "sigmoid")


def _random(shapes, dtype):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _features(n, dtype):
    """image, text, logit_scale, the teacher's image, text, scale: the student's and the scale require gradients."""
    rows = [F.normalize(torch.randn(n, 24, dtype=torch.float64), dim=1).to(dtype) for _ in range(4)]
    wide = torch.promote_types(dtype, torch.float32)
    scale, teacher_scale = torch.tensor(10.0, dtype=wide), torch.tensor(15.0, dtype=wide)
    return [*(t.requires_grad_() for t in (*rows[:2], scale)), *rows[2:], teacher_scale]


def similarity(**options):
    def function(image, text, scale, teacher_image, teacher_text, teacher_scale):
        ids = torch.arange(image.shape[0]) // 2
        call = {"terms": TERMS, "plane": (scale, -2.0), "ids": ids, **options}
        teacher = {"teacher_image": teacher_image, "teacher_text": teacher_text, "teacher_scale": teacher_scale}
        out = ops.similarity_loss(image, text, scale, **call, **teacher)
        return out["loss"] if "loss" in out else sum(out.values())

    return _features, function


def _hadamard(image, text, scale, *_):
    plane = (scale.expand(image.shape[1]), -2.0)
    return ops.similarity_loss(image, text, scale, terms=("pair_matching",), plane=plane)["pair_matching"]


def _projected(image, text, _, teacher, *rest):
    return ops.feature_loss(image, teacher, distance="smooth_l1", projection=text.T @ text)


def _number(out):
    return out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()


def _attention_tensors(n, dtype):
    return _random([(n, 5, 2, 8)] * 3 + [(2,)] * 3, dtype)


def _attention(q, k, v, *gains):
    return _number(ops.shaped_attention(q, k, v, *gains, causal=True))


def _attention_of_lengths(q, *rest):
    return _number(ops.shaped_attention(q, *rest, lengths=torch.full((q.shape[0],), 3, device=q.device)))


def _mlp(*args):
    return _number(ops.parallel_mlp(*args))


def _block(recompute=False):
    def function(x, weight, *rest):
        gains = dict(zip(ATTENTION[3:], rest[5:]))
        return _number(ops.simplified_block(x, *rest[:5], **gains, norm_weight=weight, recompute=recompute))

    def tensors(n, dtype):
        shapes = ((n, 5, 8), (8,), (16, 8), (12, 8), (12,), (8, 12), (8,), (2,), (2,), (2,))
        return _random(shapes, dtype)

    return tensors, function


SMALL = {
    "similarity_loss": similarity(),
    "similarity_loss kl": similarity(interactive="kl"),
    "similarity_loss sigmoid": similarity(
        terms=("sigmoid", "pair_matching"), positives="ids", weights={"sigmoid": 1.0, "pair_matching": 0.5}
    ),
    "similarity_loss positives": similarity(terms=("contrastive",), positives="ids", label_smoothing=0.1),
    "similarity_loss hadamard": (_features, _hadamard),
    "feature_loss": (_features, lambda image, text, scale, teacher, *_: ops.feature_loss(image, teacher)),
    "feature_loss projection": (_features, _projected),
    "shaped_attention": (_attention_tensors, _attention),
    "shaped_attention lengths": (_attention_tensors, _attention_of_lengths),
    "parallel_mlp": (lambda n, dtype: _random(((n, 8), (12, 8), (12,), (8, 12), (8,)), dtype), _mlp),
    "simplified_block": _block(),
    "simplified_block recompute": _block(recompute=True),
}
# Tensors, the module, and how many of the tensors it takes.
MODULES = {
    "SimplifiedBlock": (lambda n, dtype: _random([(n, 5, 16)], dtype), lambda: SimplifiedBlock(16, 2), 1),
    "ClipPMLoss": (_features, losses.ClipPMLoss, 3),
    "WIKDLoss": (_features, lambda: losses.WIKDLoss(interactive_weight=1, feature_weight=1, pm_weight=1), 6),
}


def module_call(name, dtype=torch.float32, device="cpu"):
    """Tensors, a function of them and its module: a block in `dtype`, a loss in float32."""
    tensors, make, count = MODULES[name]
    module = make().to(device, dtype if name == "SimplifiedBlock" else None)

    def function(*args):
        out = module(*args[:count])
        return sum(out) if isinstance(out, tuple) else out if out.dim() == 0 else _number(out)

    return tensors, function, module


class Dispatched(TorchDispatchMode):
    """Records the calls of simplclip's ops, with copies of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "simplclip":
            self.calls.append((function, [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in args]))
        return function(*args, **(kwargs or {}))


def check_registration(name: str, backend: str, device: str = "cpu") -> None:
    """Schemas, autograd, and the shapes, dtypes and strides that fake functions promise, of forward and backward.

    Backward by the backend that comes first, but for "sdpa": what forward kept is of its layout.
    """
    make, function = SMALL[name]
    with forced(backend if backend == "sdpa" else ""), Dispatched() as mode, torch.device(device):
        tensors = [t.detach().to(device).requires_grad_(t.requires_grad) for t in make(4, torch.float32)]
        function(*tensors).backward()
        with torch.no_grad():
            function(*tensors)
    for op, (*args, first) in mode.calls:
        forward = not op._opname.endswith("_bwd")
        for t in args:
            if isinstance(t, Tensor) and forward:
                t.requires_grad_(t.is_floating_point())
        # Not "test_aot_dispatch_dynamic": it compares h after backward, which has written over it. test_compile.py traces.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, (*args, backend if forward else first), test_utils=checks, rtol=1e-4, atol=1e-5)
