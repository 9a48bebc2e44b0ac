"""What each rank of tests/ops/test_distributed.py runs under torchrun: the losses over gloo ranks
against one process.
"""

import itertools
import os
import sys
import warnings
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

import simplclip
from simplclip import losses
from simplclip.losses import ClipPMLoss, RowwiseLoss, WIKDLoss
from simplclip.ops import distributed
from support.ops import plain
from support.ranks import fsdp, gradient_cache, learned_parameters

WORLD, N = int(os.environ["WORLD_SIZE"]), 10
EVERYTHING = {
    "relational_weight": 0.8,
    "interactive_weight": 0.6,
    "pm_weight": 0.5,
    "feature_weight": 0.4,
}


def batch(n=N, width=16):
    g = torch.Generator().manual_seed(0)
    names = ("image", "text", "teacher_image", "teacher_text")
    values = {
        name: F.normalize(torch.randn(WORLD * n, width, generator=g), dim=1) for name in names
    }
    return values | {"logit_scale": torch.tensor(14.0), "teacher_scale": torch.tensor(20.0)}


def rows_of(rank, n):
    return slice(n * rank, n * rank + n)


def ids_of(n):
    """Returns ids of groups within a rank and across: ranks have different numbers of negatives."""
    if n == 1:
        return torch.arange(WORLD) // 2
    ids = torch.arange(WORLD * n).clamp(min=5)
    ids[15] = 7
    return ids


def run(loss, inputs, rows, distil, **options):
    """Returns the terms, and the gradients of features, of the scale and of the loss's own
    parameters.
    """
    image, text = (inputs[name][rows].clone().requires_grad_() for name in ("image", "text"))
    scale = inputs["logit_scale"].clone().requires_grad_()
    teacher = (
        [inputs["teacher_image"][rows], inputs["teacher_text"][rows], inputs["teacher_scale"]]
        if distil
        else []
    )
    teacher = dict(zip(("dist_image_features", "dist_text_features", "dist_logit_scale"), teacher))
    with warnings.catch_warnings():
        # open_clip 3.3 calls what torch 2.15 deprecates
        if isinstance(loss, losses.base.DistributedLoss):
            warnings.simplefilter("error")
        terms = loss(image, text, logit_scale=scale, **teacher, output_dict=True, **options)
        sum(terms.values()).backward()
    shared = {"scale": scale.grad, **{name: p.grad for name, p in loss.named_parameters()}}
    return (
        {k: v.detach() for k, v in terms.items()},
        {"image": image.grad, "text": text.grad},
        shared,
    )


def average(values):
    for value in values.values():
        dist.all_reduce(value)
        value /= WORLD
    return values


def close(got, expected, what):
    assert got.keys() == expected.keys(), what
    for name in expected:
        torch.testing.assert_close(
            got[name],
            expected[name],
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, n=name: f"{what} {n}: {m}",
        )


def equal_one_process(got, expected, rows, what, *, times=1, local=False):
    """Compares a rank's results with those of the whole batch. times: of the features' gradients;
    local: terms are means.
    """
    close(average(got[0]) if local else got[0], expected[0], what)
    close(got[1], {name: times * gradient[rows] for name, gradient in expected[1].items()}, what)
    close(average(got[2]), expected[2], what)


def distilled(logits, positives, teacher_logits):
    """open_clip's loss with distillation, as a function of rows."""
    probabilities = teacher_logits.softmax(1)
    return F.cross_entropy(logits, positives, reduction="none") - (
        probabilities * logits.log_softmax(1)
    ).sum(1)


def equals_open_clip(rank, n=N):
    shard = rows_of(rank, n)
    kinds = (
        (ClipLoss, losses.ClipLoss),
        (DistillClipLoss, WIKDLoss),
        (DistillClipLoss, partial(RowwiseLoss, distilled)),
    )
    for (original, replacement), local_loss, gather_with_grad in itertools.product(
        kinds, (False, True), (False, True)
    ):
        mode = {
            "local_loss": local_loss,
            "gather_with_grad": gather_with_grad,
            "rank": rank,
            "world_size": WORLD,
        }
        expected, got = (
            run(make(**mode), batch(n), shard, original is DistillClipLoss)
            for make in (original, replacement)
        )
        what = (
            f"{original.__name__} {replacement} local_loss={local_loss} "
            f"gather_with_grad={gather_with_grad}"
        )
        terms = (
            {"rowwise_loss": sum(expected[0].values())} if "rowwise_loss" in got[0] else expected[0]
        )
        close(got[0], terms, what)
        close(got[1], expected[1], what)
        close(average(got[2]), average(expected[2]), what)


def sigmoid_equals_open_clip(rank, n=N):
    shard, bias = rows_of(rank, n), torch.tensor(-3.0)
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        mode = {"rank": rank, "world_size": WORLD, "dist_impl": dist_impl}
        expected, got = (
            run(make(**mode), batch(n), shard, False, logit_bias=bias)
            for make in (SigLipLoss, losses.SigLipLoss)
        )
        for expected_part, part in zip(expected, got):
            close(part, expected_part, f"SigLipLoss {dist_impl}")


def sigmoid_equals_one_process(rank, n=N):
    """Checks SigLipLoss with groups across ranks, and beside pair matching; also the sum of
    `terms`.
    """
    shard, ids = rows_of(rank, n), ids_of(n)
    for options in ({}, {"pm_weight": 0.5}):
        expected = run(losses.SigLipLoss(**options), batch(n), slice(None), False, ids=ids)
        loss = losses.SigLipLoss(rank=rank, world_size=WORLD, **options)
        got = run(loss, batch(n), shard, False, ids=ids[shard])
        equal_one_process(got, expected, shard, str(options), times=WORLD, local=True)
    image, text = (batch(n)[name][shard].requires_grad_() for name in ("image", "text"))
    weights = {"sigmoid": 1.0, "pair_matching": 0.5}
    total, terms = loss.terms(image, text, batch(n)["logit_scale"], weights=weights, ids=ids[shard])
    close(dict(zip(got[1], torch.autograd.grad(total, (image, text)))), got[1], "terms")
    close(
        average({"sigmoid": terms["sigmoid"]}),
        {"sigmoid": expected[0]["contrastive_loss"]},
        "terms",
    )


def ids_of_constant_features(rank, n=N):
    """Checks ids where the other ranks' features are constants; `equals_one_process` has ids in the
    other modes.
    """
    shard, ids = rows_of(rank, n), ids_of(n)
    got = run(
        losses.ClipLoss(local_loss=True, rank=rank, world_size=WORLD),
        batch(n),
        shard,
        False,
        ids=ids[shard],
    )
    image, text, scale = (batch(n)[name] for name in ("image", "text", "logit_scale"))
    leaves = [t[shard].clone().requires_grad_() for t in (image, text)]
    options = {
        "terms": ("contrastive",),
        "label_offset": n * rank,
        "symmetric": False,
        "ids": ids[shard],
        "text_ids": ids,
    }
    both = zip(leaves, (text, image))
    value = sum(plain.similarity_loss(x, y, scale, **options)["contrastive"] for x, y in both) / 2
    close(got[0], {"contrastive_loss": value.detach()}, "ids")
    close(got[1], dict(zip(got[1], torch.autograd.grad(value, leaves))), "ids")


def equals_one_process(rank, n=N):
    shard, ids = rows_of(rank, n), ids_of(n)
    modes = [{}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}]
    # the divergence of "infonce" is the relational term's
    forms = [("infonce", "kl"), ("kl", "kl"), ("kl", "cross_entropy")]
    for (interactive, divergence), mode in itertools.product(forms, modes):
        options = {**EVERYTHING, "interactive": interactive, "divergence": divergence}
        expected = run(WIKDLoss(**options), batch(n), slice(None), True, ids=ids)
        got = run(
            WIKDLoss(**options, **mode, rank=rank, world_size=WORLD),
            batch(n),
            shard,
            True,
            ids=ids[shard],
        )
        equal_one_process(
            got,
            expected,
            shard,
            f"{options} {mode}",
            times=WORLD if mode else 1,
            local="local_loss" in mode,
        )
    only_interactive = {
        "contrastive_weight": 0,
        "relational_weight": 0,
        "interactive_weight": 1,
        "local_loss": True,
    }
    # its keys are constants, so that gathering with gradients changes nothing
    for form in ("infonce", "kl"):
        options = {**only_interactive, "interactive": form, "rank": rank, "world_size": WORLD}
        expected, got = (
            run(WIKDLoss(**options, **more), batch(n), shard, True, ids=ids[shard])
            for more in (modes[1], {})
        )
        for expected_part, part in zip(expected, got):
            close(part, expected_part, f"{form} {options}")


def small_divergences(rank, n=4):
    """Checks the error of a KL whose summands are as large as the teacher's logits, whose cosines
    are about 0.5.
    """
    loss = WIKDLoss(
        contrastive_weight=0,
        divergence="kl",
        local_loss=True,
        gather_with_grad=True,
        rank=rank,
        world_size=WORLD,
    )
    generator, shard = torch.Generator().manual_seed(0), rows_of(rank, n)
    for scale in 15 * (100.0, 300.0):
        image, text, *teacher = (
            F.normalize(torch.randn(WORLD * n, 16, generator=generator) + 1, dim=1)
            for _ in range(4)
        )
        parts = [t[shard] for t in (image, text, *teacher)]
        kl = average(loss(*parts[:2], 1.0, *parts[2:], scale, output_dict=True))["distill_loss"]
        wide = dict(
            zip(("teacher_image", "teacher_text"), (t.double() for t in teacher)),
            teacher_scale=scale,
        )
        exact = plain.similarity_loss(
            image.double(), text.double(), 1.0, terms=("relational",), **wide
        )["relational"]
        assert abs(kl - exact) < 2**-23 * scale * (teacher[0] @ teacher[1].T).abs().max()


def collectives(rank):
    """Compares values and gradients of collectives with those by hand; upstream gradients are
    `weight` times rank + 1.
    """
    group = dist.group.WORLD

    def run(function, rows, weight, compiled):
        rows = rows.clone().requires_grad_()
        value = (
            torch.compile(function, fullgraph=True, backend="aot_eager")(rows)
            if compiled
            else function(rows)
        )
        ((rank + 1) * weight * value).sum().backward()
        return value.detach(), rows.grad

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        all_values = torch.arange(WORLD * 3 * 4).reshape(WORLD, 3, 4).to(dtype)
        weight = torch.arange(WORLD * 3 * 4).reshape(WORLD * 3, 4).to(dtype) / 8
        columns = torch.arange(WORLD * 2 * 6).reshape(WORLD, 2, 6).to(dtype)
        for compiled in (False, True) if dtype == torch.bfloat16 else (False,):
            with warnings.catch_warnings():
                if not compiled:  # torch 2.11's Dynamo warns about itself
                    warnings.simplefilter("error")
                got = run(
                    lambda rows: distributed.gather(rows, group), all_values[rank], weight, compiled
                )
                halves = weight.view(2, 2, 6)[:, :, :3]
                exchanged = run(
                    lambda rows: distributed.exchange(rows, group), columns[rank], halves, compiled
                )
            torch.testing.assert_close(got[0], all_values.flatten(0, 1), rtol=0, atol=0)
            torch.testing.assert_close(got[1], 3 * weight[3 * rank : 3 * rank + 3], rtol=0, atol=0)
            torch.testing.assert_close(
                exchanged[0], columns[:, :, 3 * rank : 3 * rank + 3], rtol=0, atol=0
            )
            halves = [(other + 1) * weight.view(2, 2, 6)[rank, :, :3] for other in range(WORLD)]
            torch.testing.assert_close(exchanged[1], torch.cat(halves, 1), rtol=0, atol=0)


def unequal(rank):
    """Checks that unequal shapes raise one error on all ranks, at the first call and later; equal
    shapes then work again.
    """
    for local_loss, gather_with_grad in itertools.product((False, True), (False, True)):
        loss = ClipPMLoss(local_loss, gather_with_grad, rank=rank, world_size=WORLD)
        for a, b in ((N, N - 1), (N, N), (N - 2, N - 2), (N, N - 2), (N, N)):
            features, error = torch.ones((a, b)[rank], 4), None
            try:
                assert loss(features, features, torch.tensor(2.0)).isfinite()
            except ValueError as e:
                error = str(e)
            expected = f"rank 0: [{a}, 4], [{a}, 4]; rank 1: [{b}, 4], [{b}, 4]"
            what = (
                "image_features, text_features: expected the same shapes on all ranks, got "
                f"{expected}"
            )
            assert error == (None if a == b else what), error


def misfits(rank):
    """Checks that several texts an image, and a wrong rank, are an error on every rank: none waits
    for the others.
    """
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


def one_pair(rank):
    for part in (
        equals_open_clip,
        sigmoid_equals_open_clip,
        sigmoid_equals_one_process,
        equals_one_process,
    ):
        part(rank, n=1)
    ids_of_constant_features(rank, n=1)


def one_pair_in_triton(rank):
    import ptx

    with ptx.card(86), simplclip.backend("triton"):
        equals_open_clip(rank, n=1)


def transformers(rank):
    from support.ranks import transformers_trainer

    transformers_trainer.main(rank)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    parts = {
        "open_clip": [equals_open_clip, sigmoid_equals_open_clip, sigmoid_equals_one_process],
        "one process": [equals_one_process, ids_of_constant_features, small_divergences],
        "one pair": [one_pair],
        "one pair in Triton": [one_pair_in_triton],
        "exchanges": [collectives, unequal, misfits],
        "learned parameters": [learned_parameters.main],
        "gradient caching": [gradient_cache.main],
        "transformers": [transformers],
        "fully_shard": [lambda rank: fsdp.main("eager")],
        "fully_shard by inductor": [lambda rank: fsdp.main("inductor")],
    }
    for name in sys.argv[1:]:
        for part in parts[name]:
            part(dist.get_rank())
        sys.stdout.write(f"{name} passed\n")  # at once, since the ranks write to one pipe
        sys.stdout.flush()
    dist.destroy_process_group()
