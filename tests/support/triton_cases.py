"""Cases of the Triton kernels of similarity_loss against the reference in float64; run as a program under the interpreter.

test_similarity_triton starts this file once (see interpreter); the same cases run in its own process on a CUDA device.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from interpreter import main, poisoned
from similarity import check, make_inputs
from tolerance import EPS, assert_within

import simplclip
from simplclip.ops import similarity_loss
from simplclip.ops.calls import flat
from simplclip.ops.similarity import reference as similarity_reference
from simplclip.ops.similarity.call import TERMS, ColumnStat, RowsCall, RowStat, SimilarityCall, SimilarityGradient

GRADIENTS = ("image", "text", "scale", "projected_image", "projected_text", "cross_scale", "plane_weight", "plane_bias")


@dataclass(frozen=True)
class Case:
    softmax: bool = True
    negatives: int = 0
    hadamard: bool = False
    relational: bool = False
    interactive: bool = False
    columns: bool = True
    entropy: float = 1.0
    n: int = 65
    m: int = 65
    offset: int = 0
    width: int = 40
    teacher_width: int = 0  # 0: the student's, and no projections
    ids: bool = True
    scale: float = 20.0
    dtype: torch.dtype = torch.float32
    chunk: int = 64
    backward_chunk: int = 0  # 0: the same
    grad: float = 1.0  # size of the gradients that come in

    def options(self, stored_rows: int = 0) -> tuple:
        """What a SimilarityCall has beside its tensors."""
        names = ("offset", "softmax", "columns", "negatives", "relational", "interactive", "entropy", "chunk")
        return (*(getattr(self, name) for name in names), stored_rows)


MODES = {
    "contrastive": Case(),
    "all": Case(negatives=1),
    "all, hadamard": Case(negatives=1, hadamard=True),
    "hard": Case(negatives=2),
    "hard, hadamard": Case(negatives=2, hadamard=True),
    "only all": Case(softmax=False, negatives=1),
    "only all, hadamard": Case(softmax=False, negatives=1, hadamard=True),
    "relational": Case(relational=True),
    "relational, hard": Case(relational=True, negatives=2),
    "relational, all, hadamard": Case(relational=True, negatives=1, hadamard=True),
    "kl": Case(softmax=False, interactive=True),
    "hard, hadamard, kl": Case(negatives=2, hadamard=True, interactive=True),
    "relational, hard, kl": Case(relational=True, negatives=2, interactive=True),
    "all planes, kl": Case(relational=True, negatives=2, hadamard=True, interactive=True),
}
LARGE = ("hard", "relational, all, hadamard", "all planes, kl")


def cases() -> dict[str, Case]:
    found = {}
    for mode, case in MODES.items():
        found[f"{mode}: 65, ids"] = case
        rectangular = replace(case, n=17, m=70, offset=41, ids=False, chunk=16)
        found[f"{mode}: 17 x 70"] = replace(rectangular, teacher_width=24, width=64) if case.interactive else rectangular
        found[f"{mode}: rows only"] = replace(case, columns=False, n=20, m=33, offset=7)
        for dtype in (torch.float16, torch.bfloat16):
            found[f"{mode}: {dtype}"] = replace(case, n=40, m=66, offset=9, dtype=dtype, chunk=33)
    for mode, n in itertools.product(LARGE, (1, 2, 3)):
        found[f"{mode}: {n}"] = replace(MODES[mode], n=n, m=n)
    for mode in LARGE:
        case = replace(MODES[mode], ids=False)
        found[f"{mode}: 130, 5 chunks"] = replace(case, n=130, m=131, offset=1, chunk=29)
        found[f"{mode}: chunks of 1"] = replace(case, n=5, m=300, offset=200, chunk=1)
        found[f"{mode}: a forward launch per block"] = replace(case, n=100, m=100, chunk=2, backward_chunk=64)
        found[f"{mode}: scale 1000"] = replace(case, scale=1000.0)
        found[f"{mode}: scale -50"] = replace(case, scale=-50.0)
        found[f"{mode}: width 1"] = replace(case, n=9, m=12, offset=2, width=1, teacher_width=3)
        found[f"{mode}: entropy 0"] = replace(case, n=30, m=30, entropy=0.0)
        found[f"{mode}: small gradients in float16"] = replace(case, dtype=torch.float16, grad=1e-5)
    return found


def large_cases() -> dict[str, Case]:
    """Several of a GPU's tiles in each direction; too much for the interpreter."""
    found = {}
    for (mode, case), dtype in itertools.product(MODES.items(), (torch.float32, torch.float16, torch.bfloat16)):
        case = replace(case, n=700, m=1111, offset=300, width=200, dtype=dtype, chunk=256)
        found[f"{mode}: 700 x 1111 {dtype}"] = case
        if mode in LARGE:
            found[f"{mode}: 2048 {dtype}"] = replace(case, n=2048, m=2048, offset=0, width=256, ids=False, chunk=1024)
    return found


def tensors(case: Case, device: str) -> list:
    """The call's 13 tensors, features in the case's dtype."""
    g = torch.Generator().manual_seed(0)

    def features(rows, width):
        return F.normalize(torch.randn(rows, width, generator=g, dtype=torch.float64), dim=1)

    n, m, width, teacher = case.n, case.m, case.width, case.teacher_width or case.width
    image, text = features(n, width), features(m, width)
    window = slice(case.offset, case.offset + n)
    text[window] = F.normalize(text[window] + image, dim=1)
    out = [image, text, torch.tensor(case.scale)] + [None] * 10
    if case.relational or case.interactive:
        out[3:6] = features(n, teacher), features(m, teacher), torch.tensor(30.0)
    if case.interactive:
        out[8] = torch.tensor(25.0)
        if case.teacher_width:
            out[6:8] = features(n, teacher), features(m, teacher)
    if case.negatives:
        weight = torch.randn((width,) if case.hadamard else (), generator=g) + 2
        out[9:11] = weight, torch.tensor(-1.0)
    if case.ids:
        columns = torch.randint(0, max(m // 2, 1), (m,), generator=g) * 10**12
        out[11:13] = columns[window].clone(), columns
    return [t if t is None else t.to(device, case.dtype if t.dtype == torch.float64 else t.dtype) for t in out]


def forward_and_backward(fwd, bwd, case: Case, args: list, grads: tuple, columns: bool) -> dict:
    call = SimilarityCall(*args, *replace(case, columns=columns).options())
    rows, cols, stored = fwd(call)
    call.chunk = case.backward_chunk or case.chunk
    gradients = bwd(SimilarityGradient(*flat(call), *grads, rows, cols, stored, True, True))
    out = {f"rows {stat.name}": rows[stat] for stat in RowStat}
    if case.columns:
        out |= {f"columns {stat.name}": cols[stat] for stat in ColumnStat}
    for name, gradient in zip(GRADIENTS, gradients):
        if gradient.numel():
            out[f"d {name}"] = gradient
    return {name: value.cpu() for name, value in out.items()}


def of_reference(case: Case, args: list, grads: tuple, dtype: torch.dtype) -> dict:
    """The reference with everything in `dtype`, halves too."""
    args = [t if t is None or not t.dtype.is_floating_point else t.to(dtype) for t in args]
    grads = tuple(grad.to(dtype) for grad in grads)
    functions = similarity_reference.similarity_loss_fwd, similarity_reference.similarity_loss_bwd
    with mock.patch.object(similarity_reference, "accumulate_dtype", return_value=dtype):
        return forward_and_backward(*functions, case, args, grads, case.columns)


def without_infinities(results: dict, truth: dict, what: str) -> dict:
    for name, exact in truth.items():
        same = torch.equal(results[name] == -torch.inf, exact == -torch.inf)
        assert same, f"{what}: {name}: -inf (no negatives) in other places than in float64"
    return {name: value.masked_fill(truth[name] == -torch.inf, 0) for name, value in results.items()}


def run(case: Case, device: str) -> None:
    from simplclip.kernels.similarity import op as kernels

    args = tensors(case, device)
    g = torch.Generator().manual_seed(1)
    grads = tuple(case.grad * torch.randn(k, size, generator=g).to(device) for k, size in ((12, case.n), (6, case.m)))
    truth = of_reference(case, args, grads, torch.float64)
    plain = of_reference(case, args, grads, case.dtype)
    launch = kernels.similarity_loss_fwd, kernels.similarity_loss_bwd
    with mock.patch.dict(kernels.MERGE, BLOCK_PARTS=2):  # so that few parts take several rounds
        results = forward_and_backward(*launch, case, args, grads, case.columns)
        again = forward_and_backward(*launch, case, args, grads, case.columns)
    for name, value in results.items():
        assert torch.equal(value, again[name]), f"{name}: a second run gave other values"
    assert all(v.isfinite().all() for k, v in results.items() if "LSE" not in k), "not finite"
    ours, exact = without_infinities(results, truth, "kernel"), without_infinities(truth, truth, "truth")
    # A plain half may overflow or lose rows; then it says nothing about what is allowed.
    # So it does about small gradients, which its range does not hold.
    lost = case.grad != 1
    theirs = {name: exact[name] if lost or not v.isfinite().all() else v for name, v in plain.items()}
    scalars = {k: v for k, v in exact.items() if v.dim() == 0}
    for name, value in scalars.items():  # sums that nearly cancel: relative to what random signs would leave
        allowed = EPS[case.dtype] * max(value.abs().item(), case.grad * (case.n * case.m) ** 0.5)
        assert (ours[name].double() - value).abs() <= allowed, f"{name}: {ours[name]} instead of {value}"
    vectors = [{k: v for k, v in d.items() if k not in scalars} for d in (ours, theirs, exact)]
    assert_within(*vectors, case.dtype)


def end_to_end(device: str) -> None:
    """Values and gradients through the public function, and its result under another backend."""
    g = torch.Generator().manual_seed(3)

    def unit(rows, width):
        return F.normalize(torch.randn(rows, width, generator=g, dtype=torch.float64), dim=1)

    x, y, tx, ty, px, py = unit(21, 12), unit(30, 12), unit(21, 8), unit(30, 8), unit(21, 8), unit(30, 8)
    leaves = {"image": x, "text": y, "projected_image": px, "projected_text": py}
    leaves |= {"logit_scale": torch.tensor(10.0), "interactive_scale": torch.tensor(7.0)}
    leaves |= {"w": torch.rand(12, generator=g) * 4, "q": torch.tensor(-1.0)}

    def call(dtype, interactive, negatives, symmetric):
        args = {k: v.to(device, dtype).detach().clone().requires_grad_() for k, v in leaves.items()}
        plane = args.pop("w"), args.pop("q")
        terms = similarity_loss(
            **args, terms=("contrastive", "pair_matching", "relational", "interactive"), plane=plane,
            negatives=negatives, teacher_image=tx.to(device, dtype), teacher_text=ty.to(device, dtype),
            teacher_scale=9.0, interactive=interactive, label_offset=4, symmetric=symmetric,
        )  # fmt: skip
        sum(terms.values()).backward()
        args |= {"w": plane[0], "q": plane[1]}
        return {**terms, **{k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in args.items()}}

    for interactive, negatives, symmetric in itertools.product(("kl", "infonce"), ("all", "hard"), (True, False)):
        with simplclip.backend("triton"):
            kernel = call(torch.float32, interactive, negatives, symmetric)
        with simplclip.backend("reference"):
            truth, plain = (call(dtype, interactive, negatives, symmetric) for dtype in (torch.float64, torch.float32))
        cpu = [{k: v.detach().cpu() for k, v in d.items()} for d in (kernel, plain, truth)]
        assert_within(*cpu, torch.float32, f"{interactive} {negatives} {symmetric}")


def registration(device: str) -> None:
    """Shapes, dtypes and strides are those that the fake function promises, stored rows included."""
    for case in (MODES["all planes, kl"], replace(MODES["kl"], columns=False)):
        case = replace(case, n=9, m=14, offset=3)
        args = [t if t is None or not t.dtype.is_floating_point else t.requires_grad_() for t in tensors(case, device)]
        torch.library.opcheck(
            torch.ops.simplclip.similarity_loss_fwd, (*args, *case.options(5), "triton"), rtol=1e-4, atol=1e-5,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def not_a_number(device: str) -> None:
    """NaN in a feature reaches the statistics of its row and of every column."""
    from simplclip.kernels.similarity import op as kernels

    case = replace(MODES["relational, all, hadamard"], ids=False)
    args = tensors(case, device)
    args[0][3, 3] = torch.nan
    rows, columns, _ = kernels.similarity_loss_fwd(SimilarityCall(*args, *case.options()))
    for name in ("LSE_STUDENT", "PAIR_MATCHING", "MEAN_STUDENT", "DIAGONAL_STUDENT", "DIAGONAL_HADAMARD"):
        assert rows[RowStat[name]].isnan().nonzero().flatten().tolist() == [3], name
    other = torch.arange(case.m, device=device) != 3
    assert columns[ColumnStat.LSE_STUDENT][other].isnan().all()


def rows_of_constant_keys(device: str) -> None:
    """similarity_rows: statistics and mean keys, whole and in chunks."""
    from simplclip.kernels.similarity.rows import similarity_rows

    for (n, m, offset), dtype, chunk, ids in itertools.product(
        ((1, 1, 0), (3, 3, 0), (65, 130, 31)), (torch.float32, torch.float16, torch.bfloat16), (64, 17), (False, True)
    ):
        case = Case(n=n, m=m, offset=offset, dtype=dtype, ids=ids)
        query, keys, scale, *_, own, other = tensors(case, device)
        results = []
        for function, kind in (
            (similarity_rows, dtype),
            (similarity_reference.similarity_rows, dtype),
            (similarity_reference.similarity_rows, None),
        ):
            wide = [t if kind else t.double() for t in (query, keys, scale)]
            stats, mean_keys = function(RowsCall(*wide, own, other, offset, True, chunk))
            results.append({"lse": stats[0], "positive": stats[1], "mean": mean_keys})
        found = [without_infinities(result, results[2], f"{case}") for result in results]
        assert_within(*({k: v.cpu() for k, v in result.items()} for result in found), dtype, f"{case} chunk {chunk}")
        stats, empty = similarity_rows(RowsCall(query, keys, scale, own, other, offset, False, chunk))
        assert torch.equal(stats[0].cpu(), results[0]["lse"].cpu())
        assert empty.shape == (0, query.shape[1])


def every_subset(device: str, dtype: torch.dtype) -> None:
    """The public function with every subset of terms against the dense losses."""
    subsets = [s for k in range(1, 5) for s in itertools.combinations(TERMS, k)]
    modes = (
        ({"interactive": "infonce", "negatives": "all"}, "scalar"),
        ({"interactive": "kl", "negatives": "hard"}, "hadamard"),
    )
    for terms, (mode, plane) in itertools.product(subsets, modes):
        leaves, options = make_inputs(20, 50, 7, terms=terms, plane=plane, ids=True)
        check(leaves, options | mode, dtype, "triton", device=device)


EXTRA = {
    **{
        f"every subset, {dtype}": partial(every_subset, dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    "end to end": end_to_end,
    "registration": registration,
    "NaN": not_a_number,
    "rows of constant keys": rows_of_constant_keys,
}


def run_named(name: str, device: str) -> None:
    poisoned(EXTRA[name] if name in EXTRA else partial(run, {**cases(), **large_cases()}[name]), device)


if __name__ == "__main__":
    main([*cases(), *EXTRA], run_named)
