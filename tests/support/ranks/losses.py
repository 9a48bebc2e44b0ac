"""What each rank of tests/ops/test_distributed.py runs: losses on gloo ranks against one process.

losses.py PART...        names of PARTS
"""

import itertools
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

import simplclip
from simplclip import losses
from simplclip.losses import RowwiseLoss, WIKDLoss
from simplclip.ops import distributed
from support.ops import plain
from support.ranks import fsdp, gradient_cache, learned_parameters, refusals

WORLD, N = int(os.environ["WORLD_SIZE"]), 10
EVERYTHING = {"relational_weight": 0.8, "interactive_weight": 0.6}
EVERYTHING |= {"pm_weight": 0.5, "feature_weight": 0.4}


def batch(n: int = N, width: int = 16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    values = {}
    for name in ("image", "text", "teacher_image", "teacher_text"):
        values[name] = F.normalize(torch.randn(WORLD * n, width, generator=g), dim=1)
    return values | {"logit_scale": torch.tensor(14.0), "teacher_scale": torch.tensor(20.0)}


class Results(NamedTuple):
    terms: dict[str, Tensor]
    features: dict[str, Tensor]  # gradients
    shared: dict[str, Tensor]  # gradients of the scale and of the loss's own parameters


def rows_of(rank: int, n: int) -> slice:
    return slice(n * rank, n * rank + n)


def ids_of(n: int) -> Tensor:
    """Returns ids of groups within a rank and across: ranks have different numbers of negatives."""
    if n == 1:
        return torch.arange(WORLD) // 2
    ids = torch.arange(WORLD * n).clamp(min=5)
    ids[15] = 7
    return ids


def run(
    loss: nn.Module, inputs: dict[str, Tensor], rows: slice, distil: bool, **options: Any
) -> Results:
    image, text = (inputs[name][rows].clone().requires_grad_() for name in ("image", "text"))
    scale = inputs["logit_scale"].clone().requires_grad_()
    teacher = {}
    if distil:
        teacher = {
            "dist_image_features": inputs["teacher_image"][rows],
            "dist_text_features": inputs["teacher_text"][rows],
            "dist_logit_scale": inputs["teacher_scale"],
        }
    with warnings.catch_warnings():
        # open_clip 3.3 calls what torch 2.15 deprecates
        if isinstance(loss, losses.base.DistributedLoss):
            warnings.simplefilter("error")
        terms = loss(image, text, logit_scale=scale, **teacher, output_dict=True, **options)
        sum(terms.values()).backward()
    parameters = {name: p.grad for name, p in loss.named_parameters()}
    return Results(
        {k: v.detach() for k, v in terms.items()},
        {"image": image.grad, "text": text.grad},
        {"scale": scale.grad, **parameters},
    )


def average(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages values over ranks, in place."""
    for value in values.values():
        dist.all_reduce(value)
        value /= WORLD
    return values


def close(results: dict[str, Tensor], expected: dict[str, Tensor], subject: str) -> None:
    assert results.keys() == expected.keys(), subject
    for name in expected:
        message = partial("{}: {}".format, f"{subject} {name}")
        torch.testing.assert_close(results[name], expected[name], rtol=1e-4, atol=1e-6, msg=message)


def all_close(results: Results, expected: Results, subject: str) -> None:
    for values, expected_values in zip(results, expected):
        close(values, expected_values, subject)


def equal_one_process(
    results: Results,
    expected: Results,
    rows: slice,
    subject: str,
    *,
    times: int = 1,
    local: bool = False,
) -> None:
    """Compares with the whole batch. times: the features' gradients; local: terms are means."""
    terms = average(results.terms) if local else results.terms
    gradients = {name: times * gradient[rows] for name, gradient in expected.features.items()}
    close(terms, expected.terms, subject)
    close(results.features, gradients, subject)
    close(average(results.shared), expected.shared, subject)


def distilled(logits: Tensor, positives: Tensor, teacher_logits: Tensor) -> Tensor:
    """open_clip's loss with distillation, as a function of rows."""
    cross_entropy = F.cross_entropy(logits, positives, reduction="none")
    return cross_entropy - (teacher_logits.softmax(1) * logits.log_softmax(1)).sum(1)


def equals_open_clip(rank: int, n: int = N) -> None:
    shard = rows_of(rank, n)
    kinds = (
        (ClipLoss, losses.ClipLoss),
        (DistillClipLoss, WIKDLoss),
        (DistillClipLoss, partial(RowwiseLoss, distilled)),
    )
    flags = (False, True)
    for (original, replacement), local_loss, with_grad in itertools.product(kinds, flags, flags):
        options = {"local_loss": local_loss, "gather_with_grad": with_grad}
        mode = {**options, "rank": rank, "world_size": WORLD}
        distil = original is DistillClipLoss
        expected = run(original(**mode), batch(n), shard, distil)
        results = run(replacement(**mode), batch(n), shard, distil)
        subject = f"{original.__name__} {replacement} {options}"
        terms = expected.terms
        if "rowwise_loss" in results.terms:
            terms = {"rowwise_loss": sum(terms.values())}
        close(results.terms, terms, subject)
        close(results.features, expected.features, subject)
        close(average(results.shared), average(expected.shared), subject)


def sigmoid_equals_open_clip(rank: int, n: int = N) -> None:
    shard, bias = rows_of(rank, n), torch.tensor(-3.0)
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        mode = {"rank": rank, "world_size": WORLD, "dist_impl": dist_impl}
        expected = run(SigLipLoss(**mode), batch(n), shard, False, logit_bias=bias)
        results = run(losses.SigLipLoss(**mode), batch(n), shard, False, logit_bias=bias)
        all_close(results, expected, f"SigLipLoss {dist_impl}")


def sigmoid_equals_one_process(rank: int, n: int = N) -> None:
    """Checks SigLipLoss with groups across ranks, beside pair matching, and `terms`."""
    shard, ids = rows_of(rank, n), ids_of(n)
    for options in ({}, {"pm_weight": 0.5}):
        expected = run(losses.SigLipLoss(**options), batch(n), slice(None), False, ids=ids)
        loss = losses.SigLipLoss(rank=rank, world_size=WORLD, **options)
        results = run(loss, batch(n), shard, False, ids=ids[shard])
        equal_one_process(results, expected, shard, str(options), times=WORLD, local=True)
    image, text = (batch(n)[name][shard].requires_grad_() for name in ("image", "text"))
    weights = {"sigmoid": 1.0, "pair_matching": 0.5}
    total, terms = loss.terms(image, text, batch(n)["logit_scale"], weights=weights, ids=ids[shard])
    gradients = torch.autograd.grad(total, (image, text))
    close(dict(zip(results.features, gradients)), results.features, "terms")
    sigmoid = average({"sigmoid": terms["sigmoid"]})
    close(sigmoid, {"sigmoid": expected.terms["contrastive_loss"]}, "terms")


def ids_of_constant_features(rank: int, n: int = N) -> None:
    """Checks ids where the other ranks' features are constants."""
    shard, ids = rows_of(rank, n), ids_of(n)
    loss = losses.ClipLoss(local_loss=True, rank=rank, world_size=WORLD)
    results = run(loss, batch(n), shard, False, ids=ids[shard])
    image, text, scale = (batch(n)[name] for name in ("image", "text", "logit_scale"))
    leaves = [t[shard].clone().requires_grad_() for t in (image, text)]
    options = {"terms": ("contrastive",), "label_offset": n * rank, "symmetric": False}
    options |= {"ids": ids[shard], "text_ids": ids}
    by_image, by_text = (
        plain.similarity_loss(rows, columns, scale, **options)["contrastive"]
        for rows, columns in zip(leaves, (text, image))
    )
    value = (by_image + by_text) / 2
    gradients = torch.autograd.grad(value, leaves)
    close(results.terms, {"contrastive_loss": value.detach()}, "ids")
    close(results.features, dict(zip(results.features, gradients)), "ids")


def equals_one_process(rank: int, n: int = N) -> None:
    shard, ids = rows_of(rank, n), ids_of(n)
    modes = [{}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}]
    # the divergence of "infonce" is the relational term's
    forms = [("infonce", "kl"), ("kl", "kl"), ("kl", "cross_entropy")]
    for (interactive, divergence), mode in itertools.product(forms, modes):
        options = {**EVERYTHING, "interactive": interactive, "divergence": divergence}
        expected = run(WIKDLoss(**options), batch(n), slice(None), True, ids=ids)
        loss = WIKDLoss(**options, **mode, rank=rank, world_size=WORLD)
        results = run(loss, batch(n), shard, True, ids=ids[shard])
        times = WORLD if mode else 1
        local = "local_loss" in mode
        equal_one_process(results, expected, shard, f"{options} {mode}", times=times, local=local)
    only_interactive = {"contrastive_weight": 0, "relational_weight": 0, "interactive_weight": 1}
    # its keys are constants, so that gathering with gradients changes nothing
    for form in ("infonce", "kl"):
        options = {**only_interactive, "interactive": form, "local_loss": True}
        options |= {"rank": rank, "world_size": WORLD}
        with_grad = WIKDLoss(**options, gather_with_grad=True)
        expected = run(with_grad, batch(n), shard, True, ids=ids[shard])
        results = run(WIKDLoss(**options), batch(n), shard, True, ids=ids[shard])
        all_close(results, expected, f"{form} {options}")


def small_divergences(rank: int, n: int = 4) -> None:
    """Checks the error of a KL whose summands are as large as the teacher's logits."""
    mode = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": WORLD}
    loss = WIKDLoss(contrastive_weight=0, divergence="kl", **mode)
    generator, shard = torch.Generator().manual_seed(0), rows_of(rank, n)
    for scale in 15 * (100.0, 300.0):
        image, text, *teacher = (
            F.normalize(torch.randn(WORLD * n, 16, generator=generator) + 1, dim=1)
            for _ in range(4)
        )
        student_rows = image[shard], text[shard]
        teacher_rows = teacher[0][shard], teacher[1][shard]
        terms = loss(*student_rows, 1.0, *teacher_rows, scale, output_dict=True)
        kl = average(terms)["distill_loss"]
        exact = plain.similarity_loss(
            image.double(),
            text.double(),
            1.0,
            terms=("relational",),
            teacher_image=teacher[0].double(),
            teacher_text=teacher[1].double(),
            teacher_scale=scale,
        )["relational"]
        assert abs(kl - exact) < 2**-23 * scale * (teacher[0] @ teacher[1].T).abs().max()


def collectives(rank: int) -> None:
    """Checks values and gradients of collectives; upstream gradients: `weight` times rank + 1."""
    group = dist.group.WORLD

    def run(
        function: Callable, rows: Tensor, weight: Tensor, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        if compiled:
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        rows = rows.clone().requires_grad_()
        value = function(rows)
        ((rank + 1) * weight * value).sum().backward()
        return value.detach(), rows.grad

    def gather(rows: Tensor) -> Tensor:
        return distributed.gather(rows, group)

    check_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
    rank_rows = slice(3 * rank, 3 * rank + 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        all_values = torch.arange(WORLD * 3 * 4).reshape(WORLD, 3, 4).to(dtype)
        weight = torch.arange(WORLD * 3 * 4).reshape(WORLD * 3, 4).to(dtype) / 8
        columns = torch.arange(WORLD * 2 * 6).reshape(WORLD, 2, 6).to(dtype)
        for compiled in (False, True) if dtype == torch.bfloat16 else (False,):
            with warnings.catch_warnings():
                if not compiled:  # torch 2.11's Dynamo warns about itself
                    warnings.simplefilter("error")
                gathered, gathered_grad = run(gather, all_values[rank], weight, compiled)
            check_equal(gathered, all_values.flatten(0, 1))
            check_equal(gathered_grad, 3 * weight[rank_rows])
        exchanged = distributed.exchange_columns(columns[rank], group.group_name)
        check_equal(exchanged, columns[:, :, rank_rows])
        check_equal(distributed.exchange_parts(exchanged, group.group_name), columns[rank])


def one_pair(rank: int) -> None:
    equals_open_clip(rank, n=1)
    sigmoid_equals_open_clip(rank, n=1)
    sigmoid_equals_one_process(rank, n=1)
    equals_one_process(rank, n=1)
    ids_of_constant_features(rank, n=1)


def one_pair_in_triton(rank: int) -> None:
    import ptx

    with ptx.card(86), simplclip.backend("triton"):
        equals_open_clip(rank, n=1)


def transformers(rank: int) -> None:
    from support.ranks import transformers_trainer

    transformers_trainer.main(rank)


PARTS = {
    "open_clip": [equals_open_clip, sigmoid_equals_open_clip, sigmoid_equals_one_process],
    "one process": [equals_one_process, ids_of_constant_features, small_divergences],
    "one pair": [one_pair],
    "one pair in Triton": [one_pair_in_triton],
    "exchanges": [collectives, refusals.main],
    "learned parameters": [learned_parameters.main],
    "gradient caching": [gradient_cache.main],
    "transformers": [transformers],
    "fully_shard": [lambda rank: fsdp.main("eager")],
    "fully_shard by inductor": [lambda rank: fsdp.main("inductor")],
}


def main(names: list[str]) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    for name in names:
        for part in PARTS[name]:
            part(dist.get_rank())
        sys.stdout.write(f"{name} passed\n")  # at once, since the ranks write to one pipe
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
