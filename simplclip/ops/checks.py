"""Checks of arguments, which raise ValueError or TypeError as "NAME: expected X, got Y"."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping
from operator import index
from typing import Any, NamedTuple, SupportsIndex

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


def check_all_like(of: str, other: Tensor, tensors: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError unless each tensor, or None, is like `other`, named `of`."""
    for name, t in tensors.items():
        if t is not None and (t.dtype != other.dtype or t.device != other.device):
            check_like(name, t, of, other)


class Shape(NamedTuple):
    """The shape of a tensor in letters."""

    letters: str  # "2C C"
    optional: bool  # whether None is allowed
    dims: list[tuple[str, int]]  # of each dimension the letter and a factor


def shapes(**letters: str) -> dict[str, Shape]:
    """Returns the shapes of tensors for `expect`, as in shapes(x="... C", w="2C C", bias="C?").

    A letter is the same size everywhere. "..." is any number of dimensions, "?" says that None is
    allowed.
    """
    result = {}
    for name, text in letters.items():
        shape = text.removesuffix("?")
        dims = [(dim[-1], 2 if dim[0] == "2" else 1) for dim in shape.split()]
        result[name] = Shape(shape, text != shape, dims)
    return result


def expect(
    tensors: Mapping[str, Any], shapes: Mapping[str, Shape], of: str, sizes: dict[str, Any]
) -> None:
    """Raises TypeError or ValueError unless tensors are dense and floating, of these shapes.

    of: the tensor whose device the others have. sizes: those of letters, none of them 0, to which
    those of other letters are added.
    """
    device = getattr(tensors[of], "device", None)
    right: dict[str, Any] = {}  # shapes by their letters
    for name, (letters, optional, dims) in shapes.items():
        t = tensors[name]
        if t is None and optional:
            continue
        if (
            not isinstance(t, Tensor)
            or t.dtype not in FLOATS
            or t.device != device
            or t.layout is not torch.strided
            or t.is_nested
        ):
            check_floating(name, t)
            check_floating(of, tensors[of])
            check_device(name, t, of, tensors[of].device)
        shape = t.shape
        if letters in right and shape == right[letters]:
            continue
        last = shape
        if dims[0][0] == ".":
            dims = dims[1:]
            last = shape[-len(dims) :]
        if len(last) != len(dims) or 0 in shape:
            _refuse_shape(name, t, letters, sizes)
        for (letter, factor), size in zip(dims, last):
            if sizes.setdefault(letter, size) * factor != size:
                _refuse_shape(name, t, letters, sizes)
        right[letters] = shape


def _refuse_shape(name: str, t: Tensor, letters: str, sizes: Mapping[str, Any]) -> None:
    """Raises ValueError, which says the sizes of the letters if all are known."""
    dims = letters.split()
    expected = f"[{', '.join(dims)}]"
    if 0 in t.shape:
        expected += " without an empty dimension"
    elif sizes.keys() >= {dim[-1] for dim in dims if dim != "..."}:
        numbers = []
        for dim in dims:
            factor = 2 if dim[0] == "2" else 1
            numbers.append(dim if dim == "..." else str(factor * sizes[dim[-1]]))
        expected += f" = [{', '.join(numbers)}]"
    raise ValueError(f"{name}: expected {expected}, got shape {shape_of(t)}")


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


def savable(t: Tensor) -> Tensor:
    """Returns t, or a copy of a tensor of torch.inference_mode, which autograd cannot save."""
    if torch.compiler.is_compiling() or not t.is_inference() or torch.is_inference_mode_enabled():
        return t
    return t.clone()


def constant(name: str, t: Tensor) -> Tensor:
    """Returns t detached and savable; warns if it requires a gradient."""
    if not t.requires_grad:
        return savable(t)
    compiling = torch.compiler.is_compiling()  # a warning would break the compiled graph
    if torch.is_grad_enabled() and not compiling:
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
