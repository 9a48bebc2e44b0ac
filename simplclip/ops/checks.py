"""Checks of arguments, which raise ValueError or TypeError as "NAME: expected X, got Y"."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(t: Any) -> str:
    """Returns the shape of a tensor as a text for errors, e.g. "[2, 3]"."""
    if t.is_nested:
        return "of a nested tensor"
    return f"[{', '.join(map(str, t.shape))}]"


def check_dense(name: str, t: Tensor) -> None:
    """Raises TypeError unless a tensor has strides."""
    if t.is_nested or t.layout is not torch.strided:
        layout = "nested" if t.is_nested else str(t.layout).removeprefix("torch.").strip("_")
        raise TypeError(f"{name}: expected a tensor with strides, got the layout {layout}")


def check_floating(name: str, t: Any, letters: str = "") -> None:
    """Raises TypeError unless t is a dense tensor of FLOATS. letters: its shape, e.g. "[N, D]"."""
    if not isinstance(t, Tensor):
        expected = f"a tensor {letters}".rstrip()
        raise TypeError(f"{name}: expected {expected}, got {type(t).__name__}")
    check_dense(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")


def check_features(name: str, t: Tensor, letters: str) -> None:
    """Raises an error unless t is a floating matrix without an empty dimension, e.g. "[N, D]"."""
    if (
        isinstance(t, Tensor)
        and t.dtype in FLOATS
        and t.dim() == 2
        and t.layout is torch.strided
        and not t.is_nested
        and t.numel()
    ):
        return
    if isinstance(t, Tensor) and t.dim() != 2:
        raise ValueError(f"{name}: expected a tensor {letters}, got shape {shape_of(t)}")
    check_floating(name, t, letters)
    raise ValueError(f"{name}: expected at least one row and one column, got shape {shape_of(t)}")


def check_device(name: str, t: Any, other_name: str, device: torch.device) -> None:
    """Raises ValueError unless the tensor t is on the device of another, `other_name`."""
    if t.device != device:
        raise ValueError(f"{name}: expected the device of {other_name}, {device}, got {t.device}")


def check_like(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError, or TypeError, unless t has the device, and the dtype, of `other`."""
    check_device(name, t, other_name, other.device)
    if t.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {t.dtype}")


def check_all_like_x(x: Tensor, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raises ValueError or TypeError unless each tensor, or None, has the device and dtype of x."""
    for name, t in zip(names, tensors):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            check_like(name, t, "x", x)


def scalar(
    name: str,
    value: Tensor | float,
    device: torch.device,
    dtype: torch.dtype,
    of: str = "the features",
) -> Tensor:
    """Returns a number, or a tensor with one element, as a tensor [] of this dtype on this device.

    A floating tensor of the device is returned itself, or as a differentiable view or cast; others
    raise TypeError or ValueError. of: whose device it is, for the message.
    """
    if isinstance(value, Tensor):
        if value.dtype == dtype and value.device == device and value.dim() == 0:
            return value
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {shape_of(value)}")
        check_floating(name, value)
        check_device(name, value, of, device)
        return value.reshape(()).to(dtype)
    value = _real(name, value, "a number or a tensor with one element")
    return torch.full((), value, device=device, dtype=dtype)


_warned: set[str] = set()


def savable(t: Tensor) -> Tensor:
    """Returns t, or a copy of a tensor of torch.inference_mode, which autograd cannot save."""
    if torch.compiler.is_compiling() or not t.is_inference() or torch.is_inference_mode_enabled():
        return t
    return t.clone()


def constant(name: str, t: Tensor) -> Tensor:
    """Returns t detached and savable; warns, once per name, if it requires a gradient."""
    if not t.requires_grad:
        return savable(t)
    compiling = torch.compiler.is_compiling()  # a warning would break the compiled graph
    if torch.is_grad_enabled() and not compiling and name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} requires a gradient, but is a constant here and gets none", stacklevel=4
        )
    return savable(t.detach())


def check_choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the options."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def check_instance(name: str, value: Any, kind: Any, expected: str) -> None:
    """Raises TypeError "NAME: expected EXPECTED, got ..." unless the value is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def sequence(name: str, value: Any, of: str = "a sequence") -> list:
    """Returns the items of an iterable that is no text; TypeError "NAME: expected OF, got ..."."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {of}, got {type(value).__name__}")
    return list(value)


def indices(name: str, value: Any, of: str = "indices, e.g. [0, 1]") -> list[int]:
    """Returns integers, also numpy's, as a list. Raises TypeError as `sequence`."""
    items = sequence(name, value, of)
    for item in items:
        check_instance(name, item, SupportsIndex, of)
    return [index(item) for item in items]


def groups(name: str, value: Any) -> list[list[int]]:
    """Returns groups of indices as lists. Raises TypeError as `sequence`."""
    of = "groups of indices, e.g. [[0, 1], [2, 3]]"
    return [indices(name, group, of) for group in sequence(name, value, of)]


def check_boolean(name: str, value: Any) -> None:
    """Raises TypeError unless the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _real(name: str, value: Any, expected: str) -> float:
    """Returns an int or float as it is, float() of other numbers; TypeError for bool and tensor."""
    if type(value) in (int, float):
        return value
    if hasattr(type(value), "__float__") and not isinstance(value, (bool, Tensor)):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """Returns a finite number as a float.

    TypeError if it is no number (a bool or tensor is none), ValueError if infinite, NaN or, with
    `positive`, not above 0.
    """
    value = _real(name, value, "a number")
    if not abs(value) < math.inf:  # torch.compile cannot trace isfinite of a symbolic float
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if positive and not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return float(value)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor
) -> None:
    """Raises TypeError or ValueError if one of these tensors of shaped_attention is not valid."""
    gains = (("alpha", alpha), ("beta", beta), ("gamma", gamma))
    for name, t in (("q", q), ("k", k), ("v", v), *gains):
        if (
            not isinstance(t, Tensor)
            or t.dtype not in FLOATS
            or t.device != q.device
            or t.layout is not torch.strided
        ):
            check_floating(name, t)
            check_device(name, t, "q", q.device)
    if q.is_nested:
        check_dense("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: expected a tensor [B, L, H, K], got shape {shape_of(q)}")
    if 0 in q.shape:
        raise ValueError(
            f"q: expected [B, L, H, K] without an empty dimension, got shape {shape_of(q)}"
        )
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q, {shape_of(q)}, got {shape_of(t)}")
        if t.dtype != q.dtype:
            check_like(name, t, "q", q)
    for name, t in gains:
        if t.shape != q.shape[2:3]:
            raise ValueError(
                f"{name}: expected one value per head, [{q.shape[2]}], got {shape_of(t)}"
            )


def lengths_of_batch(lengths: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    """Returns the lengths [batch] as int32 in 0..length, a new tensor.

    Values outside are an error on a CPU, except under torch.compile, and clamped elsewhere.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths: expected an integer tensor [{batch}], got {type(lengths).__name__}"
        )
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected one per sequence, [{batch}], got {shape_of(lengths)}")
    check_device("lengths", lengths, "q", device)
    if device.type == "cpu" and type(lengths) is Tensor and not torch.compiler.is_compiling():
        least, most = map(int, lengths.aminmax())
        extreme = least if least < 0 else most
        if not 0 <= extreme <= length:
            raise ValueError(f"lengths: expected 0 to {length} valid tokens, got {extreme}")
    return lengths.clamp(0, length).to(torch.int32)


def check_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
) -> None:
    """Raises an error if the type or shape of a tensor of parallel_mlp is not valid."""
    weights = (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight))
    biases = (("fc1_bias", fc1_bias), ("fc2_bias", fc2_bias))
    for name, t in (("x", x), *weights, *biases):
        if isinstance(t, Tensor) and t.dtype in FLOATS and t.layout is torch.strided:
            continue
        if t is not None or not name.endswith("bias"):
            check_floating(name, t)
    if x.is_nested:
        check_dense("x", x)
    if x.dim() < 1 or 0 in x.shape:
        raise ValueError(
            f"x: expected [..., C] without an empty dimension, got shape {shape_of(x)}"
        )
    for (name, t), letters in zip(weights, ("[F, C]", "[C_out, F]")):
        if t.dim() != 2 or 0 in t.shape:
            raise ValueError(
                f"{name}: expected {letters} without an empty dimension, got shape {shape_of(t)}"
            )
    f, c = fc1_weight.shape
    if x.shape[-1] != c:
        raise ValueError(
            f"x: expected the width of fc1_weight, {c}, in the last dimension, got shape "
            f"{shape_of(x)}"
        )
    if fc2_weight.shape[1] != f:
        raise ValueError(
            f"fc2_weight: expected [C_out, F] with F = {f} of fc1_weight, got shape "
            f"{shape_of(fc2_weight)}"
        )
    for (name, t), size in zip(biases, (f, fc2_weight.shape[0])):
        if t is not None and t.shape != (size,):
            raise ValueError(f"{name}: expected [{size}], got shape {shape_of(t)}")


def check_block(x: Tensor, tensors: Mapping[str, Any], norm: str) -> None:
    """Raises an error if one of simplified_block's tensors is not valid; not of unequal dtypes."""
    fc1_weight = tensors["fc1_weight"]
    are_tensors = isinstance(x, Tensor) and isinstance(fc1_weight, Tensor)
    if not are_tensors or x.is_nested or x.dim() != 3 or fc1_weight.dim() != 2:
        _check_mlp_of_block(x, tensors)
        raise ValueError(f"x: expected a tensor [B, L, C], got shape {shape_of(x)}")
    c = x.shape[2]
    f = fc1_weight.shape[0]
    if not x.numel() or not f:
        _check_mlp_of_block(x, tensors)
    alpha = tensors["alpha"]
    is_vector = isinstance(alpha, Tensor) and alpha.dim() == 1 and alpha.shape[0] > 0
    if not is_vector or c % alpha.shape[0]:
        got = shape_of(alpha) if isinstance(alpha, Tensor) else type(alpha).__name__
        raise ValueError(
            f"alpha: expected one value per head, [H] with H a divisor of C = {c}, got {got}"
        )
    if norm == "rmsnorm" and tensors["norm_bias"] is not None:
        raise ValueError("norm_bias: expected None, since RMSNorm has no bias, got a tensor")
    check_floating("x", x)
    shapes = {
        "qk_weight": (2 * c, c),
        "fc1_weight": (f, c),
        "fc1_bias": (f,),
        "fc2_weight": (c, f),
        "fc2_bias": (c,),
        "norm_weight": (c,),
        "alpha": alpha.shape,
        "beta": alpha.shape,
        "gamma": alpha.shape,
        "value_weight": (c, c),
        "output_weight": (c, c),
        "norm_bias": (c,),
    }
    for name, shape in shapes.items():
        t = tensors[name]
        if t is None and name in ("value_weight", "output_weight", "norm_bias"):
            continue
        if (
            isinstance(t, Tensor)
            and t.dtype in FLOATS
            and t.device == x.device
            and t.layout is torch.strided
            and t.shape == shape
        ):
            continue
        _check_mlp_of_block(x, tensors)
        check_floating(name, t)
        check_device(name, t, "x", x.device)
        raise ValueError(f"{name}: expected shape {list(shape)}, got {shape_of(t)}")


def _check_mlp_of_block(x: Tensor, tensors: Mapping[str, Any]) -> None:
    """Raises the errors of `check_mlp`, which say more of a block's shapes, if there are any."""
    check_mlp(x, *[tensors[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")])
