"""Checks the arguments of similarity_loss, and makes tensors of numbers. positives.py checks the ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from simplclip.ops import checks
from simplclip.ops.calls import accumulate_dtype
from simplclip.ops.registry import autocast
from simplclip.ops.similarity.call import DIVERGENCES, INTERACTIVE, POSITIVES, TERMS, SimilarityCall
from simplclip.ops.similarity.contrastive import Contrastive


def check_options(terms, interactive, divergence, **budgets):
    if isinstance(terms, str) or not isinstance(terms, Collection) or not terms:
        raise ValueError(f"terms: expected a tuple of at least one of {', '.join(TERMS)}, got {terms!r}")
    for term in terms:
        checks.choice("terms", term, TERMS)
    checks.choice("interactive", interactive, INTERACTIVE)
    checks.choice("divergence", divergence, DIVERGENCES)
    for name, value in budgets.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{name}: expected a number of bytes, 0 or more, got {value!r}")


def check_contrastive(options: Contrastive, terms: Collection[str]) -> None:
    """Checks the options of the contrastive term and the positives. `check_prior` checks a prior that is a tensor."""
    checks.choice("positives", options.positives, POSITIVES)
    checks.boolean("decoupled", options.decoupled)
    options.margin = checks.number("margin", options.margin)
    for name in ("label_smoothing", "prior"):
        value = getattr(options, name)
        if name != "prior" or not (value is None or isinstance(value, Tensor)):
            if not 0 <= checks.number(name, value) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {value}")
            setattr(options, name, checks.number(name, value))
    given = {"label_smoothing": bool(options.label_smoothing), "decoupled": options.decoupled}
    given["prior"] = options.prior is not None
    given |= {"margin": bool(options.margin)}
    if "contrastive" not in terms and any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise ValueError(f"{name}: expected the term contrastive beside it, got the terms {', '.join(terms)}")
    if options.positives == "drop":
        return
    for name in ("prior", "margin"):
        if given[name]:
            raise ValueError(f"{name}: expected none with several positives, positives={options.positives!r}, got one")


def check_prior(options: Contrastive, call: SimilarityCall) -> None:
    """Checks a prior that is a tensor and casts it to the logits' dtype."""
    prior, n = options.prior, call.image.shape[0]
    if isinstance(prior, Tensor):
        checks.floating("prior", prior)
        checks.on("prior", prior, "image", call.image.device)
        if prior.shape not in ((), (n,)):
            raise ValueError(f"prior: expected a number or a tensor [N] = [{n}], got shape {checks.shape_of(prior)}")
        options.prior = prior.to(call.scale.dtype)


def check_weights(weights, terms: Collection[str]) -> dict[str, float] | None:
    if weights is None:
        return None
    if not isinstance(weights, Mapping) or set(weights) != set(terms):
        raise ValueError(f"weights: expected a number for each of the terms {', '.join(terms)}, got {weights!r}")
    return {term: checks.number(f"weights[{term!r}]", weight) for term, weight in weights.items()}


def normalise(call: SimilarityCall, terms: Collection[str]) -> None:
    """Checks the features and scalars of a call, casts them and makes scalars tensors; sets what no term reads to None."""
    checks.features("image", call.image, "[N, D]")
    checks.features("text", call.text, "[M, D]")
    projections = call.projected_image, call.projected_text
    call.image, call.text, call.projected_image, call.projected_text = autocast(call.image, call.text, *projections)
    image, device, stats = call.image, call.image.device, accumulate_dtype(call.image.dtype)
    check_pair({"image": image, "text": call.text})
    call.scale = checks.scalar("logit_scale", call.scale, device, stats)
    teaching = {"relational", "interactive"} & set(terms)
    if teaching:
        teacher(call, min(teaching))
    else:
        call.teacher_image = call.teacher_text = call.teacher_scale = None
    if "interactive" in terms:
        call.projected_image = projection("image", call.projected_image, image, call.teacher_image)
        call.projected_text = projection("text", call.projected_text, call.text, call.teacher_text)
        own = call.cross_scale is None
        call.cross_scale = call.scale if own else checks.scalar("interactive_scale", call.cross_scale, device, stats)
    else:
        call.projected_image = call.projected_text = call.cross_scale = None


def check_pair(student: Mapping[str, Tensor]) -> None:
    """Checks that a student's image and text features fit each other. student: argument name -> features, images first."""
    (image_name, image), (text_name, text) = student.items()
    checks.like(text_name, text, image_name, image)
    if text.shape[1] != image.shape[1]:
        raise ValueError(f"{text_name}: expected the width of {image_name}, {image.shape[1]}, got {text.shape[1]}")


def teacher(call: SimilarityCall, term: str) -> None:
    """Replaces the teacher's features and scale, which `term` needs, by constants."""
    names = ("teacher_image", "teacher_text", "teacher_scale")
    given = {name: getattr(call, name) for name in names}
    values = constants_of_teacher(given, {"image": call.image, "text": call.text}, f"the term {term!r} needs it")
    for name, value in zip(names, values):
        setattr(call, name, value)


def constants_of_teacher(given: Mapping[str, Any], student: Mapping[str, Tensor], why: str) -> list[Tensor]:
    """Returns a teacher's image and text features and scale, checked and detached, the features in the student's dtype.

    given, student: the arguments of each by name. why: the reason in the error for a missing argument of the teacher.
    """
    for name, value in given.items():
        if value is None:
            raise ValueError(f"{name}: expected a value, since {why}, got None")
    image, text, scale = given
    for name, (of, own), letters in zip((image, text), student.items(), ("[N, D̂]", "[M, D̂]")):
        value = given[name]
        checks.features(name, value, letters)
        if value.shape[0] != own.shape[0]:
            raise ValueError(f"{name}: expected the {own.shape[0]} rows of {of}, got shape {checks.shape_of(value)}")
        checks.on(name, value, of, own.device)
    width = given[image].shape[1]
    if given[text].shape[1] != width:
        raise ValueError(f"{text}: expected the width of {image}, {width}, got {given[text].shape[1]}")
    of, own = next(iter(student.items()))
    scalar = checks.scalar(scale, given[scale], own.device, accumulate_dtype(own.dtype), of)
    features = [checks.constant(name, given[name]).to(own.dtype) for name in (image, text)]
    return [*features, checks.constant(scale, scalar)]


def projection(kind, projected, student, teacher):
    """Checks and returns the student's features projected to the teacher's width; None if the student's own are used."""
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


def normal_bias(logit_bias, call: SimilarityCall) -> Tensor | None:  # []
    return None if logit_bias is None else checks.scalar("logit_bias", logit_bias, call.image.device, call.scale.dtype)


def hyperplane(plane, call: SimilarityCall) -> tuple[Tensor, Tensor]:  # [] or [D], []
    width, device, stats = call.image.shape[1], call.image.device, call.scale.dtype
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
