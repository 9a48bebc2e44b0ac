"""Modules of a SiCLIP: shaped attention, the simplified parallel block (SAS-P), shared weights."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simplclip.common.errors import check_count
from simplclip.ops import checks, parallel_mlp, shaped_attention, simplified_block
from simplclip.ops.mlp.reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "SHARED_PARTS",
    "ShapedAttention",
    "SimplifiedBlock",
    "neighbour_groups",
    "share_weights",
]

NORMS: dict[str, Callable[..., Any]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
_FORWARDS = (nn.Linear.forward, nn.LayerNorm.forward, nn.RMSNorm.forward)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks, or a forward set on the instance."""
    forward = module._forward_hooks or module._forward_pre_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(forward or backward) or "forward" in module.__dict__


class ShapedAttention(nn.Module):
    """Multi-head shaped attention without value and output projections.

    ``[q|k] = x W_qk``, v = x split into heads, ``out = alpha v + beta softmax(q k^T / sqrt(K)) v -
    gamma C v`` with C uniform over the visible keys. W_q starts at zero and alpha = beta = gamma at
    one, so that a new module returns its input (with ``value`` or ``output``: an orthogonal map of
    it).

    Args:
        width: C, a multiple of ``heads``.
        heads: H.
        causal: token i attends to the tokens 0..i only.
        value, output: add a projection [C, C] before (value) or after (output) the attention.
        gamma: initial value of gamma. Below one, a new module adds ``(1 - gamma) C v``, a part of
            the mean of the tokens.

    forward(x [B, L, C], lengths [B] or None) -> [B, L, C]; see `ops.shaped_attention` for
    ``lengths``. Source: He & Hofmann 2023, arXiv 2311.01906; SiCLIP, arXiv 2411.14789.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = False,
        value: bool = False,
        output: bool = False,
        gamma: float = 1.0,
    ) -> None:
        """Makes the parameters, see the class; initial weights are drawn from torch's generator.

        Raises InputError for a width or heads below 1, ValueError for heads that do not divide the
        width, TypeError for a flag that is no bool.
        """
        super().__init__()
        check_count("width", width, 1)
        check_count("heads", heads, 1)
        for name, flag in (("causal", causal), ("value", value), ("output", output)):
            checks.check_boolean(name, flag)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.width = width
        self.heads = heads
        self.causal = causal
        self.qk = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False) if value else None
        self.output = nn.Linear(width, width, bias=False) if output else None
        self.alpha = nn.Parameter(torch.ones(heads))
        self.beta = nn.Parameter(torch.ones(heads))
        self.gamma = nn.Parameter(torch.full((heads,), checks.number("gamma", gamma)))
        with torch.no_grad():
            self.qk.weight[:width].zero_()
            self.qk.weight[width:].normal_(std=width**-0.5)
        for projection in (self.value, self.output):
            if projection is not None:
                nn.init.orthogonal_(projection.weight)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Returns the attention's output [B, L, C] for x [B, L, C].

        lengths: int [B], the valid tokens at the start of each sequence; None if all are valid.
        Raises ValueError or TypeError for another shape of x, and as `ops.shaped_attention`.
        """
        self._check(x)
        shape = (*x.shape[:2], self.heads, self.width // self.heads)
        q, k = self.qk(x).chunk(2, dim=-1)
        # Under autocast q and k have its dtype, but x may have another.
        v = x.to(q.dtype) if self.value is None else self.value(x)
        q, k, v = (t.reshape(shape) for t in (q, k, v))
        out = shaped_attention(
            q, k, v, self.alpha, self.beta, self.gamma, causal=self.causal, lengths=lengths
        )
        out = out.reshape(x.shape)
        return out if self.output is None else self.output(out)

    def _check(self, x: Tensor) -> None:
        """Raises ValueError unless x is a tensor [B, L, width]; the ops check everything else."""
        if isinstance(x, Tensor):
            checks.check_dense("x", x)
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.width:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected [B, L, {self.width}], got {got}")

    def extra_repr(self) -> str:
        """Returns width, heads and causal for `repr`."""
        return f"width={self.width}, heads={self.heads}, causal={self.causal}"


class SimplifiedBlock(ShapedAttention):
    """Simplified parallel transformer block (SAS-P) without skip connections.

    ``n = norm(x); out = attention_gain SA(n) + mlp_gain MLP(n)``, ``MLP(n) = W2 act(W1 n + b1) +
    b2``. The signal passes through the attention's alpha; therefore the MLP starts with a small
    gain.

    Args:
        width, heads, causal, gamma: as in `ShapedAttention`.
        mlp_ratio: F / C.
        norm: "layernorm" or "rmsnorm", which is x / sqrt(mean x² + eps) with eps = 1e-5. He &
            Hofmann's code computes x / (rms + eps). With their weights both agree where rms is
            about 1; where rms is 0.026 (a first layer), the result here is 0.7 % smaller.
        act: a key of `ACTIVATIONS`.
        value, output: projections of the attention; the authors keep them in the first and in the
            last block.
        attention_gain, mlp_gain: initial values of the two trainable gains.
        drop_path: probability that a sample skips the MLP in training. The attention is never
            dropped, since without a skip connection nothing would be left. In training, norm,
            attention and MLP then run as separate ops, and recompute has no effect.
        recompute: keep only the input for backward (a seventh of the memory), which then computes
            the block again.

    forward(x [B, L, C], lengths [B] or None) -> [B, L, C]. With ``lengths``, padded tokens do not
    influence valid ones; the output at padded tokens is that of the MLP and has no meaning.
    Source: He & Hofmann 2023, arXiv 2311.01906; SiCLIP, arXiv 2411.14789.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        causal: bool = False,
        norm: str = "layernorm",
        act: str = "gelu",
        value: bool = False,
        output: bool = False,
        gamma: float = 1.0,
        attention_gain: float = 1.0,
        mlp_gain: float = 0.1,
        drop_path: float = 0.0,
        recompute: bool = False,
    ) -> None:
        """Makes the parameters, see the class; initial weights are drawn from torch's generator.

        Raises as `ShapedAttention`, and ValueError or TypeError for an unknown norm or act, a
        drop_path outside [0, 1) or an mlp_ratio without a hidden unit.
        """
        super().__init__(width, heads, causal=causal, value=value, output=output, gamma=gamma)
        checks.check_choice("norm", norm, tuple(NORMS))
        checks.check_choice("act", act, tuple(ACTIVATIONS))
        checks.check_boolean("recompute", recompute)
        if not 0.0 <= checks.number("drop_path", drop_path) < 1.0:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
        self.hidden = round(width * checks.number("mlp_ratio", mlp_ratio))
        if self.hidden < 1:
            raise ValueError(
                f"mlp_ratio: expected at least one hidden unit, got {mlp_ratio} of width {width}"
            )
        self.act = act
        self.norm_name = norm
        self.drop_path = drop_path
        self.recompute = recompute
        self.norm = NORMS[norm](width, eps=1e-5)
        self.fc1 = nn.Linear(width, self.hidden)
        self.fc2 = nn.Linear(self.hidden, width)
        self.attention_gain = nn.Parameter(
            torch.tensor(checks.number("attention_gain", attention_gain))
        )
        self.mlp_gain = nn.Parameter(torch.tensor(checks.number("mlp_gain", mlp_gain)))
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Returns the block's output [B, L, C] for x [B, L, C].

        lengths: int [B], the valid tokens at the start of each sequence; None if all are valid. In
        training with drop_path it draws random numbers. Raises TypeError if a linear layer or norm
        was replaced or has hooks (LoRA, pruning), ValueError for another shape of x, and as
        `ops.simplified_block`.
        """
        self._check(x)
        for name, part in self._modules.items():
            if part is None:
                continue
            if has_hooks(part) or type(part).forward not in _FORWARDS:
                raise TypeError(
                    f"{name}: expected a Linear or norm as it was made, since the op reads its "
                    "weight and does not call it (LoRA, hooks, pruning and old weight_norm change "
                    f"calls), got {part}"
                )
        if self.training and self.drop_path > 0:
            n = self.norm(x)
            mlp = parallel_mlp(
                n, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, act=self.act
            )
            keep = 1 - self.drop_path
            drawn = torch.rand(x.shape[0], 1, 1, device=x.device) < keep
            mlp = mlp * drawn.to(mlp.dtype) / keep
            return self.attention_gain * super().forward(n, lengths) + self.mlp_gain * mlp
        return simplified_block(
            x,
            self.qk.weight,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            attention_gain=self.attention_gain,
            mlp_gain=self.mlp_gain,
            norm_weight=self.norm.weight,
            norm_bias=getattr(self.norm, "bias", None),
            norm=self.norm_name,
            eps=self.norm.eps,
            value_weight=getattr(self.value, "weight", None),
            output_weight=getattr(self.output, "weight", None),
            act=self.act,
            causal=self.causal,
            lengths=lengths,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        """Returns width, heads, causal, act and, if not 0, drop_path for `repr`."""
        text = f"{super().extra_repr()}, act={self.act}"
        if self.drop_path:
            text += f", drop_path={self.drop_path}"
        return text


def neighbour_groups(count: int, size: int = 2) -> list[list[int]]:
    """Returns groups of ``size`` neighbours: ``neighbour_groups(5) == [[0, 1], [2, 3], [4]]``.

    count: the number of blocks, whose indices are grouped.
    """
    check_count("count", count, 0)
    check_count("size", size, 1)
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


@dataclass(frozen=True)
class _Sharing:
    """What blocks of a group share, by the names of attributes."""

    matrices: tuple[str, ...]  # that a group shares
    gains: tuple[str, ...]
    equal: tuple[str, ...]  # must be equal in a group


_ATTENTION = _Sharing(
    matrices=("qk", "value", "output"),
    gains=("alpha", "beta", "gamma", "attention_gain"),
    equal=("width", "heads", "causal"),
)
_MLP = _Sharing(matrices=("fc1", "fc2"), gains=("mlp_gain",), equal=("width", "hidden", "act"))
_SHARINGS = {"attention": (_ATTENTION,), "mlp": (_MLP,), "all": (_ATTENTION, _MLP)}
SHARED_PARTS = tuple(_SHARINGS)


def share_weights(
    blocks: Sequence[SimplifiedBlock],
    groups: Iterable[Sequence[int]],
    what: str = "all",
    *,
    norms_and_gains: bool = False,
) -> None:
    """Lets the blocks of every group use the weights of the group's first block, in place.

    Norms and gains, a few vectors per block, are shared only with ``norms_and_gains``: without it
    every block keeps its own balance between identity, attention and MLP. ``parameters()`` counts a
    shared matrix once; ``state_dict()`` lists it under each of its names, so that a strict round
    trip works.

    Args:
        blocks: the blocks of a tower.
        groups: disjoint groups of indices of blocks. A second call may share another part among
            other groups, e.g. the attention of all blocks and the MLPs of pairs.
        what: "attention" for qk and, where blocks have them, value and output; "mlp" for fc1 and
            fc2 with their biases; "all" for both.
        norms_and_gains: share the gains of that part as well (attention: alpha, beta, gamma,
            attention_gain; MLP: mlp_gain), and with "all" the norm.

    Raises:
        ValueError: a group is empty, an index is out of range or in two groups, or the blocks of
            one group differ in width or in heads (attention), hidden units or activation (MLP),
            or in the kind of a norm that they share.
    """
    checks.check_choice("what", what, SHARED_PARTS)
    checks.check_boolean("norms_and_gains", norms_and_gains)
    for block in checks.sequence("blocks", blocks):
        checks.check_instance("blocks", block, ShapedAttention, "SimplifiedBlocks")
    groups = checks.groups("groups", groups)
    every = [index for group in groups for index in group]
    names: list[str] = []
    equal: list[str] = []
    for sharing in _SHARINGS[what]:
        names += sharing.matrices
        equal += sharing.equal
        if norms_and_gains:
            names += sharing.gains
    if norms_and_gains and what == "all":
        names.append("norm")
        equal.append("norm_name")
    for group in groups:
        if not group:
            raise ValueError("groups: expected at least one index in every group, got an empty one")
        for index in group:
            if not 0 <= index < len(blocks):
                raise ValueError(f"groups: expected indices of {len(blocks)} blocks, got {index}")
            if every.count(index) > 1:
                raise ValueError(f"groups: expected disjoint groups, got block {index} twice")
        for name in equal:
            values = [getattr(blocks[index], name) for index in group]
            if len(set(values)) > 1:
                raise ValueError(
                    f"groups: expected equal {name} within group {group}, got {values}"
                )
    for first, *others in groups:
        for index in others:
            _share(blocks[first], blocks[index], names)


def _share(source: SimplifiedBlock, block: SimplifiedBlock, names: list[str]) -> None:
    """Sets the source's modules and parameters of these names in a block, where both have them."""
    for name in names:
        shared = getattr(source, name)
        if shared is not None and getattr(block, name) is not None:
            setattr(block, name, shared)
