"""One small call of each op and loss: its float tensors, and a function of them that returns a number."""

import torch
import torch.nn.functional as F

from simplclip import losses, ops
from simplclip.nn import SimplifiedBlock

TERMS = ("contrastive", "pair_matching", "relational", "interactive")


def _random(shapes, dtype):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _features(n, dtype):
    """image, text, logit_scale, the teacher's image, text, scale: the student's and the scale require gradients."""
    rows = [F.normalize(torch.randn(n, 24, dtype=torch.float64), dim=1).to(dtype) for _ in range(4)]
    wide = torch.promote_types(dtype, torch.float32)
    scale, teacher_scale = torch.tensor(10.0, dtype=wide), torch.tensor(15.0, dtype=wide)
    return [*(t.requires_grad_() for t in (*rows[:2], scale)), *rows[2:], teacher_scale]


def similarity(**options):
    def function(image, text, scale, teacher_image, teacher_text, teacher_scale):
        ids = torch.arange(image.shape[0]) // 2
        call = {"terms": TERMS, "plane": (scale, -2.0), "ids": ids, **options}
        teacher = {"teacher_image": teacher_image, "teacher_text": teacher_text, "teacher_scale": teacher_scale}
        return sum(ops.similarity_loss(image, text, scale, **call, **teacher).values())

    return _features, function


def _hadamard(image, text, scale, *_):
    plane = (scale * torch.ones(image.shape[1]), -2.0)
    return ops.similarity_loss(image, text, scale, terms=("pair_matching",), plane=plane, negatives="hard")["pair_matching"]


def _number(out):
    return out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()


def _attention(q, k, v, *gains):
    return _number(ops.shaped_attention(q, k, v, *gains, causal=True))


def _mlp(*args):
    return _number(ops.parallel_mlp(*args))


def _block(recompute=False):
    def function(x, weight, *rest):
        return _number(ops.simplified_block(x, *rest, norm_weight=weight, recompute=recompute))

    def tensors(n, dtype):
        shapes = ((n, 5, 8), (8,), (16, 8), (12, 8), (12,), (8, 12), (8,), (2,), (2,), (2,))
        return _random(shapes, dtype)

    return tensors, function


CALLS = {
    "similarity_loss": similarity(),
    "similarity_loss hard kl": similarity(negatives="hard", interactive="kl"),
    "similarity_loss shift": similarity(negatives="shift"),
    "similarity_loss hadamard": (_features, _hadamard),
    "feature_loss": (_features, lambda image, text, scale, teacher, *_: ops.feature_loss(image, teacher)),
    "shaped_attention": (lambda n, dtype: _random([(n, 5, 2, 8)] * 3 + [(2,)] * 3, dtype), _attention),
    "parallel_mlp": (lambda n, dtype: _random(((n, 8), (12, 8), (12,), (8, 12), (8,)), dtype), _mlp),
    "simplified_block": _block(),
    "simplified_block recompute": _block(recompute=True),
}
# Tensors, the module, and how many of the tensors it takes.
MODULES = {
    "SimplifiedBlock": (lambda n, dtype: _random([(n, 5, 16)], dtype), lambda: SimplifiedBlock(16, 2), 1),
    "ClipPMLoss": (_features, losses.ClipPMLoss, 3),
    "WIKDLoss": (_features, lambda: losses.WIKDLoss(interactive_weight=1, feature_weight=1, pm_weight=1), 6),
}


def module_call(name, dtype=torch.float32, device="cpu"):
    """Tensors, a function of them and its module: a block in `dtype`, a loss in float32."""
    tensors, make, count = MODULES[name]
    module = make().to(device, dtype if name == "SimplifiedBlock" else None)

    def function(*args):
        out = module(*args[:count])
        return sum(out) if isinstance(out, tuple) else out if out.dim() == 0 else _number(out)

    return tensors, function, module
