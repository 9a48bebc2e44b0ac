"""The terms of similarity_loss that have a teacher, alone and with the others, over every backend."""

import itertools

import pytest
import torch
from devices import BACKENDS, DTYPES, needs_cpu_kernels
from open_clip.loss import DistillClipLoss
from similarity import check, make_inputs, values_and_grads

import simplclip
from simplclip.ops import similarity_loss
from simplclip.ops.similarity.call import TERMS

SUBSETS = [s for k in range(1, 5) for s in itertools.combinations(TERMS, k) if {"relational", "interactive"} & set(s)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_every_subset_of_terms(terms, dtype, backend):
    for n, interactive, divergence in ((1, "kl", "kl"), (17, "kl", "cross_entropy"), (70, "infonce", "kl"), (70, "kl", "kl")):
        if "interactive" not in terms and interactive == "kl" and n == 70:
            continue
        leaves, options = make_inputs(n, n, terms=terms)
        check(leaves, {**options, "interactive": interactive, "divergence": divergence}, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interactive", ["infonce", "kl"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rectangular_with_ids_a_wider_teacher_and_a_hadamard_plane(symmetric, interactive, backend):
    for (n, m, offset), negatives in itertools.product(((1, 2, 1), (65, 130, 0), (100, 333, 57)), ("all", "hard", "shift")):
        leaves, options = make_inputs(n, m, offset, terms=TERMS, plane="hadamard", teacher_width=31, ids=True)
        options |= {"symmetric": symmetric, "interactive": interactive, "negatives": negatives}
        check(leaves, options, torch.float32, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interactive", ["infonce", "kl"])
@needs_cpu_kernels
def test_chunks_and_stored_rows_change_nothing(interactive, dtype):
    leaves, options = make_inputs(300, 310, 7, terms=TERMS, ids=True, teacher_width=20)
    row = 310 * (4 if dtype == torch.float16 else dtype.itemsize)
    for scratch, store in ((0, 0), (128 * row, 0), (128 * row, 64 * row), (128 * row, 192 * row), (1 << 20, 1 << 20)):
        check(leaves, {**options, "interactive": interactive}, dtype, "cpu", scratch_bytes=scratch, store_bytes=store)


@needs_cpu_kernels
@pytest.mark.parametrize("scale", [0.01, 100.0, 700.0, -50.0])
def test_wide_logits(scale):
    """Statistics that lie too far apart for one exponential to serve rows and columns, and columns that underflow."""
    leaves, options = make_inputs(150, 150, terms=TERMS, scale=scale)
    leaves["image"][::3] *= 3
    leaves["teacher_image"][::4] *= 3
    options["divergence"] = "kl" if scale > 1 else "cross_entropy"  # a tiny KL is the difference of two large numbers
    for interactive in ("infonce", "kl"):
        check(leaves, {**options, "interactive": interactive}, torch.float32, "cpu")


@needs_cpu_kernels
@pytest.mark.parametrize("n", [4, 40, 100])
def test_columns_far_below_their_strip_are_summed_afresh(n):
    """One teacher's logit of 300: against it every exponential of the other columns underflows."""
    leaves, options = make_inputs(n, n, terms=("relational", "interactive"), width=n, scale=1.0)
    leaves["teacher_text"] = torch.eye(n, dtype=torch.float64)
    leaves["teacher_image"] = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves["teacher_image"][0, 1] = 300
    check(leaves, {**options, "interactive": "kl"}, torch.float32, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ids_equal_leaves_no_negatives(backend):
    leaves, options = make_inputs(20, 20, terms=TERMS)
    options |= {"ids": torch.zeros(20, dtype=torch.int64), "text_ids": torch.zeros(20, dtype=torch.int64)}
    for interactive in ("infonce", "kl"):
        with simplclip.backend(backend):
            out = values_and_grads(similarity_loss, leaves, torch.float32, interactive=interactive, **options)
        assert out["contrastive"] == out["relational"] == out["interactive"] == 0
        assert all(v.isfinite().all() for v in out.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_clips_distillation(backend):
    leaves, _ = make_inputs(50, 50, terms=("relational",))
    args = [leaves[k] for k in ("image", "text", "logit_scale", "teacher_image", "teacher_text", "teacher_scale")]
    theirs = DistillClipLoss()(*args, output_dict=True)
    options = {"terms": ("contrastive", "relational"), "divergence": "cross_entropy"}
    with simplclip.backend(backend):
        ours = values_and_grads(similarity_loss, leaves, torch.float32, **options)
    torch.testing.assert_close(ours["contrastive"].double(), theirs["contrastive_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["relational"].double(), theirs["distill_loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_equal_to_its_teacher_has_no_divergence(backend):
    leaves, options = make_inputs(40, 40, terms=("relational",))
    leaves |= {"teacher_image": leaves["image"], "teacher_text": leaves["text"], "teacher_scale": leaves["logit_scale"]}
    with simplclip.backend(backend):
        out = values_and_grads(similarity_loss, leaves, torch.float32, **options)
    assert out["relational"].abs() < 1e-6
    assert out["d_image"].abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_is_never_read(backend):
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for plane, interactive in itertools.product(("scalar", "hadamard"), ("infonce", "kl")):
            leaves, options = make_inputs(70, 90, 11, terms=TERMS, plane=plane)
            check(leaves, {**options, "interactive": interactive}, torch.bfloat16, backend, scratch_bytes=0)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cpu_kernels
def test_runs_are_identical():
    leaves, options = make_inputs(300, 300, terms=TERMS, ids=True)
    for dtype in DTYPES:
        runs = [values_and_grads(similarity_loss, leaves, dtype, interactive="kl", **options) for _ in range(2)]
        for name in runs[0]:
            assert torch.equal(runs[0][name], runs[1][name]), name


@pytest.mark.parametrize("interactive", ["infonce", "kl"])
def test_reference_gradcheck(interactive):
    leaves, options = make_inputs(5, 7, 2, terms=TERMS, teacher_width=4, ids=True, width=6, scale=4.0)
    names = [name for name in leaves if not name.startswith("teacher")]

    def run(*values):
        args = {**leaves, **dict(zip(names, values))}
        args["plane"] = (args.pop("plane_weight"), args.pop("plane_bias"))
        with simplclip.backend("reference"):
            return tuple(similarity_loss(**args, **options, interactive=interactive).values())

    assert torch.autograd.gradcheck(run, [leaves[name].clone().requires_grad_() for name in names])


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, interactive):
    leaves, _ = make_inputs(9, 12, 2, terms=TERMS, teacher_width=11)
    args = {k: v.float().requires_grad_(not k.startswith("teacher")) for k, v in leaves.items()}
    names = ("image", "text", "logit_scale", "teacher_image", "teacher_text", "teacher_scale", "projected_image",
             "projected_text", "interactive_scale", "plane_weight", "plane_bias")  # fmt: skip
    tensors = [args[name] if interactive or i not in (6, 7, 8) else None for i, name in enumerate(names)]
    for columns, stored in ((True, 0), (True, 9), (False, 9)):
        torch.library.opcheck(
            torch.ops.simplclip.similarity_loss_fwd,
            (*tensors, torch.arange(9), torch.arange(12), 2, True, columns, 1, True, interactive, 1.0, 64, stored, backend),
            rtol=1e-4,
            atol=1e-5,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_rows(backend):
    leaves, _ = make_inputs(9, 12, 2, terms=("relational",))
    query, keys, scale = (leaves[name].float() for name in ("image", "teacher_text", "logit_scale"))
    ids = torch.arange(9), torch.arange(12)
    args = (query.requires_grad_(), keys, scale.requires_grad_(), *ids, 2)
    torch.library.opcheck(torch.ops.simplclip.similarity_rows, (*args, True, 64, backend), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.simplclip.similarity_rows,
            (*args, False, 64, backend),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_interactive_uses_the_logit_scale_where_it_has_none_of_its_own():
    leaves, options = make_inputs(20, 20, terms=("interactive",))
    leaves.pop("interactive_scale")
    check(leaves, options, torch.float32, "reference")
    assert "d_logit_scale" in values_and_grads(similarity_loss, leaves, torch.float32, **options)


@pytest.mark.slow
@pytest.mark.instruction_set
@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(dtype):
    for (n, m, offset), interactive in itertools.product(((3, 3, 0), (70, 97, 5)), ("infonce", "kl")):
        leaves, options = make_inputs(n, m, offset, terms=TERMS, ids=n > 3)
        check(leaves, {**options, "interactive": interactive}, dtype, "cpu")
