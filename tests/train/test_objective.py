"""The objective of a run: weights by step, terms that are off, several captions, and misfits."""

import types

import pytest
import torch
import torch.nn.functional as F

from simplclip import losses
from simplclip.common import ranks
from simplclip.train.objective import Objective
from simplclip.train.sections import LossConfig, Schedule
from simplclip.train.step import groups_of

TEACHER = {"name": "t", "width": 6, "logit_scale": 12.0}


def features(*rows, width):
    return [F.normalize(torch.randn(n, width, dtype=torch.float64), dim=-1) for n in rows]


def objective(teacher=TEACHER, width=8, steps=10, **values):
    c = LossConfig(**values)
    torch.manual_seed(0)
    return Objective(c, steps, width, teacher if c.needs_teacher else None)


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ({"value": 2.0, "start": 2, "until": 5}, [0, 0, 2, 2, 2, 0, 0]),
        ({"value": 0.0, "to": 6.0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"value": 4.0, "to": 0.0, "end": 4}, [4, 3, 2, 1, 0, 0, 0]),
        ({"value": 1.0, "to": 3.0, "start": 1, "end": 3, "until": 5}, [0, 1, 2, 3, 3, 0, 0]),
    ],
)
def test_schedules(schedule, weights):
    s = Schedule(**schedule)
    assert [s.at(step, 7) for step in range(7)] == pytest.approx(weights)


@pytest.mark.parametrize("base", ["contrastive", "sigmoid"])
def test_terms_are_the_losses_terms_times_the_weight_of_the_step(base):
    torch.manual_seed(1)
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0) if base == "sigmoid" else None
    x, y, tx, ty = *features(5, 5, width=6), *features(5, 5, width=6)
    # SigLipLoss knows no groups
    group = torch.arange(5) if base == "sigmoid" else torch.tensor([1, 2, 3, 1, 4])
    constant = {"contrastive_weight": 0.5, "interactive_weight": 1.0}
    weights = {
        "pm_weight": {"value": 1.0, "start": 3},
        "feature_weight": {"value": 4.0, "to": 0.0, "end": 8},
        "relational_weight": {"value": 2.0, "until": 5},
    }
    ours = objective(width=6, base=base, **constant, **weights)
    plain = losses.WIKDLoss(
        **dict.fromkeys(weights, 1), interactive_weight=1, divergence="kl", embed_dim=6
    )
    want = plain(x, y, scale, tx, ty, torch.tensor(12.0), output_dict=True, ids=group)
    # open_clip's name
    want = {name.replace("distill_loss", "relational_loss"): value for name, value in want.items()}
    if base == "sigmoid":
        want = {"sigmoid_loss": losses.SigLipLoss()(x, y, scale, bias)} | want
        del want["contrastive_loss"]
    for step, weights in ((0, (0.5, 2, 1, 4, 0)), (4, (0.5, 2, 1, 2, 1)), (6, (0.5, 0, 1, 1, 1))):
        total, terms = ours(step, x, y, scale, bias, group, tx, ty)
        assert total.item() == pytest.approx(sum(terms.values()).item())
        assert list(terms) == list(want), "the columns of metrics.csv must not change on the way"
        for (name, value), weight in zip(terms.items(), weights):
            assert value.item() == pytest.approx(weight * want[name].item(), rel=1e-6), (step, name)


def test_a_term_that_is_off_is_not_computed(monkeypatch):
    ours = objective(width=6, feature_weight={"value": 1.0, "start": 5})
    x, y, tx, ty = *features(3, 3, width=6), *features(3, 3, width=6)
    args = (x, y, torch.tensor(10.0), None, torch.arange(3), tx, ty)
    monkeypatch.setattr(losses.wikd.ops, "feature_loss", lambda *_, **__: 1 / 0)
    assert ours(4, *args)[1]["feature_loss"] == 0
    with pytest.raises(ZeroDivisionError):
        ours(5, *args)


def test_several_captions_are_pairs_with_their_image_and_no_negatives_of_each_other():
    torch.manual_seed(2)
    x, y = features(3, 6, width=8)
    got = objective()(0, x, y, torch.tensor(10.0), None, torch.arange(3))[0]
    assert torch.equal(objective()(0, x, y, torch.tensor(10.0), None, None)[0], got), (
        "groups that are all different"
    )
    logits = 10 * x @ y.T  # [3, 6]; the columns 2i and 2i + 1 are captions of image i
    rows = columns = 0.0
    for i in range(3):
        for c in (2 * i, 2 * i + 1):
            other = [j for j in range(6) if j // 2 != i or j == c]
            rows = rows - F.log_softmax(logits[i, other], 0)[other.index(c)] / 6
            # The batch repeats each image once for each of its captions.
            negatives = [logits[[j], c].repeat(2) for j in range(3) if j != i]
            seen = torch.cat([logits[[i], c], *negatives])
            columns = columns - F.log_softmax(seen, 0)[0] / 6
    assert got.item() == pytest.approx(0.5 * (rows + columns).item(), rel=1e-6)


def test_sigmoid_and_pair_matching():
    """Values and gradients are those of the dense form and of ClipPMLoss, weighted."""
    torch.manual_seed(3)
    x, y = (t.requires_grad_() for t in features(6, 6, width=8))
    scale, bias = torch.tensor([9.0, -4.0], dtype=torch.float64, requires_grad=True).unbind()
    group = torch.tensor([1, 2, 3, 1, 4, 5])
    ours = objective(base="sigmoid", contrastive_weight=0.5, pm_weight={"value": 2.0, "start": 1})
    matching = losses.ClipPMLoss().double()
    ours.loss.double()
    assert ours.loss.pm_weight == 2.0, "the loss knows the largest weight of the schedule"
    pair = torch.eye(6, dtype=torch.bool)
    logits = scale * x @ y.T + bias
    every = F.softplus(torch.where(pair, -logits, logits))
    dense = every.masked_fill((group[:, None] == group) & ~pair, 0).sum() / 6
    for step, weights in ((0, (0.5, 0.0)), (1, (0.5, 2.0))):
        torch.manual_seed(4)
        total, terms = ours(step, x, y, scale, bias, group)
        torch.manual_seed(4)
        other = matching(x, y, scale, output_dict=True, ids=group)["pair_matching_loss"]
        want = {"sigmoid_loss": weights[0] * dense, "pair_matching_loss": weights[1] * other}
        assert list(terms) == list(want)
        torch.testing.assert_close(dict(terms), want, check_dtype=False)
        assert not any(term.requires_grad for term in terms.values())
        learned = [x, y, scale, bias, ours.loss.plane_weight, ours.loss.plane_bias]
        inputs = [x, y, scale, bias, matching.plane_weight, matching.plane_bias]
        flags = {"retain_graph": True, "materialize_grads": True}
        expected = torch.autograd.grad(sum(want.values()), inputs, **flags)
        got = torch.autograd.grad(total, learned, **flags)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_groups_that_are_all_different_are_not_passed_by_one_rank(monkeypatch):
    state = types.SimpleNamespace(device=torch.device("cpu"))
    batches = [{"group": torch.tensor(groups)} for groups in ([3, 1], [2, 5])]
    assert groups_of(state, batches) is None
    repeated = [*batches, {"group": torch.tensor([1])}]
    assert groups_of(state, repeated).tolist() == [3, 1, 2, 5, 1]
    monkeypatch.setattr(ranks, "count", lambda: 2)  # another rank may have the same group
    assert groups_of(state, batches).tolist() == [3, 1, 2, 5]
