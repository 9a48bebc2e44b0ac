"""Checks the arguments of similarity_loss, casts them, and makes tensors of numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import DIVERGENCES, TERMS
from simplclip.ops import checks, distributed
from simplclip.ops.modes import autocast


def check_options(
    terms: Any, divergence: Any, symmetric: Any, scratch_bytes: Any, store_bytes: Any
) -> None:
    """Raises ValueError or TypeError if one of these arguments of similarity_loss is not valid."""
    if not isinstance(terms, (tuple, list, set)) or not terms or not set(TERMS).issuperset(terms):
        raise ValueError(
            f"terms: expected a tuple of at least one of {', '.join(TERMS)}, got {terms!r}"
        )
    checks.check_choice("divergence", divergence, DIVERGENCES)
    checks.check_boolean("symmetric", symmetric)
    for name, value in (("scratch_bytes", scratch_bytes), ("store_bytes", store_bytes)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a number of bytes, 0 or more, got {value!r}")


def check_weights(weights: Any, terms: Collection[str]) -> dict[str, float]:
    """Returns the weights of the terms as finite floats by term.

    Raises ValueError or TypeError unless `weights` has a finite number for each of the terms, and
    no other.
    """
    if not isinstance(weights, Mapping) or weights.keys() != set(terms):
        raise ValueError(
            f"weights: expected a number for each of the terms {', '.join(terms)}, got {weights!r}"
        )
    numbers = dict(weights)
    for term, weight in weights.items():
        if type(weight) is not float or not abs(weight) < math.inf:
            numbers[term] = checks.number(f"weights[{term!r}]", weight)
    return numbers


def features(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Returns image [N, D] and text [M, D], checked and cast to autocast's dtype if it is on.

    Raises TypeError or ValueError if a shape, a dtype, a device or the widths do not fit.
    """
    checks.check_features("image", image, "[N, D]")
    checks.check_features("text", text, "[M, D]")
    image, text = autocast(image, text)
    if text.dtype != image.dtype or text.device != image.device or text.size(1) != image.size(1):
        check_pair({"image": image, "text": text})
    return image, text


def check_pair(student: Mapping[str, Tensor], equal_rows: bool = False) -> None:
    """Raises TypeError or ValueError if image and text features differ in width, dtype or device.

    student: argument name -> features [N, D], images first. equal_rows: whether unequal numbers of
    rows are an error too.
    """
    (image_name, image), (text_name, text) = student.items()
    if equal_rows and len(text) != len(image):
        got = checks.shape_of(text)
        if len(text) > len(image):
            got += (
                f"; with k captions an image, pass {image_name}.repeat_interleave(k, 0), and ids "
                "equal for an image"
            )
        raise ValueError(
            f"{text_name}: expected the {len(image)} rows of {image_name}, got shape {got}"
        )
    checks.check_like(text_name, text, image_name, image)
    if text.shape[1] != image.shape[1]:
        raise ValueError(
            f"{text_name}: expected the width of {image_name}, {image.shape[1]}, got "
            f"{text.shape[1]}"
        )


def teacher(
    teacher_image: Any, teacher_text: Any, teacher_scale: Any, image: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the teacher's features [N, D̂] and [M, D̂], and its scale []: checked and detached.

    The features are cast to the dtype of image, the scale to that of sums. image, text: the
    student's features. Raises ValueError if one of the three is None, ValueError or TypeError if
    one is not valid.
    """
    arguments = {
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
        "teacher_scale": teacher_scale,
    }
    student = {"image": image, "text": text}
    why = "the term 'relational' needs it"
    teacher_image, teacher_text, teacher_scale = constants_of_teacher(arguments, student, why)
    return teacher_image.to(image.dtype), teacher_text.to(image.dtype), teacher_scale


def constants_of_teacher(
    arguments: dict[str, Any], student: Mapping[str, Tensor], why: str
) -> list[Tensor]:
    """Returns a teacher's image and text features and, if it is an argument, the scale: detached.

    arguments: the teacher's by name, in this order. student: image and text features by name. why:
    the reason in the ValueError for an argument that is None. Raises ValueError or TypeError if the
    rows, widths, device or dtype of one are not valid. Features keep their dtype; the scale becomes
    [] in the dtype of sums.
    """
    for name, value in arguments.items():
        if value is None:
            raise ValueError(f"{name}: expected a value, since {why}, got None")
    image_name, text_name, *scale_names = arguments
    image, text = arguments[image_name], arguments[text_name]
    (student_image_name, student_image), (student_text_name, student_text) = student.items()
    _check_teacher(image_name, image, "[N, D̂]", student_image_name, student_image)
    _check_teacher(text_name, text, "[M, D̂]", student_text_name, student_text)
    if text.size(1) != image.size(1):
        raise ValueError(
            f"{text_name}: expected the width of {image_name}, {image.size(1)}, got {text.size(1)}"
        )
    constants = dict(arguments)
    wide = torch.promote_types(student_text.dtype, torch.float32)
    for name in scale_names:
        constants[name] = checks.scalar(name, arguments[name], student_text.device, wide)
    return [checks.constant(name, t) for name, t in constants.items()]


def _check_teacher(
    name: str, features: Tensor, letters: str, student_name: str, student: Tensor
) -> None:
    """Raises TypeError or ValueError unless the teacher's features have the student's rows, device.

    name, student_name: of the features in errors. letters: the expected shape there, e.g. "[N,
    D̂]".
    """
    checks.check_features(name, features, letters)
    if features.size(0) != student.size(0):
        raise ValueError(
            f"{name}: expected the {student.shape[0]} rows of {student_name}, got shape "
            f"{checks.shape_of(features)}"
        )
    if features.device != student.device:
        checks.check_device(name, features, student_name, student.device)


def hyperplane(plane: Any, image: Tensor) -> tuple[Tensor, Tensor]:  # [] or [D], []
    """Returns weight and bias of the plane of pair matching, checked, in the dtype of sums.

    plane: (p, q) of two scalars, or (w, q) with w [D], as of similarity_loss. image: [N, D]. Raises
    TypeError or ValueError if it is anything else.
    """
    width = image.shape[1]
    device = image.device
    wide = torch.promote_types(image.dtype, torch.float32)
    if not isinstance(plane, (tuple, list)) or len(plane) != 2:
        raise ValueError(
            f"plane: expected (p [] or w [D], q []) for pair matching, got {type(plane).__name__}"
        )
    weight, bias = plane
    if isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() > 1:
        if weight.shape[0] != width:
            raise ValueError(
                f"plane: expected w [D] = [{width}], got shape {checks.shape_of(weight)}"
            )
        checks.check_floating("plane's w", weight)
        if weight.device != device:
            raise ValueError(
                f"plane: expected w on the device of the features, {device}, got {weight.device}"
            )
        weight = weight.to(wide)
    else:
        weight = checks.scalar("plane's p", weight, device, wide)
    return weight, checks.scalar("plane's q", bias, device, wide)


def check_ids(name: str, ids: Tensor, count: int, letter: str, device: torch.device) -> Tensor:
    """Returns the ids as the kernels read them: int64 and contiguous.

    name: of the argument. letter: of its shape [count] in errors, "N" or "M". Raises TypeError
    unless they are an int64 or int32 tensor, ValueError unless they have this shape and device.
    """
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


def pair_ids(
    ids: Tensor | None, text_ids: Tensor | None, n: int, m: int, device: torch.device, group: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the ids of rows and of columns, checked, int64 [N] and [M], or None twice.

    n, m: this rank's rows and columns. Without ids there must be no text_ids. Without text_ids the
    columns have the ids of the rows. With a process group (else None) the columns are all ranks'
    texts, [W N], and every rank must call this. Raises ValueError or TypeError if ids are not
    valid.
    """
    if ids is None:
        if text_ids is not None:
            raise ValueError("ids: expected ids for the rows beside text_ids, got None")
        return None, None
    ids = check_ids("ids", ids, n, "N", device)
    if text_ids is None:
        if n != m:
            raise ValueError(
                f"text_ids: expected ids for {m} columns, since M is not N = {n}, got None"
            )
        if group is None:
            return ids, ids
        return ids, distributed.gather(ids, group)
    if group is not None:
        raise ValueError(
            "text_ids: expected None with group, where the ids of the texts are those of the images"
        )
    return ids, check_ids("text_ids", text_ids, m, "M", device)


def count_negatives(
    ids: Tensor, text_ids: Tensor, m: int, label_offset: int, group: Any
) -> Tensor:  # []
    """Returns the number of negatives of all rows, at least 1, float64.

    ids [N], text_ids [m]: equal ids are no negatives. label_offset: column of row 0's positive.
    With a process group (else None), every rank must call this, and the number is the mean over the
    ranks.
    """
    ordered = text_ids.sort().values
    positives = text_ids[label_offset : label_offset + ids.shape[0]]
    equal = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    count = (m - equal - (positives != ids).long()).sum(dtype=torch.float64)
    if group is not None:
        count = distributed.mean_over_ranks(count, group)
    return count.clamp(min=1)


def check_offset(label_offset: int, n: int, m: int, group: Any) -> None:
    """Raises TypeError or ValueError unless each of n rows has its positive among the m columns.

    With a process group (else None), label_offset must be 0 and m equal n.
    """
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
    if m < n:
        raise ValueError(f"text: expected at least as many rows as image, {n}, got {m}")
    if not 0 <= label_offset <= m - n:
        raise ValueError(
            f"label_offset: expected 0 <= label_offset <= M - N = {m - n} so that each of {n} rows "
            f"has its column among {m}, got {label_offset}"
        )
