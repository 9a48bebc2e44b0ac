"""Checks of the arguments of similarity_loss that concern it alone, and their normal forms."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from simplclip.ops import checks


def check_offset(label_offset, n, m):
    if isinstance(label_offset, bool) or not isinstance(label_offset, (int, torch.SymInt)):
        raise TypeError(f"label_offset: expected an int, got {type(label_offset).__name__}")
    if not 0 <= label_offset <= m - n:
        raise ValueError(
            f"label_offset: expected 0 <= label_offset <= M - N = {m - n} so that each of {n} rows has its column among {m}, "
            f"got {label_offset}"
        )


def group_ids(ids, text_ids, image, text):
    n, m, device = image.shape[0], text.shape[0], image.device
    if ids is not None:
        ids = checks.group_ids("ids", ids, n, "N", device)
        if text_ids is None and n != m:
            raise ValueError(f"text_ids: expected ids for {m} columns, since M is not N = {n}, got None")
    if text_ids is not None:
        if ids is None:
            raise ValueError("ids: expected ids for the rows beside text_ids, got None")
        text_ids = checks.group_ids("text_ids", text_ids, m, "M", device)
    return ids, text_ids


def place_of_rank(image, text, text_ids, label_offset, group):
    if text.shape[0] != image.shape[0]:
        raise ValueError(
            f"text: expected this rank's {image.shape[0]} rows with group (they are gathered), got {text.shape[0]}"
        )
    if label_offset != 0:
        raise ValueError(f"label_offset: expected 0 with group, which places each rank by itself, got {label_offset}")
    if text_ids is not None:
        raise ValueError("text_ids: expected None with group, where the ids of the texts are those of the images")
    return torch.distributed.get_rank(group) * image.shape[0]


def teacher(teacher_image, teacher_text, teacher_scale, image, text, term, stats):
    names = ("teacher_image", "teacher_text", "teacher_scale")
    for name, value in zip(names, (teacher_image, teacher_text, teacher_scale)):
        if value is None:
            raise ValueError(f"{name}: expected the teacher's, needed by the term {term!r}, got None")
    features = []
    for name, value, of_name, of in ((names[0], teacher_image, "image", image), (names[1], teacher_text, "text", text)):
        checks.features(name, value, "[N, D̂]" if of is image else "[M, D̂]")
        if value.shape[0] != of.shape[0]:
            raise ValueError(f"{name}: expected the {of.shape[0]} rows of {of_name}, got shape {checks.shape_of(value)}")
        if value.device != of.device:
            raise ValueError(f"{name}: expected the device of {of_name}, {of.device}, got {value.device}")
        features.append(value)
    if features[0].shape[1] != features[1].shape[1]:
        raise ValueError(
            f"teacher_text: expected the width of teacher_image, {features[0].shape[1]}, got {features[1].shape[1]}"
        )
    scale = checks.scalar("teacher_scale", teacher_scale, image.device, stats)
    image_features, text_features, scale = (checks.constant(name, t) for name, t in zip(names, (*features, scale)))
    return image_features.to(image.dtype), text_features.to(image.dtype), scale


def projection(kind, projected, student, teacher):
    """The student's features in the teacher's width, or None for the student's own."""
    if projected is None:
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"projected_{kind}: expected {kind} features projected to the teacher's width, {teacher.shape[1]}, since "
                f"{kind} has {student.shape[1]}, got None"
            )
        return None
    checks.features(f"projected_{kind}", projected, "[N, D̂]" if kind == "image" else "[M, D̂]")
    checks.like(f"projected_{kind}", projected, kind, student)
    if projected.shape != teacher.shape:
        raise ValueError(
            f"projected_{kind}: expected the shape of teacher_{kind}, {checks.shape_of(teacher)}, "
            f"got {checks.shape_of(projected)}"
        )
    return projected


def hyperplane(plane, width, device, stats):
    if not isinstance(plane, (tuple, list)) or len(plane) != 2:
        raise ValueError(f"plane: expected (p [] or w [D], q []) for pair matching, got {type(plane).__name__}")
    weight, q = plane
    if isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() > 1:
        if weight.shape[0] != width:
            raise ValueError(f"plane: expected w [D] = [{width}], got shape {checks.shape_of(weight)}")
        checks.floating("plane's w", weight)
        if weight.device != device:
            raise ValueError(f"plane: expected w on the device of image, {device}, got {weight.device}")
        weight = weight.to(stats)
    else:
        weight = checks.scalar("plane's p", weight, device, stats)
    return weight, checks.scalar("plane's q", q, device, stats)


def check_shift(shift, m, device):
    if not isinstance(shift, Tensor):
        if isinstance(shift, bool) or not isinstance(shift, (int, torch.SymInt)):
            raise TypeError(f"shift: expected an int or an int64 tensor with one element, got {shift!r}")
        if not 1 <= shift < max(m, 2):
            raise ValueError(f"shift: expected 1 <= shift < M = {m}, got {shift}")
    elif shift.numel() != 1 or shift.dtype != torch.int64 or shift.device != device:
        raise ValueError(
            f"shift: expected one int64 element on {device}, got {checks.shape_of(shift)} {shift.dtype} on {shift.device}"
        )


def check_terms(terms, known):
    if isinstance(terms, str) or not isinstance(terms, Collection) or not terms:
        raise ValueError(f"terms: expected a tuple of at least one of {', '.join(known)}, got {terms!r}")
    for term in terms:
        checks.choice("terms", term, known)
