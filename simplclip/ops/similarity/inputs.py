"""Checks the arguments of similarity_loss and of the losses, and makes tensors of numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simplclip.common.terms import TEACHER_TERMS
from simplclip.ops import checks, distributed

NAMES = {name: name for name in ("image", "text", "teacher_image", "teacher_text", "teacher_scale")}


def checked_terms(terms: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the terms as a tuple. Raises ValueError unless they are some of these names."""
    if not isinstance(terms, (tuple, list, set)) or not terms or not set(names).issuperset(terms):
        raise ValueError(
            f"terms: expected a tuple of at least one of {', '.join(names)}, got {terms!r}"
        )
    return tuple(terms)


def check_budgets(**budgets: Any) -> None:
    """Raises ValueError if a budget of memory is neither None nor a number of bytes."""
    for name, value in budgets.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a number of bytes, 0 or more, got {value!r}")


def check_weights(weights: Any, terms: Collection[str]) -> dict[str, float]:
    """Returns the weights by term as finite floats; raises an error unless each has one."""
    if not isinstance(weights, Mapping) or weights.keys() != set(terms):
        raise ValueError(
            f"weights: expected a number for each of the terms {', '.join(terms)}, got {weights!r}"
        )
    numbers = dict(weights)
    for term, weight in weights.items():
        if type(weight) is not float or not abs(weight) < math.inf:
            numbers[term] = checks.number(f"weights[{term!r}]", weight)
    return numbers


def check_features(
    names: Mapping[str, str], image: Tensor, text: Tensor, *, equal_rows: bool = False
) -> None:
    """Raises an error if image and text features differ in width, dtype, device (or rows)."""
    if equal_rows and len(text) != len(image):
        got = checks.shape_of(text)
        if len(text) > len(image):
            got += (
                f"; with k captions an image, pass {names['image']}.repeat_interleave(k, 0), and "
                "ids equal for an image"
            )
        raise ValueError(
            f"{names['text']}: expected the {len(image)} rows of {names['image']}, got shape {got}"
        )
    checks.check_like(names["text"], text, names["image"], image)
    if text.shape[1] != image.shape[1]:
        raise ValueError(
            f"{names['text']}: expected the width of {names['image']}, {image.shape[1]}, got "
            f"{text.shape[1]}"
        )


def why_teacher(terms: Iterable[str]) -> str:
    """Returns why the terms, one of which needs a teacher, need it: a clause for errors."""
    term = next(term for term in terms if term in TEACHER_TERMS)
    return f"the term {term!r} needs it"


def checked_teacher(
    names: Mapping[str, str],
    image: Tensor,
    text: Tensor,
    teacher: Sequence[Any],
    why: str,
    needs_scale: bool = True,
) -> list[Any]:
    """Returns a teacher's image and text features and scale [], checked and detached.

    The scale is in the dtype of sums. image, text: the student's. why: the reason in the ValueError
    for a value that is None, of the scale only if needs_scale.
    """
    of_image, of_text, scale = teacher
    values: dict[str, Any] = {names["teacher_image"]: of_image, names["teacher_text"]: of_text}
    if needs_scale:
        values[names["teacher_scale"]] = scale
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name}: expected a value, since {why}, got None")
    _check_teacher(names["teacher_image"], of_image, "[N, D̂]", names["image"], image)
    _check_teacher(names["teacher_text"], of_text, "[M, D̂]", names["text"], text)
    if of_text.size(1) != of_image.size(1):
        raise ValueError(
            f"{names['teacher_text']}: expected the width of {names['teacher_image']}, "
            f"{of_image.size(1)}, got {of_text.size(1)}"
        )
    if scale is not None:
        wide = torch.promote_types(text.dtype, torch.float32)
        scale = checks.scalar(names["teacher_scale"], scale, text.device, wide)
        scale = checks.constant(names["teacher_scale"], scale)
    return [
        checks.constant(names["teacher_image"], of_image),
        checks.constant(names["teacher_text"], of_text),
        scale,
    ]


def _check_teacher(
    name: str, features: Tensor, letters: str, student_name: str, student: Tensor
) -> None:
    """Raises an error unless the teacher's features have the student's rows and device."""
    checks.check_features(name, features, letters)
    if features.size(0) != student.size(0):
        raise ValueError(
            f"{name}: expected the {student.shape[0]} rows of {student_name}, got shape "
            f"{checks.shape_of(features)}"
        )
    if features.device != student.device:
        checks.check_device(name, features, student_name, student.device)


def checked_plane(plane: Any, image: Tensor) -> tuple[Tensor, Tensor]:  # [], []
    """Returns p and q of the plane, checked, in the dtype of sums."""
    wide = torch.promote_types(image.dtype, torch.float32)
    if not isinstance(plane, (tuple, list)) or len(plane) != 2:
        raise ValueError(
            f"plane: expected (p [], q []) for pair matching, got {type(plane).__name__}"
        )
    weight, bias = plane
    return (
        checks.scalar("plane's p", weight, image.device, wide),
        checks.scalar("plane's q", bias, image.device, wide),
    )


def check_ids(name: str, ids: Tensor, count: int, letter: str, device: torch.device) -> Tensor:
    """Returns int64 or int32 ids [count] as the kernels read them: int64 and contiguous."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"{name}: expected an int64 or int32 tensor [{letter}], got {got}")
    checks.check_dense(name, ids)
    if ids.dim() != 1 or ids.shape[0] != count:
        raise ValueError(
            f"{name}: expected shape [{letter}] = [{count}], got {checks.shape_of(ids)}"
        )
    checks.check_device(name, ids, "the features", device)
    return checks.savable(ids.long().contiguous())


def count_negatives(
    ids: Tensor, text_ids: Tensor, m: int, label_offset: int, group: Any
) -> Tensor:  # []
    """Returns the number of negatives of all rows, at least 1, float64; equal ids are none.

    With a process group it is the mean over the ranks, a collective.
    """
    ordered = text_ids.sort().values
    positives = text_ids[label_offset : label_offset + ids.shape[0]]
    equal = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    count = m * ids.shape[0] - (equal + (positives != ids)).sum(dtype=torch.float64)
    if group is not None:
        count = distributed.mean_over_ranks(count, group)
    return count.clamp(min=1)


def check_columns(
    image: Tensor,
    text: Tensor,
    ids: Tensor | None,
    text_ids: Tensor | None,
    label_offset: int,
    group: Any,
) -> None:
    """Raises an error unless each row has its positive among the columns, and ids go together.

    With a process group (else None) the columns are this rank's, as many as rows.
    """
    n = image.shape[0]
    m = text.shape[0]
    if isinstance(label_offset, bool) or not isinstance(label_offset, (int, torch.SymInt)):
        raise TypeError(f"label_offset: expected an int, got {type(label_offset).__name__}")
    if group is not None:
        checks.check_instance("group", group, torch.distributed.ProcessGroup, "a process group")
        if m != n:
            raise ValueError(
                f"text: expected this rank's {n} rows with group (they are gathered), got {m}"
            )
        if label_offset != 0:
            raise ValueError(
                f"label_offset: expected 0 with group, which sets it by rank, got {label_offset}"
            )
        if text_ids is not None:
            raise ValueError(
                "text_ids: expected None with group, where the ids of the texts are those of the "
                "images"
            )
    if m < n:
        raise ValueError(f"text: expected at least as many rows as image, {n}, got {m}")
    if not 0 <= label_offset <= m - n:
        raise ValueError(
            f"label_offset: expected 0 <= label_offset <= M - N = {m - n} so that each of {n} rows "
            f"has its column among {m}, got {label_offset}"
        )
    if ids is None and text_ids is not None:
        raise ValueError("ids: expected ids for the rows beside text_ids, got None")
    if ids is not None and text_ids is None and n != m:
        raise ValueError(
            f"text_ids: expected ids for {m} columns, since M is not N = {n}, got None"
        )
