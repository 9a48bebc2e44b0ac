"""The similarity objectives as simplclip, open_clip and torch.compile compute them: what the benchmarks compare."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import interleaved_times, peak_bytes, quantiles
from simplclip.ops import similarity_loss
from simplclip.ops.similarity.call import TERMS
from simplclip.ops.similarity.sweep import STORE_BYTES, computes_in, stored_rows

OBJECTIVES = ("contrastive", "all four")
PLANE = (10.0, -2.0)


@dataclass
class Batch:
    image: Tensor  # [N, D], a leaf
    text: Tensor  # [N, D], a leaf
    scale: Tensor  # [], a leaf
    teacher_image: Tensor  # [N, D]
    teacher_text: Tensor  # [N, D]
    teacher_scale: Tensor  # []

    def leaves(self) -> list[Tensor]:
        return [t for t in (getattr(self, f.name) for f in fields(self)) if t.requires_grad]

    def step(self, form: Callable[[Batch], Tensor]) -> Tensor:
        """Forward and backward."""
        for leaf in self.leaves():
            leaf.grad = None
        loss = form(self)
        loss.backward()
        return loss.detach()


def batch(n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """Partly matched unit features, and a teacher's near them."""
    generator = torch.Generator().manual_seed(0)
    unit = lambda: F.normalize(torch.randn(n, d, generator=generator), dim=1)  # noqa: E731
    image = unit()
    text = F.normalize(image + 4 * unit(), dim=1)
    teacher_image, teacher_text = (F.normalize(t + unit(), dim=1) for t in (image, text))
    student = [t.to(device, dtype).requires_grad_() for t in (image, text)]
    scale = torch.tensor(50.0, device=device, requires_grad=True)
    teacher = [t.to(device, dtype) for t in (teacher_image, teacher_text)]
    return Batch(*student, scale, *teacher, torch.tensor(60.0, device=device))


def _ours(terms: tuple[str, ...]) -> Callable[[Batch], Tensor]:
    def run(b: Batch) -> Tensor:
        options = {"plane": PLANE} if "pair_matching" in terms else {}
        if "relational" in terms:
            options |= {
                "teacher_image": b.teacher_image,
                "teacher_text": b.teacher_text,
                "teacher_scale": b.teacher_scale,
                "divergence": "cross_entropy",
            }
        return sum(similarity_loss(b.image, b.text, b.scale, terms=terms, **options).values())

    return run


def _clip_loss(b: Batch) -> Tensor:
    return ClipLoss()(b.image, b.text, b.scale)


def _one_product(b: Batch) -> Tensor:
    """The contrastive loss with one matrix product, as torch.compile likes it."""
    logits = b.scale * (b.image @ b.text.T)
    diagonal = logits.diagonal()
    return 0.5 * ((logits.logsumexp(1) - diagonal).mean() + (logits.logsumexp(0) - diagonal).mean())


def _inf_clip(b: Batch) -> Tensor:
    from inf_cl import cal_flash_loss

    return 0.5 * (cal_flash_loss(b.image, b.text, scale=b.scale) + cal_flash_loss(b.text, b.image, scale=b.scale))


def _pair_matching(similarity: Tensor) -> Tensor:
    decision = PLANE[0] * similarity + PLANE[1]
    n = similarity.shape[0]
    positive = F.softplus(-decision.diagonal())
    negative = (F.softplus(decision).sum() - F.softplus(decision.diagonal()).sum()) / (n * (n - 1))
    return 0.5 * (positive.mean() + negative)


def _interactive(b: Batch) -> Tensor:
    labels = torch.arange(b.image.shape[0], device=b.image.device)
    by_image = F.cross_entropy(b.scale * b.image @ b.teacher_text.T, labels)
    return 0.5 * (by_image + F.cross_entropy(b.scale * b.text @ b.teacher_image.T, labels))


def _open_clip_all(b: Batch) -> Tensor:
    """open_clip.DistillClipLoss, pair matching over one more product, and cross-entropies across modalities."""
    distilled = DistillClipLoss()(b.image, b.text, b.scale, b.teacher_image, b.teacher_text, b.teacher_scale)
    return sum(distilled) + _pair_matching(b.image @ b.text.T) + _interactive(b)


def _fewest_products_all(b: Batch) -> Tensor:
    """All four over one product of each pair of features, as torch.compile likes it."""
    similarity = b.image @ b.text.T
    logits, teacher = b.scale * similarity, b.teacher_scale * (b.teacher_image @ b.teacher_text.T)
    diagonal = logits.diagonal()
    loss = _pair_matching(similarity) + _interactive(b)
    for dim in (0, 1):
        loss = loss + 0.5 * (logits.logsumexp(dim) - diagonal).mean()
        loss = loss - 0.5 * (teacher.softmax(dim) * logits.log_softmax(dim)).sum(dim).mean()
    return loss


def _products(n: int, dtype: torch.dtype, device: str, terms: tuple[str, ...]) -> float:
    """Matrix products of N·N·D in similarity_loss, forward and backward, with a scalar plane and interactive "infonce".

    Forward and backward compute each similarity matrix. The student's gradients need two products, each direction of
    interactive two (similarity_rows). On a CPU stored rows save a part; on a GPU, whose kernels keep tiles in registers, each
    matrix is computed again, including that of "infonce".
    """
    matrices = 1 + ("relational" in terms)
    kept = stored_rows(n, n, computes_in(dtype, device), matrices, STORE_BYTES) / n if device == "cpu" else 0
    return matrices * (2 - kept) + 2 + (4 if device == "cpu" else 6) * ("interactive" in terms)


@dataclass
class Form:
    name: str
    run: Callable[[Batch], Tensor]
    eager: Callable[[Batch], Tensor] | None = None  # whose matrix products are counted; None: the library counts its own
    largest: int = 1 << 62  # largest N it is asked for
    terms: tuple[str, ...] = ()
    counted: float | None = None  # matrix products, where they are known otherwise

    def products(self, b: Batch) -> float:
        """Matrix products of N·M·D in a forward and backward; a part where stored rows save one."""
        n, d = b.image.shape
        if self.counted is not None:
            return self.counted
        if self.eager is None:
            return _products(n, b.image.dtype, b.image.device.type, self.terms)
        small = batch(64, d, b.image.dtype, b.image.device.type)
        with FlopCounterMode(display=False) as counter:
            small.step(self.eager)
        return counter.get_total_flops() / (2 * 64 * 64 * d)


def forms(objective: str, dense_up_to: int) -> list[Form]:
    """simplclip's first. The dense ones hold N×N matrices and run up to N = dense_up_to."""
    if objective == "contrastive":
        found = [
            Form("simplclip", _ours(("contrastive",)), terms=("contrastive",)),
            Form("simplclip, pair matching too", _ours(TERMS[:2]), terms=TERMS[:2]),
            Form("open_clip.ClipLoss", _clip_loss, _clip_loss, dense_up_to),
            Form("torch.compile, one product", torch.compile(_one_product), _one_product, dense_up_to),
        ]
        if torch.cuda.is_available() and importlib.util.find_spec("inf_cl"):
            found.append(Form("Inf-CLIP, both directions", _inf_clip, counted=10))
        return found
    return [
        Form("simplclip", _ours(TERMS[:4]), terms=TERMS[:4]),
        Form("open_clip's losses and KL", _open_clip_all, _open_clip_all, dense_up_to),
        Form("torch.compile, fewest products", torch.compile(_fewest_products_all), _fewest_products_all, dense_up_to),
    ]


def measure(
    objective: str, n: int, d: int, dtype: str, repeats: int, device: str = "cpu", dense_up_to: int = 1 << 62
) -> list[dict]:
    """One row of a result file for each form; a form that does not fit in memory says so. Values are compared first."""
    features = batch(n, d, getattr(torch, dtype), device)
    found, notes = {}, {}
    for form in forms(objective, dense_up_to):
        if n > form.largest:
            continue
        try:
            found[form.name] = form, float(features.step(form.run))
        except torch.OutOfMemoryError:
            notes[form.name] = "out of memory"
            torch.cuda.empty_cache()
    expected = found["simplclip"][1]
    for name, (_, value) in found.items():
        if "too" not in name and abs(value - expected) > (1e-4 if dtype == "float32" else 2e-2) * max(abs(expected), 1):
            raise AssertionError(
                f"{name}: expected the value of simplclip, {expected}, got {value} ({objective}, {n}, {dtype})"
            )

    cases = {name: lambda form=form: features.step(form.run) for name, (form, _) in found.items()}
    times = interleaved_times({"products": three_products(features), **cases}, repeats)
    one_product = quantiles(times["products"])[1] / 3

    def extra(form: Form) -> int:
        for leaf in features.leaves():
            leaf.grad = None
        return peak_bytes(lambda: form.run(features).backward(), device)

    peaks = {name: extra(form) for name, (form, _) in found.items()}
    rows = []
    for name in [*found, *notes]:
        row = {
            "op": "similarity_loss",
            "objective": objective,
            "n": n,
            "d": d,
            "dtype": dtype,
            "form": name,
            "repeats": repeats,
        }
        if name in found:
            p20, p50, p80 = quantiles(times[name])
            gemms = found[name][0].products(features)
            row |= {
                "p20_ms": round(1e3 * p20, 2),
                "p50_ms": round(1e3 * p50, 2),
                "p80_ms": round(1e3 * p80, 2),
                "times_ours": round(p50 / quantiles(times["simplclip"])[1], 2),
                "gemms": round(gemms, 2),
                "gemm_share": round(gemms * one_product / p50, 2),
                "extra_mib": round(peaks[name] / 2**20, 1),
                "memory_times_ours": round(peaks[name] / peaks["simplclip"], 1),
            }
        rows.append({**row, "note": notes.get(name, "")})
    return rows


def three_products(b: Batch) -> Callable[[], None]:
    """S = X Yᵀ, G Y and Gᵀ X over chunks of 1024 rows into memory that is there already: the machine's own rate."""
    x, y = b.image.detach(), b.text.detach()
    rows = min(1024, x.shape[0])
    s, dx, dy = x.new_empty(rows, y.shape[0]), torch.empty_like(x), torch.empty_like(y)

    def run() -> None:
        for first in range(0, x.shape[0] - rows + 1, rows):
            chunk = x[first : first + rows]
            torch.mm(chunk, y.T, out=s)
            torch.mm(s, y, out=dx[first : first + rows])
            torch.mm(s.T, chunk, out=dy)

    return run
