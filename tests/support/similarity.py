"""Inputs of similarity_loss."""

import torch
import torch.nn.functional as F

FEATURES = ("image", "text", "teacher_image", "teacher_text", "projected_image", "projected_text")
TEACHER = ("teacher_image", "teacher_text", "teacher_scale")


def make_inputs(n, m, offset=0, *, terms, plane="scalar", teacher_width=None, ids=False, scale=20.0, width=48, seed=0):
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
        leaves["plane_weight"] = torch.randn(shape, generator=g, dtype=torch.float64) + 3
        leaves["plane_bias"] = number(-1.0)
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
