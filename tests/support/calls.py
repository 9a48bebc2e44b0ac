"""The ops' calls compared with plain torch, and a small call of each op and loss."""

from __future__ import annotations

from collections.abc import Callable

import plain
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import simplclip
from simplclip import losses, ops
from simplclip.nn import SimplifiedBlock
from simplclip.selftest.calls import ATTENTION, TERMS, Call, attention_call
from simplclip.selftest.compare import Case, forced, function_of, run


def _plain_similarity(image, text, logit_scale, **named):
    """Computes plain torch's similarity loss with all numbers in the dtype of the features."""
    named.pop("scratch_bytes", None), named.pop("store_bytes", None)
    if named.get("ids") is not None and named.get("text_ids") is None:
        named["text_ids"] = named["ids"]
    tensors = {"image": image, "text": text, "logit_scale": logit_scale, **named}
    return plain.similarity_loss(
        **tree_map_only(Tensor, lambda t: t.to(image.dtype) if t.is_floating_point() else t, tensors)
    )


PLAIN: dict[str, Callable] = {
    "similarity_loss": _plain_similarity,
    "shaped_attention": plain.shaped_attention,
    "parallel_mlp": plain.parallel_mlp,
    "simplified_block": lambda *, recompute=False, **named: plain.simplified_block(**named),
    "feature_loss": plain.feature_loss,
}


class OfPlain(Case):
    """A case whose expected results come from plain torch instead of the library."""

    definition = staticmethod(lambda call: PLAIN[call.op])
    slack = 1  # the op rounds no more often than plain torch


def check_case(case: Case, *, roundings: bool = False, twice: bool = False) -> None:
    """Checks that results and gradients are within tolerance of float64's: plain torch's own error or, with `roundings`, the
    effect of rounding the inputs. With `twice`, a second run must give the same bits."""
    found = case.run()
    again = case.run() if twice else found
    for name, value in found.items():
        assert value.isfinite().all(), f"{name} is not finite"
        assert torch.equal(value, again[name]), f"{name}: a second run gave other values"
    for name, deviation in case.deviations(found, roundings=roundings):
        assert deviation.units <= 1, f"{case.call.options} {name}: {deviation}"


def check(call: Call, dtype: torch.dtype, backend: str, *, roundings: bool = False, twice: bool = False, **of_case) -> None:
    check_case(OfPlain(call, dtype, backend, call.needed(), **of_case), roundings=roundings, twice=twice)


def check_padding(dtype: torch.dtype, backend: str, causal: bool, device: str = "cpu") -> None:
    """Checks that padded tokens of shaped_attention are not read, and that their results and gradients are 0."""
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
def _random(shapes, dtype):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _features(n, dtype):
    """Returns image, text, logit_scale, the teacher's image, text, scale. The student's tensors require gradients."""
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
# name -> tensors, the module, and how many of the tensors the module takes.
MODULES = {
    "SimplifiedBlock": (lambda n, dtype: _random([(n, 5, 16)], dtype), lambda: SimplifiedBlock(16, 2), 1),
    "ClipPMLoss": (_features, losses.ClipPMLoss, 3),
    "WIKDLoss": (_features, lambda: losses.WIKDLoss(interactive_weight=1, feature_weight=1, pm_weight=1), 6),
}


def module_call(name, dtype=torch.float32, device="cpu"):
    """Returns tensors, a function of them, and its module: a block in `dtype`, a loss in float32."""
    tensors, make, count = MODULES[name]
    module = make().to(device, dtype if name == "SimplifiedBlock" else None)

    def function(*args):
        out = module(*args[:count])
        return sum(out) if isinstance(out, tuple) else out if out.dim() == 0 else _number(out)

    return tensors, function, module


class Dispatched(TorchDispatchMode):
    """A mode that records the calls of simplclip's ops, with copies of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "simplclip":
            self.calls.append((function, [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in args]))
        return function(*args, **(kwargs or {}))


def check_registration(name: str, backend: str, device: str = "cpu") -> None:
    """Checks schemas, autograd, and the shapes, dtypes and strides that fake functions promise, of forward and backward.

    Backward runs on the backend that comes first, except after "sdpa", whose forward keeps tensors in a layout of its own.
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
