"""Writes the two towers of a model as ONNX with standard operators, and checks their features.

    python examples/export_onnx.py runs/my --out onnx

image.onnx maps image, float32 [B, 3, S, S], to image_features, float32 [B, D]; text.onnx maps text,
token ids int64 [B, L], to text_features. Features are normalised, B is dynamic, and batch norms are
folded into the layers before them. preprocessing.json beside them has the size, mean and std of
images, and the tokenizer and its length.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from open_clip.utils import to_2tuple
from torch import Tensor, nn

import simplclip
from simplclip.calls.attention import AttentionCall
from simplclip.calls.block import BlockCall
from simplclip.calls.mlp import MlpCall
from simplclip.export import write_preprocessing
from simplclip.ops.attention.reference import shaped_attention_fwd
from simplclip.ops.block.norm import norm_fwd
from simplclip.ops.block.op import gains_of, heads_of
from simplclip.ops.mlp.reference import ACTIVATIONS


# simplclip's operators, which ONNX does not have, in plain torch. The last argument is a backend.
# Results that only backward needs are empty tensors.
def attention(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *shaped_attention_fwd(AttentionCall(q, *args[:-1])), q.new_empty(0)


def parallel_mlp(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return mlp(x, MlpCall(x, *args[:-1])), x.new_empty(0)


def mlp(x: Tensor, call: MlpCall | BlockCall) -> Tensor:
    hidden = F.linear(x, call.fc1_weight, call.fc1_bias)
    return F.linear(ACTIVATIONS[call.act](hidden), call.fc2_weight, call.fc2_bias)


def simplified_block(*args: Any) -> tuple[Tensor, ...]:
    call = BlockCall(*args[:-1])
    x = call.x
    heads = heads_of(call)
    empty = call.x.new_empty(0)
    n, _ = norm_fwd(x.reshape(-1, x.shape[2]), call)
    q, k = F.linear(n, call.qk_weight).reshape(*heads[:2], 2, *heads[2:]).unbind(2)
    v = n if call.value_weight is None else F.linear(n, call.value_weight)
    gains = gains_of(call) * call.attention_gain
    attention_call = AttentionCall(
        q, k, v.reshape(heads), gains, call.lengths, call.scale, call.causal
    )
    out, lse = shaped_attention_fwd(attention_call)
    out = out.reshape(n.shape)
    if call.output_weight is not None:
        out = F.linear(out, call.output_weight)
    out = out + call.mlp_gain.to(x.dtype) * mlp(n, call)
    return out.reshape(x.shape), empty, empty, lse, empty


DECOMPOSITIONS = {
    torch.ops.simplclip.simplified_block_fwd.default: simplified_block,
    torch.ops.simplclip.shaped_attention_fwd.default: attention,
    torch.ops.simplclip.parallel_mlp_fwd.default: parallel_mlp,
}


class Tower(nn.Module):
    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self.model, f"encode_{self.name}")(inputs, normalize=True)


@torch.no_grad()
def export(model: nn.Module, name: str, inputs: Tensor, file: Path) -> float:
    """Writes the tower "image" or "text", and returns the largest error of its features. inputs:
    [B, ...], B > 1.
    """
    tower = Tower(model, name).eval()
    warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
    program = torch.export.export(
        simplclip.fold(tower), (inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    program = program.run_decompositions(DECOMPOSITIONS)
    names = {"input_names": [name], "output_names": [f"{name}_features"]}
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    error = 0.0
    for x in (inputs, inputs[-1:]):
        (features,) = session.run(None, {name: x.numpy()})
        error = max(error, abs(features - tower(x).numpy()).max().item())
    return error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "model", help="what simplclip.load takes: a run, an export, open_clip:NAME/TAG"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for image.onnx and text.onnx"
    )
    options = parser.parse_args(arguments)
    encoder = simplclip.load(options.model, device="cpu")
    for method in ("encode_text", "_encode_text"):
        # the encoder crops texts by it, which depends on the texts: not in a graph
        vars(encoder.model).pop(method, None)
    options.out.mkdir(parents=True, exist_ok=True)
    inputs = {
        "image": torch.randn(2, 3, *to_2tuple(encoder.model.visual.image_size)),
        "text": encoder.tokenizer(["a cat", "two dogs on a beach"]),
    }
    for name, tower_inputs in inputs.items():
        file = options.out / f"{name}.onnx"
        error = export(encoder.model, name, tower_inputs, file)
        print(f"wrote {file}: {file.stat().st_size:,} bytes, largest error {error:.1e}")
        if not error <= 1e-4:  # also NaN
            raise SystemExit(f"{file}: expected torch's features, vectors of length 1")
    write_preprocessing(options.out, encoder.model, encoder.tokenizer)
    print(f"wrote {options.out / 'preprocessing.json'}: how to make the inputs")


if __name__ == "__main__":
    main()
