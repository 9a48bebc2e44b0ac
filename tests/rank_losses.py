"""What each rank of tests/test_distributed.py runs under torchrun: the losses over two gloo ranks against one process."""

import itertools
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, DistillClipLoss
from similarity import make_inputs

from simplclip.losses import ClipPMLoss, WIKDLoss

WORLD, N = 2, 10
EVERYTHING = {"relational_weight": 0.8, "interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}


def batch(width=16):
    leaves, _ = make_inputs(WORLD * N, WORLD * N, terms=("relational",), width=width)
    return {name: value.float() for name, value in leaves.items()}


def run(loss, inputs, rows, distil, **options):
    """The terms, and the gradients of features, of the scale and of the loss's own parameters."""
    image, text = (inputs[name][rows].clone().requires_grad_() for name in ("image", "text"))
    scale = inputs["logit_scale"].clone().requires_grad_()
    teacher = [inputs["teacher_image"][rows], inputs["teacher_text"][rows], inputs["teacher_scale"]] if distil else []
    terms = loss(image, text, scale, *teacher, output_dict=True, **options)
    sum(terms.values()).backward()
    shared = {"scale": scale.grad, **{name: p.grad for name, p in loss.named_parameters()}}
    return {k: v.detach() for k, v in terms.items()}, {"image": image.grad, "text": text.grad}, shared


def average(values):
    for value in values.values():
        dist.all_reduce(value)
        value /= WORLD
    return values


def close(ours, theirs, what):
    assert ours.keys() == theirs.keys(), what
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{what} {n}: {m}")


def equals_open_clip(rank):
    mine = slice(N * rank, N * rank + N)
    for (theirs, ours, distil), local_loss, gather_with_grad in itertools.product(
        ((ClipLoss, lambda **k: ClipPMLoss(pm_weight=0, **k), False), (DistillClipLoss, WIKDLoss, True)),
        (False, True),
        (False, True),
    ):
        mode = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank, "world_size": WORLD}
        expected, got = (run(make(**mode), batch(), mine, distil) for make in (theirs, ours))
        what = f"{theirs.__name__} local_loss={local_loss} gather_with_grad={gather_with_grad}"
        close(got[0], expected[0], what)
        close(got[1], expected[1], what)
        close(average(got[2]), average(expected[2]), what)


def equals_one_process(rank):
    mine = slice(N * rank, N * rank + N)
    ids = torch.arange(WORLD * N).clamp(min=5)  # groups within a rank and across: ranks have other numbers of negatives
    ids[15] = 7
    for negatives, interactive, divergence, local_loss in itertools.product(
        ("all", "hard"), ("infonce", "kl"), ("kl", "cross_entropy"), (False, True)
    ):
        options = {**EVERYTHING, "negatives": negatives, "interactive": interactive, "divergence": divergence}
        mode = {"local_loss": local_loss, "gather_with_grad": True, "rank": rank, "world_size": WORLD}
        expected = run(WIKDLoss(**options), batch(), slice(None), True, ids=ids)
        got = run(WIKDLoss(**options, **mode), batch(), mine, True, ids=ids[mine])
        what = f"{options} local_loss={local_loss}"
        close(average(got[0]) if local_loss else got[0], expected[0], what)
        close(got[1], {name: WORLD * g[mine] for name, g in expected[1].items()}, what)
        close(average(got[2]), expected[2], what)


def dies(rank):
    """Rank 1 leaves; rank 0 must end with an error and not wait for ever."""
    loss = ClipPMLoss(gather_with_grad=True, rank=rank, world_size=WORLD)
    run(loss, batch(), slice(N * rank, N * rank + N), False)
    if rank == 1:
        os._exit(7)
    run(loss, batch(), slice(N * rank, N * rank + N), False)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    part = {"open_clip": equals_open_clip, "one process": equals_one_process, "dies": dies}[sys.argv[1]]
    part(dist.get_rank())
    dist.destroy_process_group()
    print("passed")
