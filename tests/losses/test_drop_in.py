"""The losses in the place of open_clip's losses, also of subclasses of those."""

import inspect

import open_clip.loss
import plain
import pytest
import recorded
import torch
import torch.nn.functional as F

from simplclip import losses

N, VOCABULARY = 12, 9


def features(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(N, 16, generator=g), dim=1)
    text = F.normalize(torch.randn(N, 16, generator=g) + 3 * image, dim=1)
    leaves = [image.to(dtype), text.to(dtype), torch.tensor(14.0), torch.tensor(-10.0)]
    return [t.requires_grad_() for t in leaves]


def tokens():
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 5, VOCABULARY, generator=g), torch.randint(0, VOCABULARY, (N, 5), generator=g)


def of_images(loss, image, text, scale, bias, **options):
    return loss(image, text, scale, **options)


def with_bias(loss, *leaves, **options):
    return loss(*leaves, **options)


def without_bias(loss, image, text, scale, bias, **options):
    return loss(image, text, scale, None, **options)


def of_captions(loss, image, text, scale, bias, **options):
    return loss(image, text, *tokens(), scale, **options)


def with_teacher(loss, image, text, scale, bias, **options):
    return loss(image, text, scale, text.detach(), image.detach().roll(1, 0), torch.tensor(20.0), **options)


COCA = {"caption_loss_weight": 2.0, "clip_loss_weight": 0.7}
# open_clip's class, this library's class, options of both, options of the latter, and the call.
CASES = [
    ("ClipLoss", "ClipLoss", {}, {}, of_images),
    ("ClipLoss", "ClipLoss", {}, {}, with_bias),
    ("ClipLoss", "ClipPMLoss", {}, {"pm_weight": 0}, of_images),
    ("ClipLoss", "ClipPMLoss", {}, {"pm_weight": 0}, with_bias),
    ("DistillClipLoss", "WIKDLoss", {}, {}, with_teacher),
    ("SigLipLoss", "SigLipLoss", {}, {}, with_bias),
    ("SigLipLoss", "SigLipLoss", {}, {}, without_bias),
    ("CoCaLoss", "CoCaLoss", COCA, {}, of_captions),
    ("CoCaLoss", "CoCaLoss", COCA | {"clip_loss_weight": 0.0, "pad_id": 3}, {}, of_captions),
]


@pytest.mark.parametrize(("theirs", "ours", "options", "own", "call"), CASES)
def test_is_open_clips_loss(theirs, ours, options, own, call):
    """Signature, values in both forms and gradients are open_clip's; a loss of the same name is an instance of its class."""
    classes = getattr(open_clip.loss, theirs), getattr(losses, ours)
    assert issubclass(classes[1], classes[0]) == (ours == theirs)
    for method in ("__init__", "forward"):
        expected, found = (inspect.signature(getattr(cls, method)).parameters for cls in classes)
        assert list(found)[: len(expected)] == list(expected)
        if method == "__init__":
            assert [p.default for p in found.values()][: len(expected)] == [p.default for p in expected.values()]
    results, names = [], []
    for cls, given in zip(classes, (options, options | own)):
        leaves, loss = features(), cls(**given)
        named, value = call(loss, *leaves, output_dict=True), call(loss, *leaves)
        values = value if isinstance(value, tuple) else (value,)
        assert list(loss.parameters()) == []
        total = sum(weight * v for weight, v in zip((1, 2), values))
        if total.requires_grad:
            total.backward()
        names.append(list(named))
        results.append((*named.values(), *values, *(t.grad for t in leaves)))
    assert names[0] == names[1]
    for expected, found in zip(*results, strict=True):
        if expected is None:
            assert found is None or not found.any()  # a bias gets a gradient of 0, as DistributedDataParallel needs
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class DRClipLoss(losses.ClipLoss):
    """A loss of the form of MobileCLIP's: it uses logits of student and teacher, and the base class's ground truth."""

    def forward(self, image, text, scale, teacher_image, teacher_text, teacher_scale):
        student = self.get_logits(image, text, scale)
        teacher = self.get_logits(teacher_image, teacher_text, teacher_scale)
        labels = self.get_ground_truth(image.device, student[0].shape[0])
        contrastive = sum(F.cross_entropy(logits, labels) for logits in student) / 2
        pairs = zip(student, teacher)
        distance = sum(F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean") for s, t in pairs) / 2
        return contrastive, distance


def test_a_loss_that_needs_the_logits():
    image, text, scale, _ = features()
    found = DRClipLoss()(image, text, scale, text.detach(), image.detach(), torch.tensor(20.0))
    expected = plain.similarity_loss(
        image, text, scale, terms=("contrastive", "relational"), teacher_image=text.detach(), teacher_text=image.detach(),
        teacher_scale=torch.tensor(20.0),
    )  # fmt: skip
    torch.testing.assert_close(found, tuple(expected.values()))


def test_sigmoid_with_pair_matching_is_one_sweep(monkeypatch):
    """The terms' sum costs the products of one term; terms that are not added up have gradients and sweeps of their own."""
    loss, leaves, swept = losses.SigLipLoss(pm_weight=0.5), features(), recorded.calls(monkeypatch)
    loss(*leaves).backward()
    assert [name for name, _ in swept] == ["similarity_sigmoid"]
    terms = loss(*leaves, output_dict=True)
    assert len(swept) == 3
    assert list(terms) == ["contrastive_loss", "pair_matching_loss"]
    other = features()
    plane = [p.detach().clone().requires_grad_() for p in (loss.plane_weight, loss.plane_bias)]
    expected = plain.similarity_loss(*other[:3], logit_bias=other[3], terms=("sigmoid", "pair_matching"), plane=plane)
    (expected["sigmoid"] + 0.5 * expected["pair_matching"]).backward()
    torch.testing.assert_close(terms["contrastive_loss"], expected["sigmoid"])
    torch.testing.assert_close(terms["pair_matching_loss"], 0.5 * expected["pair_matching"])
    for ours, theirs in zip([*leaves, loss.plane_weight, loss.plane_bias], [*other, *plane]):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_what_open_clip_4_asks_for():
    """chunk_size, a way of open_clip to save memory, changes nothing here, and world_size=0 means one process."""
    leaves = features()
    loss = losses.SigLipLoss(False, 0, 1, None, 32)
    assert loss.chunk_size == 32
    torch.testing.assert_close(loss(*leaves), losses.SigLipLoss()(*leaves), rtol=0, atol=0)
    torch.testing.assert_close(loss._loss(*leaves), losses.SigLipLoss()(*leaves))  # the method that open_clip's tests call
    for make in (losses.ClipLoss, losses.ClipPMLoss, losses.SigLipLoss):
        torch.testing.assert_close(make(world_size=0)(*leaves), make()(*leaves), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ClipPMLoss", "SigLipLoss"])
def test_ids_and_pair_matching(name):
    """Values and gradients of the dict's terms, of the sum and of `terms`; also compiled."""
    ids, loss = torch.arange(N) // 2, getattr(losses, name)(pm_weight=0.5).double()
    parameters = list(loss.parameters())
    leaves = [t.detach().double().requires_grad_() for t in features()]
    image, text, scale, bias = leaves
    first = "sigmoid" if name == "SigLipLoss" else "contrastive"
    dense = plain.similarity_loss(
        image, text, scale, terms=(first, "pair_matching"), logit_bias=bias, ids=ids, text_ids=ids, plane=parameters
    )
    expected = {"contrastive_loss": dense[first], "pair_matching_loss": 0.5 * dense["pair_matching"]}

    def same(ours, expected):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
        every = [*leaves, *parameters]
        pair = (torch.autograd.grad(value, every, retain_graph=True, materialize_grads=True) for value in (ours, expected))
        torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-10)

    terms = loss(*leaves, output_dict=True, ids=ids)
    assert list(terms) == list(expected)
    for term in terms:
        same(terms[term], expected[term])
    same(loss(*leaves, ids=ids), sum(expected.values()))
    weights = {first: 2.0, "pair_matching": 0.3}
    total, terms = loss.terms(image, text, scale, weights=weights, logit_bias=bias, ids=ids)
    same(total, 2 * dense[first] + 0.3 * dense["pair_matching"])
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(terms, {term: (weights[term] * dense[term]).detach() for term in weights})
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*leaves, ids=ids), loss(*leaves, ids=ids))


@pytest.mark.parametrize("frozen", [(), ("image",), ("text",), ("image", "text"), ("image", "text", "scale", "bias")])
def test_what_needs_no_gradient_costs_no_product(frozen, monkeypatch):
    leaves, swept = features(), recorded.calls(monkeypatch)
    for name, t in zip(("image", "text", "scale", "bias"), leaves):
        t.requires_grad_(name not in frozen)
    loss = losses.SigLipLoss()(*leaves)
    ((_, call),) = swept
    assert [call.need_image, call.need_text] == [name not in frozen for name in ("image", "text")]
    assert loss.requires_grad == (len(frozen) < 4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="dist_impl: expected one of 'bidir', 'shift', 'reduce', 'gather', got 'ring'"):
        losses.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="chunk_size: expected a number of rows, 0 or more, got -1"):
        losses.SigLipLoss(chunk_size=-1)
    with pytest.raises(TypeError, match="caption_loss_weight: expected a number, got str"):
        losses.CoCaLoss("2", 1.0)
    with pytest.raises(TypeError, match="label_smoothing"):
        losses.ClipLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match="plane: expected "):
        losses.ClipLoss().terms(*features()[:3], weights={"pair_matching": 1.0})


def test_the_module_lists_its_losses():
    assert set(losses.__all__) <= set(dir(losses))
