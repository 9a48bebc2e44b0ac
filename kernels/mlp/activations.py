"""Activations of an MLP and their derivatives, in float32, for tiles in registers."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import LOG2E, sigmoid

ACTIVATIONS = ("gelu", "gelu_tanh", "quickgelu", "relu", "silu")
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): (1 + tanh(x)) / 2 = sigmoid(2 x)
_CUBIC = tl.constexpr(0.07135481282553606)  # 0.044715 _LINEAR
_QUICK = tl.constexpr(1.702)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Returns act(x) of each element of a float32 tile; ACT: one of ACTIVATIONS."""
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACT == "gelu_tanh":
        return x * sigmoid(x * (x * x * _CUBIC + _LINEAR))
    elif ACT == "quickgelu":
        return x * sigmoid(x * _QUICK)
    elif ACT == "silu":
        return x * sigmoid(x)
    else:
        tl.static_assert(ACT == "relu")
        return tl.where(x < 0.0, 0.0, x)  # keeps NaN


@triton.jit
def _sigmoid_and_slope(x):
    """Returns s = 1 / (1 + e^-x) and s (1 - s) of each element.

    1 - s is not computed as a difference: where s is nearly 1, an error of s in the last place
    would be all of it, and a large factor makes it visible.
    """
    e = tl.exp2(tl.minimum(-x * LOG2E, 64.0))
    s = 1.0 / (1.0 + e)
    return s, e * s * s


@triton.jit
def slope(x, ACT: tl.constexpr):
    """Returns act'(x) at each element of a float32 tile; ACT: one of ACTIVATIONS."""
    if ACT == "gelu":
        return (
            0.5 + 0.5 * tl.erf(x * _SQRT_HALF) + x * _INV_SQRT_2PI * tl.exp2(x * x * (-0.5 * LOG2E))
        )
    elif ACT == "gelu_tanh":
        s, ds = _sigmoid_and_slope(x * (x * x * _CUBIC + _LINEAR))
        return s + x * ds * (x * x * (3.0 * _CUBIC) + _LINEAR)
    elif ACT == "quickgelu":
        s, ds = _sigmoid_and_slope(x * _QUICK)
        return s + x * _QUICK * ds
    elif ACT == "silu":
        s, ds = _sigmoid_and_slope(x)
        return s + x * ds
    else:
        tl.static_assert(ACT == "relu")
        return tl.where(x <= 0.0, 0.0, 1.0)  # 1 for NaN, as in torch
