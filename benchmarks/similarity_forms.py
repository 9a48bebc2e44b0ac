"""The forms that benchmarks compare: similarity objectives as simplclip, open_clip, torch.compile and others compute them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import apart, attempted, clock_of_steps, figures, interleaved_times, peak_bytes, quantiles
from simplclip.losses import WIKDLoss
from simplclip.ops import similarity_loss
from simplclip.ops.similarity.chunks import stored_rows

OBJECTIVES = ("contrastive", "sigmoid", "all four")
PLANE = (10.0, -2.0)
SCALE = 50.0
CHUNK = 1024  # rows of a chunk in forms of other libraries


@dataclass
class Batch:
    image: Tensor  # [N, D], a leaf
    text: Tensor  # [N, D], a leaf
    scale: Tensor  # [], a leaf
    bias: Tensor  # [], a leaf
    teacher_image: Tensor  # [N, D]
    teacher_text: Tensor  # [N, D]
    teacher_scale: Tensor  # []

    def leaves(self) -> list[Tensor]:
        return [t for t in (getattr(self, f.name) for f in fields(self)) if t.requires_grad]

    def clear(self) -> None:
        for leaf in self.leaves():
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
    unit = lambda: F.normalize(torch.randn(n, d, generator=generator), dim=1)  # noqa: E731
    image = unit()
    text = F.normalize(image + 4 * unit(), dim=1)
    teacher_image, teacher_text = (F.normalize(t + unit(), dim=1) for t in (image, text))
    student = [t.to(device, dtype).requires_grad_() for t in (image, text)]
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (SCALE, -10.0))
    teacher = [t.to(device, dtype) for t in (teacher_image, teacher_text)]
    return Batch(*student, scale, bias, *teacher, torch.tensor(60.0, device=device))


def _ours(terms: tuple[str, ...]) -> Callable[[Batch], Tensor]:
    def run(b: Batch) -> Tensor:
        options = {"plane": PLANE} if "pair_matching" in terms else {}
        if "sigmoid" in terms:
            options["logit_bias"] = b.bias
        weights = dict.fromkeys(terms, 1.0)  # with weights, a sum of sigmoid terms takes one sweep
        return similarity_loss(b.image, b.text, b.scale, terms=terms, weights=weights, **options)["loss"]

    return run


def _wikd_loss(b: Batch) -> Tensor:
    loss = WIKDLoss(interactive_weight=1.0, pm_weight=1.0).to(b.image.device)  # its plane begins as PLANE
    return sum(loss(b.image, b.text, b.scale, b.teacher_image, b.teacher_text, b.teacher_scale))


def _clip_loss(b: Batch) -> Tensor:
    return ClipLoss()(b.image, b.text, b.scale)


class _SigLipLoss(SigLipLoss):
    """SigLipLoss with its sum in float32, since the sum of N² float16 numbers overflows from N = 1,024 on."""

    def _loss(self, image, text, scale, bias=None, negative_only=False):
        logits = self.get_logits(image, text, scale, bias)
        labels = self.get_ground_truth(image.device, image.dtype, len(image), negative_only=negative_only)
        return -F.logsigmoid(labels * logits).sum(dtype=torch.float32) / len(image)


def _siglip_loss(b: Batch) -> Tensor:
    loss = _SigLipLoss() if b.image.dtype == torch.float16 else SigLipLoss()
    return loss(b.image, b.text, b.scale, b.bias)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _siglip_loss_in_chunks(b: Batch) -> Tensor:
    """SigLipLoss(chunk_size=CHUNK) of open_clip's main branch (4.2.0.dev0), which open_clip 3.3 does not have."""
    total = torch.zeros((), device=b.image.device)
    for first in range(0, b.image.shape[0], CHUNK):
        logits = b.scale * b.image[first : first + CHUNK] @ b.text.T
        logits += b.bias
        rows = torch.arange(logits.shape[0], device=logits.device)
        total = total + _sum(F.softplus(logits)) - _sum(logits[rows, first + rows])
    return total / b.image.shape[0]


def _one_product(b: Batch) -> Tensor:
    """The contrastive loss with one matrix product, as torch.compile likes it."""
    logits = b.scale * (b.image @ b.text.T)
    diagonal = logits.diagonal()
    return 0.5 * ((logits.logsumexp(1) - diagonal).mean() + (logits.logsumexp(0) - diagonal).mean())


def _one_product_sigmoid(b: Batch) -> Tensor:
    """The sigmoid loss with three matrix products, as torch.compile likes it."""
    logits = b.scale * (b.image @ b.text.T) + b.bias
    return (_sum(F.softplus(logits)) - _sum(logits.diagonal())) / b.image.shape[0]


def _siglip_kernel_references() -> list[Callable[[Batch], Tensor]]:
    """Returns siglip-kernel's reference, whole and in chunks. Loads its file alone: importing the package needs a GPU."""
    path = Path(importlib.util.find_spec("siglip_kernel").origin).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("siglip_kernel_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [
        lambda b: module.siglip_loss_reference(b.image, b.text, b.scale, b.bias),
        lambda b: module.siglip_loss_chunked_reference(b.image, b.text, b.scale, b.bias, CHUNK),
    ]


def _siglip_kernel(b: Batch) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(b.image, b.text, b.scale.log(), b.bias)


def _memeff(b: Batch) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)(b.image, b.text)


def _inf_clip(b: Batch) -> Tensor:
    from inf_cl import cal_flash_loss

    return 0.5 * (cal_flash_loss(b.image, b.text, scale=b.scale) + cal_flash_loss(b.text, b.image, scale=b.scale))


def _pair_matching(similarity: Tensor) -> Tensor:
    decision = PLANE[0] * similarity + PLANE[1]
    n = similarity.shape[0]
    positive = F.softplus(-decision.diagonal())
    negative = (_sum(F.softplus(decision)) - _sum(F.softplus(decision.diagonal()))) / (n * (n - 1))
    return 0.5 * (positive.mean() + negative)


def _interactive(b: Batch) -> Tensor:
    labels = torch.arange(b.image.shape[0], device=b.image.device)
    by_image = F.cross_entropy(b.scale * b.image @ b.teacher_text.T, labels)
    return 0.5 * (by_image + F.cross_entropy(b.scale * b.text @ b.teacher_image.T, labels))


def _open_clip_all(b: Batch) -> Tensor:
    """Adds open_clip.DistillClipLoss, pair matching over one more product, and cross-entropies across modalities."""
    distilled = DistillClipLoss()(b.image, b.text, b.scale, b.teacher_image, b.teacher_text, b.teacher_scale)
    return sum(distilled) + _pair_matching(b.image @ b.text.T) + _interactive(b)


def _fewest_products_all(b: Batch) -> Tensor:
    """All four terms over one product of each pair of features, as torch.compile likes it."""
    similarity = b.image @ b.text.T
    logits, teacher = b.scale * similarity, b.teacher_scale * (b.teacher_image @ b.teacher_text.T)
    diagonal = logits.diagonal()
    loss = _pair_matching(similarity) + _interactive(b)
    for dim in (0, 1):
        loss = loss + 0.5 * (logits.logsumexp(dim) - diagonal).mean()
        loss = loss - 0.5 * (teacher.softmax(dim) * logits.log_softmax(dim)).sum(dim).mean(dtype=torch.float32)
    return loss


def _products(features: Tensor, terms: tuple[str, ...]) -> float:
    """Returns the matrix products of N·N·D of the terms, forward and backward, with a scalar plane and "infonce".

    Forward and backward of a softmax compute each similarity matrix, but for the rows that a CPU keeps; the gradients of
    image and text need two products more. Each direction of interactive is such a call with one constant side. Sigmoid terms
    that do not join a softmax share three products.
    """
    n, relational = len(features), "relational" in terms
    kept, kept_of_two = (stored_rows(features, n, matrices, None) / n for matrices in (1, 2))
    products = 2 * (2 - kept_of_two) + 2 if relational else 4 - kept if "contrastive" in terms else 0
    alone = relational and features.device.type != "cpu"  # pair matching; on a GPU it joins no sweep with a teacher
    sigmoids = "sigmoid" in terms or "pair_matching" in terms and (alone or not products)
    return products + 3 * sigmoids + 2 * (3 - kept) * ("interactive" in terms)


@dataclass
class Form:
    name: str
    run: Callable[[Batch], Tensor]
    eager: Callable[[Batch], Tensor] | None = None  # matrix products are counted in this form; None: by `_products`
    largest: int = 1 << 62  # largest N for which the form is measured
    terms: tuple[str, ...] = ()
    counted: float | None = None  # the number of matrix products, where it is known
    tf32: bool = False  # the form multiplies float32 as TF32

    def products(self, b: Batch) -> float:
        """Returns the matrix products of N·M·D in a forward and backward; stored rows may save a fraction of one."""
        d = b.image.shape[1]
        if self.counted is not None:
            return self.counted
        if self.eager is None:
            return _products(b.image, self.terms)
        small = batch(64, d, b.image.dtype, b.image.device.type)
        with FlopCounterMode(display=False) as counter:
            small.step(self.eager)
        return counter.get_total_flops() / (2 * 64 * 64 * d)


def forms(objective: str, dtype: str, dense_up_to: int) -> list[Form]:
    """Returns the forms of an objective, simplclip's first. Dense forms hold N×N matrices and run up to N = dense_up_to."""
    on_gpu = torch.cuda.is_available()
    installed = {name for name in ("inf_cl", "memeff", "siglip_kernel") if importlib.util.find_spec(name)}

    def ours(name: str, *terms: str) -> Form:
        return Form(name, _ours(terms), terms=terms)

    def dense(name: str, run: Callable[[Batch], Tensor]) -> Form:
        return Form(name, run, run, dense_up_to)

    def compiled(name: str, run: Callable[[Batch], Tensor]) -> Form:
        return Form(f"torch.compile{name}", torch.compile(run, dynamic=False), run, dense_up_to)

    if objective == "contrastive":
        found = [
            ours("simplclip", "contrastive"),
            ours("simplclip, pair matching too", "contrastive", "pair_matching"),
            dense("open_clip.ClipLoss", _clip_loss),
            compiled(" of open_clip.ClipLoss", _clip_loss),
            compiled(", one product", _one_product),
        ]
        if on_gpu and "inf_cl" in installed:
            found.append(Form("Inf-CLIP, both directions", _inf_clip, counted=10))
        if on_gpu and "memeff" in installed:
            found.append(Form("memeff, no gradient of the scale", _memeff, counted=5, tf32=True))
        return found
    if objective == "sigmoid":
        found = [
            ours("simplclip", "sigmoid"),
            ours("simplclip, pair matching too", "sigmoid", "pair_matching"),
            dense("open_clip.SigLipLoss", _siglip_loss),
            compiled(" of open_clip.SigLipLoss", _siglip_loss),
            dense(f"open_clip's main branch, chunk_size={CHUNK}", _siglip_loss_in_chunks),
            compiled(f" of open_clip's main branch, chunk_size={CHUNK}", _siglip_loss_in_chunks),
            compiled(", three products", _one_product_sigmoid),
        ]
        if "siglip_kernel" in installed:
            whole, in_chunks = _siglip_kernel_references()
            found += [dense("siglip-kernel's reference", whole), dense("siglip-kernel's reference, chunks", in_chunks)]
        if on_gpu and "siglip_kernel" in installed:
            found.append(Form("siglip-kernel", _siglip_kernel, counted=4 if dtype == "float32" else 3, tf32=True))
        return found
    return [
        Form("simplclip", _wikd_loss, terms=("contrastive", "pair_matching", "relational", "interactive")),
        dense("open_clip's losses and KL", _open_clip_all),
        compiled(", fewest products", _fewest_products_all),
    ]


def measure(
    objective: str,
    n: int,
    d: int,
    dtype: str,
    repeats: int,
    device: str = "cpu",
    dense_up_to: int = 1 << 62,
    op: str = "similarity_loss",
    strict: bool = True,
) -> list[dict]:
    """Returns a row of a result file for each form, also for a form that is left out or does not fit. Compares values first.

    strict: any other error, or another value, is raised; else the row says why.
    """
    torch.compiler.reset()  # so that each form is compiled for this size alone
    features = batch(n, d, getattr(torch, dtype), device)
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}

    def first_step(form: Form) -> float:
        if device != "cpu" or form.name.startswith("torch.compile"):
            features.step(form.run)  # compiles or tunes
        features.clear()
        values: list[float] = []
        peaks[form.name] = peak_bytes(lambda: values.append(features.step(form.run).item()), device)
        return values[0]

    def wrong(name: str, value: float, ours: float) -> str:
        tolerance = 1e-4 if dtype == "float32" and not found[name].tf32 else 2e-2
        if "too" in name or abs(value - ours) <= tolerance * max(abs(ours), 1):
            return ""
        return f"{name}: expected the value of simplclip, {ours}, got {value} ({objective}, {n}, {dtype})"

    found: dict[str, Form] = {}
    for form in forms(objective, dtype, dense_up_to):
        if n > form.largest:
            left_out[form.name] = f"left out: N×N matrices of {n * n * features.image.element_size() / 2**30:.3g} GiB each"
        else:
            found[form.name] = form
    first = {name: lambda form=form: first_step(form) for name, form in found.items()}
    values, reasons = attempted(first, wrong, strict=strict)

    cases = {name: lambda form=found[name]: features.step(form.run) for name in values}
    products = three_products(features)
    products()  # the first run of each form was above
    clock, tick = clock_of_steps()
    times = interleaved_times({"products": products, **cases}, repeats, warmup=0, clock=tick, strict=strict)
    reasons |= left_out | times.failed
    one_product = quantiles(times["products"])[1] / 3
    rows = []
    for name in [*found, *left_out]:
        row = {"op": op, "objective": objective, "n": n, "d": d, "dtype": dtype, "form": name, "repeats": repeats}
        if name not in reasons:
            gemms = found[name].products(features)
            row |= figures(times, name) | {
                "gemms": round(gemms, 2),
                "gemm_share": round(gemms * one_product / quantiles(times[name])[1], 2),
                "extra_mib": round(peaks[name] / 2**20, 1),
                "memory_times_ours": round(peaks[name] / peaks["simplclip"], 1) if "simplclip" in peaks else "",
            }
            row |= {} if strict else apart(times, name)
        rows.append({**row, "clock": clock, "note": reasons.get(name, "")})
    return rows


def three_products(b: Batch) -> Callable[[], None]:
    """Returns a function that computes S = X Yᵀ, G Y and Gᵀ X in chunks of 1024 rows and allocates nothing."""
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
