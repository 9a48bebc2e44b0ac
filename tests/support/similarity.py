"""Inputs of the tests of similarity_loss, and the comparison of a backend with the dense losses."""

import plain
import torch
import torch.nn.functional as F
from tolerance import assert_within

import simplclip
from simplclip.ops import similarity_loss

WIDTH = 48
FEATURES = ("image", "text", "teacher_image", "teacher_text", "projected_image", "projected_text")
TEACHER = ("teacher_image", "teacher_text", "teacher_scale")


def make_inputs(n, m, offset=0, *, terms, plane="scalar", teacher_width=None, ids=False, scale=20.0, width=WIDTH, seed=0):
    """Float64 leaves by argument name (the plane as plane_weight, plane_bias) and options: partly matched unit features."""
    g = torch.Generator().manual_seed(seed)

    def features(d, noise, base=None):
        image = torch.randn(n, d, generator=g, dtype=torch.float64)
        text = torch.randn(m, d, generator=g, dtype=torch.float64)
        if base is not None:
            image, text = base[0] + noise * image, base[1] + noise * text
        text[offset : offset + n] += 4 * F.normalize(image, dim=1)
        return F.normalize(image, dim=1), F.normalize(text, dim=1)

    number = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    image, text = features(width, 0)
    leaves = {"image": image, "text": text, "logit_scale": number(scale)}
    if "pair_matching" in terms:
        shape = (width,) if plane == "hadamard" else ()
        leaves |= {
            "plane_weight": torch.randn(shape, generator=g, dtype=torch.float64) + 3,
            "plane_bias": number(-1.0),
        }
    if {"relational", "interactive"} & set(terms):
        teacher = features(teacher_width or width, 0.5, None if teacher_width else (image, text))
        leaves |= dict(zip(TEACHER, (*teacher, number(1.4 * scale))))
    if "interactive" in terms:
        leaves["interactive_scale"] = number(0.8 * scale)
        if teacher_width:
            leaves |= dict(zip(FEATURES[4:], features(teacher_width, 0.5, teacher)))
    options = {"terms": tuple(terms), "label_offset": offset}
    if ids:
        columns = torch.randint(0, max(m // 2, 1), (m,), generator=g) * 10**12
        options |= {"ids": columns[offset : offset + n].clone(), "text_ids": columns}
    return leaves, options


def values_and_grads(function, leaves, dtype, weights=(1.3, 0.7, 0.9, 1.1), device="cpu", **options):
    """Every term and every gradient of their weighted sum, on the CPU. Features in `dtype`, parameters in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args = {k: v.to(device, dtype if k in FEATURES else wide).detach() for k, v in leaves.items()}
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    for name, value in args.items():
        value.requires_grad_(name not in TEACHER)
    named = dict(args)
    if "plane_weight" in named:
        named["plane"] = (named.pop("plane_weight"), named.pop("plane_bias"))
    terms = function(**named, **options)
    sum(w * t for w, t in zip(weights, terms.values())).backward()
    grads = {f"d_{k}": torch.zeros_like(v) if v.grad is None else v.grad for k, v in args.items() if k not in TEACHER}
    return {k: v.detach().cpu() for k, v in {**terms, **grads}.items()}


def check(leaves, options, dtype, backend, device="cpu", **kernel_options):
    with simplclip.backend(backend):
        kernel = values_and_grads(similarity_loss, leaves, dtype, device=device, **options, **kernel_options)
    # Halves are compared with plain torch on the same rounded inputs, and with float64 on them.
    rounded = {k: v.to(dtype).double() if k in FEATURES else v.float().double() for k, v in leaves.items()}
    truth = values_and_grads(plain.similarity_loss, rounded, torch.float64, **options)

    def plain_form(**args):
        narrow = lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
        args = {k: tuple(map(narrow, v)) if k == "plane" else narrow(v) for k, v in args.items()}
        return plain.similarity_loss(**args)

    naive = values_and_grads(plain_form, leaves, dtype, **options)
    assert_within(kernel, naive, truth, dtype, f"{backend} {dtype} {options['terms']}")
