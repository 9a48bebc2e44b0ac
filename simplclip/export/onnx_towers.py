"""Exports the two towers of a model as ONNX with standard operators, and compares onnxruntime's results with torch's."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.ops.attention import reference as attention_reference
from simplclip.ops.block.norm import norm_fwd
from simplclip.ops.mlp.reference import ACTIVATIONS

TOWERS = {"image": ("pixel_values", "image_features"), "text": ("input_ids", "text_features")}
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4  # of each feature of a vector of length 1
_MOST_BYTES = 2**31 - 2**24  # the limit of a protobuf is 2 GiB


class ExportError(InputError):
    """The model cannot be exported, or its export computes other values."""


class Tower(nn.Module):
    """One tower of a model; maps inputs to normalised features [B, D]."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor) -> Tensor:
        encode = self.model.encode_image if self.name == "image" else self.model.encode_text
        return encode(inputs, normalize=True)


def export(model: nn.Module, name: str, inputs: Tensor, path: Path) -> dict[str, Any]:
    """Write tower `name` ("image", "text") of `model`, in eval mode, to `path`, and compare it with torch.

    inputs: real inputs [B, ...] of at least max(CHECKED_BATCHES) rows; B is dynamic in the file. Weights beyond 2 GiB go to
    PATH.data. Returns the opset and the largest absolute error of a feature for each batch of CHECKED_BATCHES.
    Raises ExportError if torch cannot trace the tower, an operator is not ONNX's, or the error is above TOLERANCE.
    """
    import onnx

    tower = Tower(model, name).eval()
    given, returned = TOWERS[name]
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(tower, (inputs[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            program = program.run_decompositions(_decompositions())
            written = torch.onnx.export(program, input_names=[given], output_names=[returned], dynamo=True, verbose=False)
            written.rename_axes({written.model.graph.inputs[0].shape[0]: "batch"})
        except Exception as error:  # torch raises many types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(f"onnx: expected a tower that torch can export, got the {name} tower: {reason}") from error
    weights = sum(p.numel() * p.element_size() for p in tower.parameters())
    written.save(str(path), external_data=weights > _MOST_BYTES)
    graph = onnx.load(str(path), load_external_data=False)
    domains = {node.domain for part in (graph.graph, *graph.functions) for node in part.node} - {"", "ai.onnx"}
    if domains:
        raise ExportError(
            f"onnx: expected standard operators in the {name} tower, got operators of {', '.join(sorted(domains))}"
        )
    return {"opset": graph.opset_import[0].version, "max_abs_error": _compare(tower, inputs, path)}


def _compare(tower: Tower, inputs: Tensor, path: Path) -> dict[str, float]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    errors = {}
    for batch in CHECKED_BATCHES:
        some = inputs[-batch:]
        with torch.no_grad():
            expected = tower(some)
        (found,) = session.run(None, {TOWERS[tower.name][0]: some.numpy()})
        error = (torch.from_numpy(found) - expected).abs().max().item()
        if not error <= TOLERANCE:  # NaN too
            raise ExportError(
                f"onnx: expected the {tower.name} tower's features within {TOLERANCE:g} of torch's at batch {batch}, "
                f"got an error of {error:.2g}"
            )
        errors[str(batch)] = error
    return errors


def _decompositions() -> dict[Any, Any]:
    ops = torch.ops.simplclip
    return {
        ops.simplified_block_fwd.default: _simplified_block,
        ops.shaped_attention_fwd.default: lambda *args: attention_reference.shaped_attention_fwd(*args[:-1]),
        ops.parallel_mlp_fwd.default: _parallel_mlp,
    }


def _mlp(n: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, act: str) -> Tensor:
    return F.linear(ACTIVATIONS[act](F.linear(n, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def _parallel_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, *_):
    return _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act), x.new_empty(0)


def _simplified_block(
    x, norm_weight, norm_bias, qk_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gains, mlp_gain, value_weight,
    output_weight, lengths, norm, eps, act, scale, causal, *_,
):  # fmt: skip
    """`ops.simplified_block` without in-place writes, which a decomposition cannot have, and without results for backward."""
    b, length, c = x.shape
    heads = gains.shape[1]
    n, _ = norm_fwd(x.reshape(-1, c), norm, norm_weight, norm_bias, eps)
    q, k = F.linear(n, qk_weight).reshape(b, length, 2, heads, c // heads).unbind(2)
    v = n if value_weight is None else F.linear(n, value_weight)
    out, lse = attention_reference.shaped_attention_fwd(q, k, v.reshape(q.shape), gains, lengths, scale, causal)
    out = out.reshape(-1, c)
    if output_weight is not None:
        out = F.linear(out, output_weight)
    out = out + mlp_gain.to(x.dtype) * _mlp(n, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act)
    return out.reshape(x.shape), x.new_empty(0), x.new_empty(0), lse


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences reports of torch's exporter and onnxscript on their own deprecations and optimisations."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
