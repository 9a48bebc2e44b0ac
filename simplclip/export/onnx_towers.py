"""Exports the two towers of a model as ONNX with standard operators, and compares onnxruntime's results with torch's."""

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
from simplclip.models.fold import fold
from simplclip.models.registry import first_line
from simplclip.ops.attention.call import AttentionCall
from simplclip.ops.attention.reference import shaped_attention_fwd
from simplclip.ops.block.call import BlockCall
from simplclip.ops.block.norm import norm_fwd
from simplclip.ops.block.op import gains_of, heads_of
from simplclip.ops.mlp.call import MlpCall
from simplclip.ops.mlp.reference import ACTIVATIONS

TOWERS = {"image": ("pixel_values", "image_features"), "text": ("input_ids", "text_features")}
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4  # of each feature; a vector of features has length 1
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
    """Writes tower `name` ("image", "text") of `model`, in eval mode and folded, to `path`, and compares it with torch.

    inputs: real inputs [B, ...] of at least max(CHECKED_BATCHES) rows; B is dynamic in the file. Weights beyond 2 GiB go to
    PATH.data. Returns the opset and the largest absolute error of a feature for each batch of CHECKED_BATCHES.
    Raises ExportError if torch cannot trace the tower, an operator is not ONNX's, or the error is above TOLERANCE.
    """
    import onnx

    tower = Tower(model, name).eval()
    given, returned = TOWERS[name]
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(fold(tower), (inputs[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            program = program.run_decompositions(_decompositions())
            written = torch.onnx.export(program, input_names=[given], output_names=[returned], dynamo=True, verbose=False)
            written.rename_axes({written.model.graph.inputs[0].shape[0]: "batch"})
        except Exception as error:  # torch raises many types
            reason = first_line(error)
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
        ops.simplified_block_fwd.default: lambda *args: _simplified_block(BlockCall(*args[:-1])),
        ops.shaped_attention_fwd.default: lambda q, *args: (
            *shaped_attention_fwd(AttentionCall(q, *args[:-1])),
            q.new_empty(0),
        ),
        ops.parallel_mlp_fwd.default: lambda x, *args: (_mlp(x, MlpCall(x, *args[:-1])), x.new_empty(0)),
    }


def _mlp(n: Tensor, call: MlpCall | BlockCall) -> Tensor:
    hidden = F.linear(n, call.fc1_weight, call.fc1_bias)
    return F.linear(ACTIVATIONS[call.act](hidden), call.fc2_weight, call.fc2_bias)


def _simplified_block(call: BlockCall):
    """`ops.simplified_block` without in-place writes, which a decomposition cannot have, and without results for backward."""
    x, heads = call.x, heads_of(call)
    n, _ = norm_fwd(x.reshape(-1, x.shape[2]), call)
    q, k = F.linear(n, call.qk_weight).reshape(*heads[:2], 2, *heads[2:]).unbind(2)
    v = n if call.value_weight is None else F.linear(n, call.value_weight)
    attention = AttentionCall(
        q, k, v.reshape(heads), gains_of(call) * call.attention_gain, call.lengths, call.scale, call.causal
    )
    out, lse = shaped_attention_fwd(attention)
    out = out.reshape(n.shape)
    if call.output_weight is not None:
        out = F.linear(out, call.output_weight)
    out = out + call.mlp_gain.to(x.dtype) * _mlp(n, call)
    return out.reshape(x.shape), x.new_empty(0), x.new_empty(0), lse, x.new_empty(0)


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
