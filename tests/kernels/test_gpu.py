"""The ops as users call them, on a CUDA device. Their kernels one by one: test_similarity_triton.py, test_feature_loss.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from devices import cuda_peak_bytes
from open_clip.loss import DistillClipLoss
from similarity import TEACHER, check, make_inputs

from simplclip.losses import WIKDLoss
from simplclip.ops import backends, feature_loss, similarity_loss
from simplclip.ops.similarity.call import TERMS

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUBSETS = [s for k in range(1, 5) for s in itertools.combinations(TERMS, k)]
WHOLE = {"relational_weight": 0.8, "interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}


def test_triton_serves_cuda_tensors():
    for op in ("similarity_loss_fwd", "similarity_loss_bwd", "similarity_rows", "feature_loss_fwd", "feature_loss_bwd"):
        assert backends.select(op, "cuda", torch.bfloat16)[0] == "triton"


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_every_subset_of_terms(terms, dtype, backend):
    for (n, m, offset), interactive in itertools.product(((1, 1, 0), (257, 257, 0), (100, 333, 57)), ("infonce", "kl")):
        for plane, negatives in (("scalar", "all"), ("hadamard", "hard")):
            leaves, options = make_inputs(n, m, offset, terms=terms, plane=plane, ids=True)
            options |= {"interactive": interactive, "negatives": negatives}
            check(leaves, options, dtype, backend, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_and_a_wider_teacher(dtype):
    leaves, options = make_inputs(700, 900, 100, terms=TERMS, teacher_width=100, ids=True)
    check(leaves, options, dtype, "triton", device="cuda", scratch_bytes=1 << 18)


def batch(n, d, dtype):
    """image, text, logit_scale, those of the teacher; and of them the leaves."""
    named, _ = make_inputs(n, n, terms=("relational",), width=d)
    wide = ("logit_scale", "teacher_scale")
    named = {name: t.to("cuda", torch.float32 if name in wide else dtype) for name, t in named.items()}
    leaves = [t.requires_grad_() for name, t in named.items() if name not in TEACHER]
    return list(named.values()), leaves


def test_nothing_waits_for_the_device():
    args, _ = batch(64, 32, torch.float32)
    loss = WIKDLoss(**WHOLE, negatives="hard").cuda()
    loss(*args)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(loss(*args)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_open_clips_distillation():
    results = []
    for loss in (DistillClipLoss(), WIKDLoss()):
        args, leaves = batch(500, 64, torch.float32)
        values = loss(*args)
        sum(values).backward()
        results.append([*values, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


def test_compiles_without_graph_breaks():
    loss = WIKDLoss(**WHOLE).cuda()
    args, _ = batch(100, 64, torch.float32)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(*args), loss(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_loss(dtype):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(1000, 513, generator=g).cuda().to(dtype), torch.randn(1000, 513, generator=g).cuda().half()
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    value = feature_loss(ours, teacher)
    expected = F.mse_loss(F.normalize(theirs.float(), dim=1), F.normalize(teacher.float(), dim=1))
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=2e-2 * theirs.grad.abs().max().item())


def test_all_four_objectives_of_32768_pairs_take_less_than_a_gigabyte():
    (image, text, scale, *teacher), leaves = batch(32768, 512, torch.bfloat16)

    def run():
        terms = similarity_loss(image, text, scale, terms=TERMS, plane=(10.0, -2.0), **dict(zip(TEACHER, teacher)))
        sum(terms.values()).backward()

    run()
    for leaf in leaves:
        leaf.grad = None
    assert cuda_peak_bytes(run) < 1 << 30
