"""A NaN or an infinity in any argument gives a result that is not finite, where plain torch gives one, on every backend."""

import math

import interpreter
import plain
import pytest
import torch
from calls import ATTENTION, MLP, PLAIN, Call, attention_inputs, block_inputs, function_of, mlp_inputs, outputs_of
from devices import BACKENDS
from interpreter import needs_triton
from similarity import make_inputs

import simplclip

SIZES = ((1, 1, 0), (1, 3, 1), (2, 2, 0), (3, 5, 1), (17, 17, 0))  # N, M, label_offset
PM = ("pair_matching",)
SIMILARITIES = [
    {"terms": ("contrastive",)},
    {"terms": ("contrastive",), "symmetric": False},
    *(
        {"terms": PM, "plane": plane, "negatives": how}
        for plane in ("scalar", "hadamard")
        for how in ("all", "shift", "hard")
    ),
    {"terms": ("relational",)},
    {"terms": ("relational",), "divergence": "cross_entropy"},
    {"terms": ("interactive",)},
    {"terms": ("interactive",), "teacher_width": 5, "interactive": "kl"},
    {"terms": ("interactive",), "interactive": "kl", "divergence": "cross_entropy"},
    {"terms": ("contrastive", *PM, "relational", "interactive"), "interactive": "kl", "negatives": "hard"},
]


def similarity_calls(sizes=SIZES, options=SIMILARITIES):
    for n, m, offset in sizes:
        for ids in (False, True):
            for chosen in options:
                if chosen.get("negatives") == "shift" and m == 1:
                    continue
                made = {k: v for k, v in chosen.items() if k in ("terms", "plane", "teacher_width")}
                leaves, fixed = make_inputs(n, m, offset, ids=ids, width=7, **made)
                yield Call("similarity_loss", leaves, fixed | {k: v for k, v in chosen.items() if k not in made})


def attention_calls():
    for b, length, h, k in ((1, 1, 1, 1), (2, 5, 2, 4), (1, 17, 1, 16), (2, 40, 1, 8)):
        tensors = dict(zip(ATTENTION, attention_inputs(b, length, h, k)))
        for causal in (False, True):
            yield Call("shaped_attention", tensors, {"causal": causal})
            yield Call("shaped_attention", tensors | {"lengths": torch.full((b,), (length + 1) // 2)}, {"causal": causal})


def other_calls():
    yield from attention_calls()
    for act in plain.ACTIVATIONS:
        for shape in ((1, 1, 1, 1), (7, 17, 33, 9)):
            yield Call("parallel_mlp", dict(zip(MLP, mlp_inputs(*shape))), {"act": act})
    for length, norm, recompute in ((1, "layernorm", False), (5, "rmsnorm", True), (17, "layernorm", True)):
        tensors = block_inputs(2, length, norm=norm, projections=length > 1)
        yield Call("simplified_block", tensors, {"norm": norm, "recompute": recompute})
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).double()  # noqa: E731
    for n, d in ((1, 1), (3, 17), (20, 33)):
        for options in ({}, {"distance": "smooth_l1", "beta": 0.1}, {"normalize": False}):
            yield Call("feature_loss", {"student": draw(n, d), "teacher": draw(n, d)}, options)
        yield Call("feature_loss", {"student": draw(n, 4), "teacher": draw(n, d), "projection": draw(d, 4)})


def check(calls, backend, dtypes=(torch.float32, torch.bfloat16)):
    g = torch.Generator().manual_seed(0)
    lost, count = [], 0
    for call in calls:
        form = plain.attention_by_loops if call.op == "shaped_attention" else PLAIN[call.op]
        for dtype in dtypes:
            for name, t in call.typed(dtype).items():
                for value in (math.inf, -math.inf, math.nan) if t.is_floating_point() else ():
                    tensors = call.typed(dtype) | {name: t.clone()}
                    at = int(torch.randint(t.numel(), (1,), generator=g))
                    tensors[name].view(-1)[at] = value
                    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
                    with simplclip.backend(backend), torch.no_grad():
                        found = outputs_of(function_of(call), call, tensors)
                    count += 1
                    for term, expected in outputs_of(form, call, wide).items():
                        if (found[term].isfinite() & ~expected.isfinite()).any():
                            shapes = {k: tuple(v.shape) for k, v in tensors.items()}
                            lost.append(f"{call.op} {term} {dtype} {name}[{at}] = {value}: {call.options} {shapes}")
    assert count > 0
    assert not lost, f"{len(lost)} of {count} finite on {backend} where plain torch is not:\n" + "\n".join(lost[:5])


def check_everything(backend):
    check(similarity_calls(), backend)
    check(other_calls(), backend)


@pytest.mark.slow
@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
def test_reaches_the_result(backend):
    check_everything(backend)


def check_triton():
    """A part: the interpreter is slow."""
    check(similarity_calls(((1, 3, 1),), SIMILARITIES[-2:]), "triton", (torch.float32,))
    small = [call for call in other_calls() if all(t.numel() < 100 for t in call.tensors.values())]
    check(small[::7], "triton", (torch.float32,))


@needs_triton
@pytest.mark.slow
def test_triton_under_its_interpreter():
    done = interpreter.run("-c", "import test_nonfinite as t; t.check_triton(); print('done')")
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_feature_of_a_lone_pair(backend):
    """No negatives: softplus(-inf) would be a loss of 0."""
    image, text = torch.tensor([[math.inf, 1.0]]), torch.tensor([[1.0, 1.0]])
    with simplclip.backend(backend):
        terms = simplclip.ops.similarity_loss(
            image, text, 1.0, terms=("contrastive", *PM), plane=(1.0, 0.0)
        )  # fmt: skip
    assert terms["contrastive"].isnan()
    assert terms["pair_matching"].isnan()
