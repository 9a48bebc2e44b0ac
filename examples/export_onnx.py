"""Writes the two towers of a model as ONNX with standard operators, and compares onnxruntime's features with torch's.

python examples/export_onnx.py runs/my --out onnx

image.onnx maps pixel_values float32 [B, 3, S, S] to image_features float32 [B, D], text.onnx maps input_ids int64 [B, L] to
text_features. Features are normalised, B is dynamic, branches and batch norms are folded into the layers before them.
Needs: pip install 'simplclip[export]'
"""

import argparse
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import simplclip
from simplclip.models.fold import fold
from simplclip.ops.attention.call import AttentionCall
from simplclip.ops.attention.reference import shaped_attention_fwd
from simplclip.ops.block.call import BlockCall
from simplclip.ops.block.norm import norm_fwd
from simplclip.ops.block.op import gains_of, heads_of
from simplclip.ops.mlp.call import MlpCall
from simplclip.ops.mlp.reference import ACTIVATIONS

TEXTS = ["a cat", "a photo of two dogs on a beach", "red, green and blue"]
TOLERANCE = 1e-4  # of each feature; a vector of features has length 1


def attention(q, *args):
    """In plain torch. Like the functions below it returns empty tensors in place of what backward needs."""
    return *shaped_attention_fwd(AttentionCall(q, *args[:-1])), q.new_empty(0)


def mlp(x, call):
    hidden = F.linear(x, call.fc1_weight, call.fc1_bias)
    return F.linear(ACTIVATIONS[call.act](hidden), call.fc2_weight, call.fc2_bias)


def simplified_block(*args):
    call = BlockCall(*args[:-1])
    x, heads, empty = call.x, heads_of(call), call.x.new_empty(0)
    n, _ = norm_fwd(x.reshape(-1, x.shape[2]), call)
    q, k = F.linear(n, call.qk_weight).reshape(*heads[:2], 2, *heads[2:]).unbind(2)
    v = n if call.value_weight is None else F.linear(n, call.value_weight)
    gains = gains_of(call) * call.attention_gain
    out, lse = shaped_attention_fwd(AttentionCall(q, k, v.reshape(heads), gains, call.lengths, call.scale, call.causal))
    out = out.reshape(n.shape)
    if call.output_weight is not None:
        out = F.linear(out, call.output_weight)
    out = out + call.mlp_gain.to(x.dtype) * mlp(n, call)
    return out.reshape(x.shape), empty, empty, lse, empty


# simplclip's operators, which ONNX does not have -> functions in torch's own
DECOMPOSITIONS = {
    torch.ops.simplclip.simplified_block_fwd.default: simplified_block,
    torch.ops.simplclip.shaped_attention_fwd.default: attention,
    torch.ops.simplclip.parallel_mlp_fwd.default: lambda x, *args: (mlp(x, MlpCall(x, *args[:-1])), x.new_empty(0)),
}


class Tower(nn.Module):
    def __init__(self, model: nn.Module, encode: str) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs):
        return getattr(self.model, self.encode)(inputs, normalize=True)


@torch.no_grad()
def export(tower: Tower, inputs: torch.Tensor, file: Path, names: tuple[str, str]) -> float:
    """Writes a tower, and returns the largest error of its features. inputs: [B, ...], B > 1; names: of input and output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.export.export(fold(tower), (inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        program = program.run_decompositions(DECOMPOSITIONS)
        written = torch.onnx.export(program, input_names=names[:1], output_names=names[1:], dynamo=True, verbose=False)
    written.rename_axes({written.model.graph.inputs[0].shape[0]: "batch"})
    size = sum(p.numel() * p.element_size() for p in tower.parameters())
    written.save(str(file), external_data=size > 2**31 - 2**24)  # a protobuf ends at 2 GiB
    graph = onnx.load(file, load_external_data=False)
    domains = {node.domain for part in (graph.graph, *graph.functions) for node in part.node} - {"", "ai.onnx"}
    if domains:
        raise SystemExit(f"{file}: expected standard operators, got operators of {', '.join(sorted(domains))}")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    batches = [inputs, inputs[-1:]]
    errors = [session.run(None, {names[0]: batch.numpy()})[0] - tower(batch).numpy() for batch in batches]
    return max(abs(error).max().item() for error in errors)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="what simplclip.load takes: a run, an export, open_clip:NAME/TAG")
    parser.add_argument("--checkpoint", help="file with the weights of the model")
    parser.add_argument("--out", type=Path, required=True, help="folder for image.onnx and text.onnx")
    options = parser.parse_args(arguments)
    encoder = simplclip.load(options.model, options.checkpoint, device="cpu")
    for method in ("encode_text", "_encode_text"):
        vars(encoder.model).pop(method, None)  # the encoder crops texts by it, which depends on the texts: not in a graph
    options.out.mkdir(parents=True, exist_ok=True)
    height, width = encoder.model.visual.image_size
    pixels = torch.randn(len(TEXTS), 3, height, width, generator=torch.Generator().manual_seed(0))
    for name, inputs, names in (
        ("image", pixels, ("pixel_values", "image_features")),
        ("text", encoder.tokenizer(TEXTS), ("input_ids", "text_features")),
    ):
        file = options.out / f"{name}.onnx"
        error = export(Tower(encoder.model, f"encode_{name}").eval(), inputs, file, names)
        if not error <= TOLERANCE:  # NaN too
            raise SystemExit(f"{file}: expected features within {TOLERANCE:g} of torch's, got an error of {error:.2g}")
        print(f"wrote {file}: {file.stat().st_size:,} bytes, largest error {error:.1e}")


if __name__ == "__main__":
    main()
