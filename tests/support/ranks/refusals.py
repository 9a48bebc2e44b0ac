"""Part of losses.py: calls that every rank must refuse, none alone."""

import itertools
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

import simplclip
from simplclip import losses
from simplclip.losses import ClipPMLoss, RowwiseLoss, WIKDLoss
from simplclip.losses.base import TEACHER
from support.losses import distilled, focal

WORLD, N = int(os.environ["WORLD_SIZE"]), 10


def main(rank: int) -> None:
    unequal(rank)
    unlike(rank)
    misfits(rank)


def unequal(rank: int) -> None:
    """Checks that unequal shapes are an error on all ranks, also later; equal ones then work."""
    for local_loss, gather_with_grad in itertools.product((False, True), (False, True)):
        loss = ClipPMLoss(local_loss, gather_with_grad, rank=rank, world_size=WORLD)
        for a, b in ((N, N - 1), (N, N), (N - 2, N - 2), (N, N - 2), (N, N)):
            features, error = torch.ones((a, b)[rank], 4), None
            try:
                assert loss(features, features, torch.tensor(2.0)).isfinite()
            except ValueError as e:
                error = str(e)
            expected = None
            if a != b:
                expected = (
                    "image_features, text_features: expected the same shapes and dtypes on all "
                    f"ranks, got rank 0: float32 [{a}, 4], float32 [{a}, 4]; "
                    f"rank 1: float32 [{b}, 4], float32 [{b}, 4]"
                )
            assert error == expected, error


def unlike(rank: int) -> None:
    """Checks that every rank raises one error where ranks differ in what they exchange."""
    scale = torch.tensor(2.0)
    a, b = torch.ones(4, 8), torch.ones(4, 6)
    modes = [
        {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        for local_loss, gather_with_grad in itertools.product((False, True), (False, True))
    ]
    mode = {"rank": rank, "world_size": WORLD}
    group = dist.group.WORLD
    similarity = partial(simplclip.ops.similarity_loss, logit_scale=scale, group=group)
    relational = {"terms": ("relational",), "teacher_scale": scale}
    first = rank == 0
    half = a if first else a.half()
    ids = torch.arange(4) if first else None
    teacher = a if first else b
    names = "dist_image_features, dist_text_features"
    calls: list[tuple[str, Callable]] = [
        (
            "image, text: .* rank 0: float32 .4, 8., float32 .4, 8.; rank 1: float32 .2, 8.",
            lambda: similarity(a if first else a[:2], a if first else a[:2]),
        ),
        ("image, text: .* rank 1: float16 .4, 8., float16", lambda: similarity(half, half)),
        ("ids: .* rank 0: integers .4.; rank 1: none", lambda: similarity(a, a, ids=ids)),
        (
            "teacher_image, teacher_text: .* rank 1: float32 .4, 6.",
            lambda: similarity(a, a, teacher_image=teacher, teacher_text=teacher, **relational),
        ),
        (
            f"{names}: .* rank 1: none, none",
            lambda: RowwiseLoss(distilled if first else focal, **mode)(
                a, a, scale, **(dict(zip(TEACHER, (a, a, scale))) if first else {})
            ),
        ),
    ]
    for options in modes:
        loss = ClipPMLoss(**options, **mode)
        wikd = WIKDLoss(**options, **mode)
        calls += [
            (
                "image_features, text_features: .* rank 1: float16",
                partial(loss, half, half, scale),
            ),
            ("ids: .* rank 1: none", partial(loss, a, a, scale, ids=ids)),
            (f"{names}: .* .4, 6.", partial(wikd, a, a, scale, teacher, teacher, scale)),
        ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=first),
        pytest.raises(ValueError, match="image, text: .* rank 0: bfloat16 .*; rank 1: float32 "),
    ):
        similarity(a, a)
    assert similarity(a, a, ids=torch.arange(4))["contrastive"].isfinite()


def misfits(rank: int) -> None:
    """Checks that several texts an image, and a wrong rank, are an error: no rank waits."""
    image = torch.ones(2, 4)
    text = torch.ones(4, 4)
    scale = torch.tensor(2.0)
    mode = {"rank": rank, "world_size": WORLD}
    for loss in (
        ClipPMLoss(local_loss=True, **mode),
        RowwiseLoss(distilled, **mode),
        losses.SigLipLoss(**mode),
    ):
        with pytest.raises(ValueError, match="text_features: expected (the )?2 rows"):
            loss(image, text, scale)
    with pytest.raises(RuntimeError, match=f"rank: expected this process's rank, {rank}, got"):
        ClipPMLoss(rank=(rank + 1) % WORLD, world_size=WORLD)(image, image, scale)
