"""Similarity objectives as simplclip, open_clip, torch.compile and others compute them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor

from benchmarks.measure import BASE, compare, peak_mib
from simplclip.losses import WIKDLoss
from simplclip.ops import similarity_loss
from simplclip.ops.similarity.chunks import stored_rows, sweep_rows

OBJECTIVES = ("contrastive", "sigmoid", "all four")
PLANE = (10.0, -2.0)
SCALE = 50.0
CHUNK = 1024  # rows of a chunk in forms of other libraries
PRODUCTS = "three products"  # S = X Yᵀ, G Y and Gᵀ X alone
TORCH = "torch's linear_cross_entropy in chunks"  # of torch 2.13 or later
ALL_ROWS = 1 << 40  # a store_bytes that holds all rows of a matrix


@dataclass
class Batch:
    image: Tensor  # [N, D], a leaf
    text: Tensor  # [N, D], a leaf
    scale: Tensor  # [], a leaf
    bias: Tensor  # [], a leaf
    teacher_image: Tensor  # [N, D]
    teacher_text: Tensor  # [N, D]
    teacher_scale: Tensor  # []

    def clear(self) -> None:
        for leaf in (self.image, self.text, self.scale, self.bias):
            leaf.grad = None

    def step(self, form: Callable[[Batch], Tensor]) -> Tensor:
        """Runs forward and backward. Returns the loss."""
        self.clear()
        loss = form(self)
        loss.backward()
        return loss.detach()


def batch(n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """Makes partly matched unit features, and features of a teacher near them."""
    generator = torch.Generator().manual_seed(0)

    def unit() -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator), dim=1)

    image = unit()
    text = F.normalize(image + 4 * unit(), dim=1)
    teacher_image, teacher_text = (F.normalize(t + unit(), dim=1) for t in (image, text))
    student = [t.to(device, dtype).requires_grad_() for t in (image, text)]
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    teacher = [t.to(device, dtype) for t in (teacher_image, teacher_text)]
    return Batch(*student, scale, bias, *teacher, torch.tensor(60.0, device=device))


def _ours(terms: tuple[str, ...], store_bytes: int | None = None) -> Callable[[Batch], Tensor]:
    def run(b: Batch) -> Tensor:
        options: dict[str, Any] = {"store_bytes": store_bytes}
        if "pair_matching" in terms:
            options["plane"] = PLANE
        if "sigmoid" in terms:
            options["logit_bias"] = b.bias
        weights = dict.fromkeys(terms, 1.0)  # with weights, a sum of sigmoid terms takes one sweep
        options |= {"terms": terms, "weights": weights}
        return similarity_loss(b.image, b.text, b.scale, **options)["loss"]

    return run


def _wikd_loss(b: Batch) -> Tensor:
    # its plane begins as PLANE
    loss = WIKDLoss(interactive_weight=1.0, pm_weight=1.0).to(b.image.device)
    return sum(loss(b.image, b.text, b.scale, b.teacher_image, b.teacher_text, b.teacher_scale))


def _clip_loss(b: Batch) -> Tensor:
    return ClipLoss()(b.image, b.text, b.scale)


def _siglip_loss(b: Batch) -> Tensor:  # in float16 its sum overflows from N = 1,024 on
    return SigLipLoss()(b.image, b.text, b.scale, b.bias)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _siglip_loss_in_chunks(b: Batch) -> Tensor:
    """SigLipLoss(chunk_size=CHUNK) of open_clip's main branch (4.2.0.dev0), not in 3.3."""
    total = torch.zeros((), device=b.image.device)
    for first in range(0, b.image.shape[0], CHUNK):
        logits = b.scale * b.image[first : first + CHUNK] @ b.text.T
        logits += b.bias
        rows = torch.arange(logits.shape[0], device=logits.device)
        total = total + _sum(F.softplus(logits)) - _sum(logits[rows, first + rows])
    return total / b.image.shape[0]


def linear_cross_entropy(image: Tensor, text: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """The contrastive loss by torch's linear_cross_entropy in chunks, one call a direction.

    options: those of torch.nn.LinearCrossEntropyOptions.
    """
    labels = torch.arange(image.shape[0], device=image.device)
    chunks = torch.nn.LinearCrossEntropyOptions(**options)
    scale = scale.to(image.dtype)
    by_image = F.linear_cross_entropy(scale * image, text, labels, options=chunks)
    return 0.5 * (by_image + F.linear_cross_entropy(scale * text, image, labels, options=chunks))


def _of_torch(parts: int) -> Callable[[Batch], Tensor]:
    """The same with chunks of a fraction of the default's rows."""
    method = f"aspect_ratio:{parts}"
    return lambda b: linear_cross_entropy(b.image, b.text, b.scale, chunking_method=method)


def _one_product(b: Batch) -> Tensor:
    """The contrastive loss with one matrix product, as torch.compile likes it."""
    logits = b.scale * (b.image @ b.text.T)
    diagonal = logits.diagonal()
    return 0.5 * ((logits.logsumexp(1) - diagonal).mean() + (logits.logsumexp(0) - diagonal).mean())


def _one_product_sigmoid(b: Batch) -> Tensor:
    """The sigmoid loss with three matrix products, as torch.compile likes it."""
    logits = b.scale * (b.image @ b.text.T) + b.bias
    return (_sum(F.softplus(logits)) - _sum(logits.diagonal())) / b.image.shape[0]


def _siglip_kernel(b: Batch) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(b.image, b.text, b.scale.log(), b.bias)


def _memeff(b: Batch) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)(b.image, b.text)


def pair_matching(similarity: Tensor, weight: Tensor | float, bias: Tensor | float) -> Tensor:
    """Computes the pair matching loss of a dense matrix [N, N]."""
    decision = weight * similarity + bias
    n = similarity.shape[0]
    positive = F.softplus(-decision.diagonal())
    negative = (_sum(F.softplus(decision)) - _sum(F.softplus(decision.diagonal()))) / (n * (n - 1))
    return 0.5 * (positive.mean() + negative)


def _interactive(b: Batch) -> Tensor:
    labels = torch.arange(b.image.shape[0], device=b.image.device)
    by_image = F.cross_entropy(b.scale * b.image @ b.teacher_text.T, labels)
    return 0.5 * (by_image + F.cross_entropy(b.scale * b.text @ b.teacher_image.T, labels))


def _open_clip_all(b: Batch) -> Tensor:
    """open_clip.DistillClipLoss, pair matching by one more product, and the interactive term."""
    student = b.image, b.text, b.scale
    teacher = b.teacher_image, b.teacher_text, b.teacher_scale
    distilled = sum(DistillClipLoss()(*student, *teacher))
    return distilled + pair_matching(b.image @ b.text.T, *PLANE) + _interactive(b)


def _fewest_products_all(b: Batch) -> Tensor:
    """All four terms over one product of each pair of features, as torch.compile likes it."""
    similarity = b.image @ b.text.T
    logits, teacher = b.scale * similarity, b.teacher_scale * (b.teacher_image @ b.teacher_text.T)
    diagonal = logits.diagonal()
    loss = pair_matching(similarity, *PLANE) + _interactive(b)
    for dim in (0, 1):
        loss = loss + 0.5 * (logits.logsumexp(dim) - diagonal).mean()
        products = teacher.softmax(dim) * logits.log_softmax(dim)
        loss = loss - 0.5 * products.sum(dim).mean(dtype=torch.float32)
    return loss


def _products(features: Tensor, terms: tuple[str, ...]) -> float:
    """Returns the matrix products of N·N·D of the terms, forward and backward, with defaults.

    Forward and backward of a softmax compute each similarity matrix, but for the rows that a CPU
    keeps; the gradients of image and text need two products more. Each direction of interactive is
    such a call with one constant side. Sigmoid terms that do not join a softmax share three
    products.
    """
    n = len(features)

    def kept(matrices: int) -> float:
        """Returns the share of the rows that forward keeps."""
        chunk = sweep_rows(features, n, matrices, None, keeps=True)
        return stored_rows(features, n, matrices, None, chunk) / n

    joins_softmax = "contrastive" in terms
    products = 0.0
    if "relational" in terms:
        products = 2 * (2 - kept(2)) + 2
        joins_softmax = features.device.type == "cpu"  # a GPU has no such sweep with a teacher
    elif "contrastive" in terms:
        products = 4 - kept(1)
    separate_matching = "pair_matching" in terms and not joins_softmax
    if "sigmoid" in terms or separate_matching:
        products += 3
    if "interactive" in terms:
        products += 2 * (3 - kept(1))
    return products


@dataclass
class Form:
    name: str
    run: Callable[[Batch], Tensor]
    # matrix products of N·N·D, forward and backward; None: as `_products` says of the terms
    products: float | None = None
    terms: tuple[str, ...] = ()
    dense: bool = False  # holds N×N matrices
    tf32: bool = False  # multiplies float32 as TF32


def forms(objective: str, dtype: str) -> list[Form]:
    """Returns the forms of an objective, simplclip's first."""

    def ours(name: str, *terms: str) -> Form:
        return Form(name, _ours(terms), terms=terms)

    def dense(name: str, run: Callable[[Batch], Tensor], products: int) -> Form:
        return Form(name, run, products, dense=True)

    def compiled(name: str, run: Callable[[Batch], Tensor], products: int) -> Form:
        return dense(f"torch.compile{name}", torch.compile(run, dynamic=False), products)

    def on_gpu(
        package: str, name: str, run: Callable[[Batch], Tensor], products: int
    ) -> list[Form]:
        if not torch.cuda.is_available() or importlib.util.find_spec(package) is None:
            return []
        return [Form(name, run, products, tf32=True)]

    if objective == "contrastive":
        in_chunks = []
        if hasattr(F, "linear_cross_entropy"):
            in_chunks = [Form(TORCH, _of_torch(1), 6)]
            in_chunks += [Form(f"{TORCH}, a quarter of the rows", _of_torch(4), 6)]
        return [
            ours(BASE, "contrastive"),
            ours(f"{BASE}, pair matching too", "contrastive", "pair_matching"),
            Form(f"{BASE}, no rows kept", _ours(("contrastive",), 0), 4),
            Form(f"{BASE}, all rows kept", _ours(("contrastive",), ALL_ROWS), 3),
            *in_chunks,
            dense("open_clip.ClipLoss", _clip_loss, 6),
            compiled(" of open_clip.ClipLoss", _clip_loss, 6),
            compiled(", one product", _one_product, 3),
            *on_gpu("memeff", "memeff, no gradient of the scale", _memeff, 5),
        ]
    if objective == "sigmoid":
        chunks = f"open_clip's main branch, chunk_size={CHUNK}"
        siglip_kernel_products = 4 if dtype == "float32" else 3
        return [
            ours(BASE, "sigmoid"),
            ours(f"{BASE}, pair matching too", "sigmoid", "pair_matching"),
            dense("open_clip.SigLipLoss", _siglip_loss, 3),
            compiled(" of open_clip.SigLipLoss", _siglip_loss, 3),
            dense(chunks, _siglip_loss_in_chunks, 3),
            compiled(f" of {chunks}", _siglip_loss_in_chunks, 3),
            compiled(", three products", _one_product_sigmoid, 3),
            *on_gpu("siglip_kernel", "siglip-kernel", _siglip_kernel, siglip_kernel_products),
        ]
    return [
        Form(BASE, _wikd_loss, terms=("contrastive", "pair_matching", "relational", "interactive")),
        dense("open_clip's losses and KL", _open_clip_all, 15),
        compiled(", fewest products", _fewest_products_all, 8),
    ]


@dataclass
class Problem:
    """What all forms compute; its fields are columns of a result file."""

    op: str
    objective: str
    n: int
    d: int
    dtype: str


def measure(
    problem: Problem, dense_up_to: int, device: str, repeats: int, strict: bool = True
) -> list[dict]:
    """Returns a row of a result file for each form, also if it is left out or does not fit.

    Dense forms are measured up to N = dense_up_to. strict: as for `compare`.
    """
    torch.compiler.reset()  # so that each form is compiled for this size alone
    objective, n, dtype = problem.objective, problem.n, problem.dtype
    features = batch(n, problem.d, getattr(torch, dtype), device)
    every_form = {form.name: form for form in forms(objective, dtype)}
    used = {name: form for name, form in every_form.items() if n <= dense_up_to or not form.dense}
    peaks: dict[str, float] = {}

    def first_step(form: Form) -> float:
        if device != "cpu" or form.name.startswith("torch.compile"):
            features.step(form.run)  # compiles or tunes
        features.clear()
        values: list[float] = []
        peaks[form.name] = peak_mib(lambda: values.append(features.step(form.run).item()), device)
        return values[0]

    def wrong(name: str, value: float, ours: float) -> str:
        if name == PRODUCTS or "too" in name:
            return ""
        tolerance = 1e-4 if dtype == "float32" and not used[name].tf32 else 2e-2
        if name.startswith(TORCH) and dtype != "float32":
            tolerance = 0.1  # of 16,384 pairs, small chunks lose 5 % in bfloat16
        if abs(value - ours) <= tolerance * max(abs(ours), 1):
            return ""
        return (
            f"{name}: expected the value of {BASE}, {ours}, got {value} ({objective}, {n}, {dtype})"
        )

    products = three_products(features)
    what = asdict(problem)
    cases: dict[str, Callable[[], Any]] = {PRODUCTS: products}
    first = dict(cases)
    for name, form in used.items():
        cases[name] = partial(features.step, form.run)
        first[name] = partial(first_step, form)
    products_row, *rows = compare(
        what, cases, repeats, first=first, wrong=wrong, warmup=0, strict=strict
    )
    for row in rows:
        name = row["form"]
        if "p50_ms" in row:
            gemms = used[name].products
            if gemms is None:
                gemms = _products(features.image, used[name].terms)
            row["gemms"] = round(gemms, 2)
            row["gemm_share"] = round(gemms * products_row["p50_ms"] / 3 / row["p50_ms"], 2)
            row["extra_mib"] = round(peaks[name], 1)
            row["memory_times_ours"] = ""
            if BASE in peaks:
                row["memory_times_ours"] = round(peaks[name] / peaks[BASE], 1)
    size = n * n * features.image.element_size() / 2**30
    note = {"note": f"left out: N×N matrices of {size:.3g} GiB each"}
    return rows + [{**what, "form": name, **note} for name in every_form if name not in used]


def three_products(b: Batch) -> Callable[[], None]:
    """Returns a function that computes S = X Yᵀ, G Y and Gᵀ X in chunks and allocates nothing."""
    x, y = b.image.detach(), b.text.detach()
    rows = min(1024, x.shape[0])
    s = x.new_empty(rows, y.shape[0])
    dx = torch.empty_like(x)
    dy = torch.empty_like(y)

    def run() -> None:
        for first in range(0, x.shape[0] - rows + 1, rows):
            chunk = x[first : first + rows]
            torch.mm(chunk, y.T, out=s)
            torch.mm(s, y, out=dx[first : first + rows])
            torch.mm(s.T, chunk, out=dy)

    return run
