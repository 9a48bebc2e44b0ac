"""Kernels as ptxas and the hardware may compute them within what the PTX ISA says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ptx import numbers
from ptx.elementwise import ELEMENTWISE, register
from ptx.parse import Instruction, Kernel, Register, registers

_APPROXIMATE = re.compile(r"(ex2|lg2|rcp|div)\.(approx|full)\b.*")
_SUM = re.compile(r"(add|sub)((?:\.ftz)?\.f32(?:x2)?)")  # with .rn they are never fused


def noisy(kernel: Kernel) -> Kernel:
    """Returns the kernel with errors of up to 2^-22 in its approximate functions."""
    instructions = []
    for i in kernel.instructions:
        noise = _APPROXIMATE.fullmatch(i.opcode)
        instructions.append(replace(i, opcode=f"noisy.{i.opcode}") if noise else i)
    return replace(kernel, instructions=instructions)


def _with_noise(function: Callable, least: float) -> Callable:
    """Returns a function with errors relative to the result, or to `least`; none at 0, as ex2's."""

    def run(*sources: np.ndarray) -> np.ndarray:
        exact = np.asarray(function(*sources), np.float32)
        # equal results have equal errors, as in hardware
        hashed = exact.view(np.uint32) * np.uint32(2654435761)
        noise = (hashed / 2.0**31 - 1) * 2.0**-22
        size = np.maximum(np.abs(exact, dtype=np.float64), least)
        inexact = np.isfinite(exact) & (sources[0] != 0)
        return np.where(inexact, exact + noise * size, exact).astype(np.float32)

    return run


for _opcode, _kinds, _function in ELEMENTWISE:
    if _APPROXIMATE.fullmatch(_opcode):
        # of a logarithm between -1 and 1 the error is absolute
        _least = 1.0 if _opcode.startswith("lg2") else 0.0
        register(f"noisy.{_opcode}", _kinds.split(), _with_noise(_function, _least))


def fused(kernel: Kernel) -> Kernel:
    """Returns the kernel with each product fused into the sums of its block that use it."""
    starts = set(kernel.labels.values())
    products: dict[Register, Instruction] = {}
    instructions = []
    for place, i in enumerate(kernel.instructions):
        if place in starts:
            products = {}
        instructions.append(_with_product(i, products))
        written = set(registers(i.operands[:1]))
        products = {
            to: product
            for to, product in products.items()
            if written.isdisjoint(registers(product.operands))
        }
        sources = registers(i.operands[1:])
        if i.opcode.startswith("mul.") and i.predicate is None and written.isdisjoint(sources):
            products[i.operands[0]] = i
    return replace(kernel, instructions=instructions)


def _with_product(i: Instruction, products: dict[Register, Instruction]) -> Instruction:
    """Returns a sum with one of its terms replaced by the factors of a product."""
    if match := _SUM.fullmatch(i.opcode):
        name, kind = match.groups()
        to, left, right = i.operands
        for place, term, other in ((0, left, right), (1, right, left)):
            product = products.get(term)
            if product and product.opcode == f"mul{kind}":
                operands = (to, *product.operands[1:], other)
                return replace(i, opcode=f"fused.{name}{place}{kind}", operands=operands)
    return i


_FUSED = {
    "add0": numbers.fma,
    "add1": numbers.fma,
    "sub0": lambda a, b, c: numbers.fma(a, b, -c),
    "sub1": lambda a, b, c: numbers.fma(-a, b, c),
}
for _name, _function in _FUSED.items():
    for _kind in ("ftz?.f32", "f32x2"):
        register(f"fused.{_name}.{_kind}", [_kind.split(".")[-1]] * 4, _function)
