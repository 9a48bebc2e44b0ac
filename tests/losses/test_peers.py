"""The table "coming from elsewhere" in simplclip.losses: each line is compared with the other library's loss.

CLIP-KD's src/open_clip/loss.py and GradCache's src/grad_cache/loss.py are written in plain torch; the kernels of memeff 0.3.1
and siglip-kernel 0.1.2 are interpreted on a CPU. For open_clip's losses see test_drop_in.py, for two ranks rank_losses.py.
"""

import importlib.util

import interpreter
import pytest
import torch
import torch.nn.functional as F
from paths import SUPPORT

from simplclip import ops
from simplclip.losses import ClipPMLoss, MatryoshkaLoss, WIKDLoss
from simplclip.nn import SimplifiedBlock

N = 24


def features(width=16, teacher_width=16, seed=0):
    """Returns float64 features: the student's image and text, not normalised; the teacher's, normalised."""
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(N, width, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    teacher = [F.normalize(torch.randn(N, teacher_width, generator=g, dtype=torch.float64), dim=1) for _ in range(2)]
    return student, teacher


def same(theirs, ours, leaves, times=1.0):
    """Checks that values are equal, and that their gradients are `times` this library's."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    wanted, got = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (theirs, ours))
    for w, g in zip(wanted, got):
        torch.testing.assert_close(times * g, w, rtol=1e-7, atol=1e-10)


def clip_kd(student, teacher, scale, teacher_scale, projections=None):
    """Returns CLIP-KD's losses by their names there, before weighting by the alphas."""
    image, text = student
    t_image, t_text = teacher
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    t_logits = teacher_scale * t_image @ t_text.T
    if projections is not None:
        image, text = (F.linear(x, w) for x, w in zip(student, projections))
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    across = scale * image @ t_text.T, scale * text @ t_image.T
    labels = torch.arange(N)
    kl = lambda s, t: F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")  # noqa: E731
    return {
        "task_loss": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2,
        "ckd_loss": (kl(logits, t_logits) + kl(logits.T, t_logits.T)) / 2,
        "icl_loss": (F.cross_entropy(across[0], labels) + F.cross_entropy(across[1], labels)) / 2,
        "cross_kd_loss": (kl(across[0], t_logits) + kl(across[1], t_logits.T)) / 2,
        "fd_loss": F.mse_loss(image, t_image) + F.mse_loss(text, t_text),
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "options", "teacher_width"),
    [
        ("task_loss", "contrastive_loss", {"contrastive_weight": 1.0}, 16),
        ("ckd_loss", "distill_loss", {"relational_weight": 0.7}, 16),
        ("icl_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "infonce"}, 16),
        ("icl_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "infonce"}, 20),
        ("cross_kd_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "kl"}, 16),
        ("cross_kd_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "kl"}, 20),
        ("fd_loss", "feature_loss", {"feature_weight": 2 * 0.7 / 16}, 16),
        ("fd_loss", "feature_loss", {"feature_weight": 2 * 0.7 / 20}, 20),
    ],
)
def test_clip_kd(theirs, ours, options, teacher_width):
    student, teacher = features(teacher_width=teacher_width)
    loss = WIKDLoss(
        **{"contrastive_weight": 0.0, "relational_weight": 0.0, **options}, divergence="kl", embed_dim=16,
        teacher_dim=teacher_width,
    ).double()  # fmt: skip
    leaves, projections = list(student), None
    if loss.image_projection is not None:
        projections = loss.image_projection, loss.text_projection
        leaves += projections
    scale, teacher_scale = torch.tensor(14.0, dtype=torch.float64), torch.tensor(30.0, dtype=torch.float64)
    alpha = 1.0 if theirs == "task_loss" else 0.7
    wanted = alpha * clip_kd(student, teacher, scale, teacher_scale, projections)[theirs]
    normalised = [F.normalize(x, dim=1) for x in student]
    same(wanted, loss(*normalised, scale, *teacher, teacher_scale, output_dict=True)[ours], leaves)


MEMEFF = [{"temperature": 0.2}, {"temperature": 1.0}]


def as_memeff(x, y, temperature):
    return ops.similarity_loss(x, y, 1 / temperature)["contrastive"]


SIGLIP = [{"img_gid": torch.arange(N), "txt_gid": torch.arange(N)}]


def of_siglip(case, dtype=torch.float32):
    (x, y), _ = features(seed=3)
    leaves = [F.normalize(t.detach(), dim=1) for t in (x, y)] + [torch.tensor(10.0), torch.tensor(-3.0)]
    return [t.to(dtype).requires_grad_() for t in leaves]


def as_siglip(x, y, scale, bias, img_gid, txt_gid):
    """Divides by the number of texts: this library's mean is over N rows, theirs over N M pairs."""
    return ops.similarity_loss(x, y, scale, logit_bias=bias, terms=("sigmoid",))["sigmoid"] / len(y)


def within(ours, theirs, tolerance):
    """Compares values and gradients, relative to the largest of each."""
    for got, wanted in zip(ours, theirs):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def test_matryoshka_of_memeff():
    """memeff wraps a loss that normalises its features itself."""
    reason = "memeff is not installed (pip install -e '.[dev]'), or triton, which it imports"
    theirs = pytest.importorskip("memeff.matryoshka", reason=reason, exc_type=ImportError)
    student, _ = features()
    scale = torch.tensor(14.0, dtype=torch.float64)
    widths, weights = (3, 8, 16), (0.5, 1.0, 2.0)

    class Clip(torch.nn.Module):
        def forward(self, x, y):
            logits, labels = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T, torch.arange(N)
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    ours = MatryoshkaLoss(ClipPMLoss(pm_weight=0), widths, weights)(*student, scale)
    same(theirs.MatryoshkaLoss(Clip(), widths, weights)(*student), ours, student)


@pytest.mark.slow
@interpreter.needs_interpreter
@pytest.mark.parametrize("package", ["memeff", "siglip_kernel"])
def test_their_own_kernels(package, tmp_path):
    """Neither package runs on a CPU by itself; memeff computes its exponentials in another domain, in float32."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install -e '.[dev]')")
    if package == "memeff":
        (x, y), _ = features()
        leaves = [[F.normalize(t.detach(), dim=1).float() for t in (x, y)] for _ in MEMEFF]
        cases, ours = MEMEFF, as_memeff
    else:
        leaves, cases, ours = [[t.detach() for t in of_siglip(case)] for case in SIGLIP], SIGLIP, as_siglip
    torch.save([(*t, case) for t, case in zip(leaves, cases)], tmp_path / "cases.pt")
    script = str(SUPPORT / "peers_interpreted.py")
    run = interpreter.run(script, package, str(tmp_path / "cases.pt"), str(tmp_path / "results.pt"))
    assert run.returncode == 0, run.stderr[-3000:]
    for of_case, case, theirs in zip(leaves, cases, torch.load(tmp_path / "results.pt")):
        for t in of_case:
            t.requires_grad_()
        value = ours(*of_case, **case)
        got = [value, *torch.autograd.grad(value, of_case)]
        within(got, theirs, 1e-5 if package == "memeff" else 1e-6)


def test_grad_cache():
    (x, y), _ = features()
    one = lambda a, b: F.cross_entropy(a @ b.T, torch.arange(N))  # noqa: E731
    same(one(x, y), ops.similarity_loss(x, y, 1.0, symmetric=False)["contrastive"], (x, y))
    both = ClipPMLoss(pm_weight=0)(x, y, torch.tensor(1.0, dtype=torch.float64))
    same((one(x, y) + one(y, x)) / 2, both, (x, y))


@pytest.mark.parametrize(("rms", "ratio"), [(0.026, 0.993), (1.0, 1.0)])
def test_rms_norm_of_he_and_hofmann(rms, ratio):
    norm = SimplifiedBlock(64, 2, norm="rmsnorm").norm.double()
    x = torch.randn(5, 64, dtype=torch.float64)
    x *= rms / x.square().mean(1, keepdim=True).sqrt()
    theirs = norm.weight * x / (x.norm(2, dim=-1, keepdim=True) * 64**-0.5 + norm.eps)
    torch.testing.assert_close(norm(x) / theirs, torch.full_like(x, ratio), rtol=1e-4, atol=0)
