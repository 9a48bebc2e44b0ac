"""RowwiseLoss: a loss of the user's own over whole rows of the similarity matrix, which is never stored."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from simplclip.losses.base import SimilarityLoss
from simplclip.ops import backends, checks, distributed
from simplclip.ops.calls import accumulate_dtype
from simplclip.ops.registry import autocast, check_reverse_mode, first_order_only, no_autocast, wants_grad
from simplclip.ops.similarity import inputs
from simplclip.ops.similarity.chunks import SCRATCH_BYTES, chunk_rows, computes_in

STUDENT, TEACHER = ("image_features", "text_features"), ("dist_image_features", "dist_text_features", "dist_logit_scale")
# Each product of a bfloat16 gradient is added to a float32 sum.
_MULTIPLIED_ROWS = 512  # rows of the gradient that are multiplied at once: adding a product costs the same for any number
_ADDED_ROWS = 2048  # rows of the product that are added at once, so that they stay in the cache


class RowwiseLoss(SimilarityLoss):
    r"""The mean of a function of the user's own over the rows, and over the columns, of the similarity matrix.

        Z = s · image · textᵀ + b          T = ŝ · x̂ · ŷᵀ, a teacher's logits, where its features are given
        loss = ½ [ mean_i fn(Z_i, y_i, T_i) + mean_j fn(column j of Z, y_j, column j of T) ]

    where y_i is the column of row i's positive. With symmetric=False the loss is the mean over the rows alone. The N×M matrix
    is never stored: chunks of rows are computed, autograd differentiates fn at once, and both products of its gradient are
    added up in the forward pass. docs/losses.md has examples, such as the focal loss.

    Args:
        fn: fn(logits [R, M], positives [R] int64) -> [R] in plain torch, or with a teacher fn(logits, positives,
            teacher_logits [R, M]). It must treat each row by itself, since a chunk has any number R of rows. The logits are
            float32 (float64 for float64 features) and autocast is disabled. fn may be an nn.Module, whose parameters are
            trained as those of this loss, and may draw random numbers. Its gradient reaches the logits and the parameters.
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss; see SimilarityLoss for the
            values and gradients of each mode. use_horovod is not supported with several ranks.
        parameters: the nn.Parameters that fn reads, if fn is a function with trainable parameters.
        symmetric: whether the columns count too.
        compile: whether to compile fn with torch.compile (dynamic=True, so that a chunk of another size compiles nothing).
            Where that fails, e.g. because there is no C++ compiler, fn runs uncompiled and a warning says why.

    Cost: 3 matrix products of N·M·D a direction, all in the forward pass; 1 if no gradient is needed. Image or text features
    that need no gradient cost 1 less each, a teacher 1 more. backward only multiplies the stored gradients by a number.

    Memory: stored for backward are the gradients of features, scalars and parameters, in float32 (float64 for float64; for
    bfloat16 features in bfloat16, summed in float32). During the sweep about 4 matrices [R, M], more where fn is not
    compiled. `scratch_bytes`, the budget of one of them, may be set on an instance; on a CPU it is at most 16 MiB or 128 rows
    (bfloat16: 4 MiB or 256 rows), elsewhere R is at most 1024. Several ranks also store the gathered features' gradients.

    Products are in the features' dtype (float32 on a CPU for float16, and for bfloat16 without instructions for it), sums in
    float32 or float64. There are first derivatives in reverse mode alone, and no torch.vmap, except under
    simplclip.backend("reference"), where the loss is the formula in plain torch (and the gradients of fn's parameters are not
    averaged over ranks). Under torch.compile it breaks the graph.

    Source: this library; for losses as in Robinson et al. 2021 (arXiv 2010.04592), Chuang et al. 2022 (arXiv 2201.04309).
    """

    scratch_bytes = SCRATCH_BYTES

    def __init__(
        self,
        fn: Callable[..., Tensor],
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        parameters: Iterable[nn.Parameter] = (),
        symmetric: bool = True,
        compile: bool = True,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, pm_weight=0.0)
        if not callable(fn):
            raise TypeError(f"fn: expected a function or an nn.Module, got {type(fn).__name__}")
        checks.boolean("symmetric", symmetric)
        parameters = list(parameters)
        for other in (p for p in parameters if not isinstance(p, nn.Parameter)):
            raise TypeError(f"parameters: expected nn.Parameters, got {type(other).__name__}")
        self.fn, self.fn_parameters = fn, nn.ParameterList(parameters)
        self.symmetric, self.compile_fn = symmetric, compile
        self._rows: _Rows | None = None

    def __getstate__(self):
        """Leaves out the compiled fn, which belongs to this object: a copy or a pickle compiles fn again."""
        return {**self.__dict__, "_rows": None}

    def extra_repr(self) -> str:
        name = "" if isinstance(self.fn, nn.Module) else f"fn={getattr(self.fn, '__qualname__', self.fn)}, "
        return f"{name}symmetric={self.symmetric}, compile={self.compile_fn}"

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [M, D], M ≥ N; M = N with several ranks
        logit_scale: Tensor | float,  # []
        logit_bias: Tensor | float | None = None,  # []
        output_dict: bool = False,
        *,
        dist_image_features: Tensor | None = None,  # [N, D̂]
        dist_text_features: Tensor | None = None,  # [M, D̂]
        dist_logit_scale: Tensor | float | None = None,  # []
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss [], float32 (float64 for float64 features); with output_dict, as {"rowwise_loss": loss}.

        image_features, text_features: float32, bfloat16, float16 or float64, with the same dtype and device; under autocast
        they are cast to its dtype. Row i's positive is text i; with M > N the columns' direction covers the first N texts.
        dist_...: x̂, ŷ and ŝ of a teacher, all three or none. They are constants.

        Raises: TypeError, ValueError: an argument or the result of fn is not valid; the message names it.
        """
        image, text = self._own_features(image_features, text_features)
        return self._of(
            image, text, logit_scale, logit_bias, output_dict, dist_image_features=dist_image_features,
            dist_text_features=dist_text_features, dist_logit_scale=dist_logit_scale,
        )  # fmt: skip

    def _of(
        self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False, *,
        dist_image_features=None, dist_text_features=None, dist_logit_scale=None,
    ) -> Any:  # fmt: skip
        inputs.check_pair(dict(zip(STUDENT, (image_features, text_features))))
        n, m = image_features.shape[0], text_features.shape[0]
        if m < n or (self.world_size > 1 and m > n):
            least = f"{n} rows" if self.world_size > 1 else f"at least {n} rows"
            raise ValueError(f"text_features: expected {least}, a positive for each image, got {m}")
        features = autocast(image_features, text_features)
        stats, of = accumulate_dtype(features[0].dtype), "image_features"
        scale = checks.scalar("logit_scale", logit_scale, image_features.device, stats, of)
        bias = checks.scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features.device, stats, of)
        teachers: list[Tensor | None] = [None, None]
        teacher_scale = None
        given = dict(zip(TEACHER, (dist_image_features, dist_text_features, dist_logit_scale)))
        if any(value is not None for value in given.values()):
            student = dict(zip(STUDENT, features))
            *teachers, teacher_scale = inputs.constants_of_teacher(given, student, "other arguments of the teacher are given")

        directions, offset = [(0, 1), (1, 0)][: 1 + self.symmetric], 0
        if self.world_size > 1:  # the columns are those of all ranks
            group, constant = self._group(), self.local_loss and not self.gather_with_grad
            directions, offset = [(0, 2), (1, 3)][: 1 + self.symmetric], torch.distributed.get_rank(group) * n
            features += [distributed.gather(t.detach() if constant else t, group) for t in reversed(features)]
            teachers += [None if t is None else distributed.gather(t, group) for t in reversed(teachers)]
        self._rows = self._rows or _Rows(self.fn, self.compile_fn)
        self._rows.parameters = [p for p in self.parameters() if p.requires_grad]
        learned = self._learned(*self._rows.parameters)
        sweep = _Sweep(self._rows, directions, teachers, teacher_scale, n, offset, self.scratch_bytes, features[0].device)
        value = self._value(sweep.loss(*features, scale, bias, learned=learned))
        return {"rowwise_loss": value} if output_dict else value


class _Rows:
    """fn applied to a chunk's products, compiled where possible, with checks of its result."""

    parameters: list[nn.Parameter]  # that need a gradient

    def __init__(self, fn: Callable, compile: bool):
        def rows(product, scale, bias, positives, teacher_product, teacher_scale):
            logits = product.to(scale.dtype) * scale + bias
            if teacher_product is None:
                return fn(logits, positives)
            return fn(logits, positives, teacher_product.to(scale.dtype) * teacher_scale)

        self.plain, self.compiled = rows, None
        if compile:
            # Dynamo counts the compilations of a code object. If all losses shared one, the ninth would run uncompiled.
            own = types.FunctionType(rows.__code__.replace(), rows.__globals__, rows.__name__, None, rows.__closure__)
            self.compiled = torch.compile(own, dynamic=True)

    def __call__(self, product: Tensor, *others) -> Tensor:  # the arguments of `rows` -> [R]
        fake = product.is_meta or type(product) is not Tensor
        try:
            plain = self.compiled is None or fake or backends.forced() == "reference"
            result = (self.plain if plain else self.compiled)(product, *others)
        except TorchDynamoException as error:
            result = self.plain(product, *others)  # raises fn's own error if fn itself failed
            self.compiled = None
            reason = next(line.strip() for line in str(error).splitlines() if line.strip())
            warnings.warn(f"RowwiseLoss: fn runs uncompiled, since torch.compile failed: {reason}", stacklevel=2)
        r = product.shape[0]
        if not isinstance(result, Tensor):
            raise TypeError(f"fn: expected a tensor [R] = [{r}], got {type(result).__name__}")
        if result.shape != (r,):
            raise ValueError(f"fn: expected [R] = [{r}], got {checks.shape_of(result)}")
        checks.floating("fn", result)
        return result

    def gradients(self, leaves: list[Tensor], *others) -> tuple[Tensor, tuple]:
        """Returns fn's result [R] and the gradients of its sum to product, scale and bias (the leaves) and to parameters."""
        known = [*leaves, *self.parameters]
        with torch.enable_grad():
            result = self(*leaves, *others)
            read = _read_by(result)
            if not any(t is leaves[0] for t in read):
                raise ValueError("fn: expected a result with a gradient for the logits, got one that does not depend on them")
            for shape in [checks.shape_of(t) for t in read if not any(t is other for other in known)]:
                raise ValueError(f"parameters: expected all that fn reads, got none for a parameter {shape}")
            return result.detach(), torch.autograd.grad(result, known, torch.ones_like(result), allow_unused=True)


def _read_by(result: Tensor) -> list[Tensor]:
    """Returns the tensors that would get a gradient from autograd if the result were differentiated."""
    seen: set[Any] = {None}
    nodes = [result.grad_fn]
    while new := set(nodes) - seen:
        seen |= new
        nodes = [following for node in new for following, _ in node.next_functions]
    return [node.variable for node in seen if hasattr(node, "variable")]


@dataclass
class _Sweep:
    """One sweep over the rows, and if symmetric over the columns, of a similarity matrix."""

    rows: _Rows
    directions: list[tuple[int, int]]  # of each direction: the indices of its rows and of its columns among the features
    teachers: list[Tensor | None]  # a teacher's features, at the indices of the student's
    teacher_scale: Tensor | None  # []
    n: int  # rows of a direction
    offset: int  # column of the first row's positive
    scratch_bytes: int
    device: torch.device

    @torch.compiler.disable
    def loss(self, *leaves: Tensor, learned: tuple[Tensor, ...]) -> Tensor:  # leaves: features, scale, bias
        if backends.forced() == "reference":
            products = [(leaves[i][: self.n] @ leaves[j].T, self.others(i, j, 0, self.n)) for i, j in self.directions]
            losses = [self.rows(product, *leaves[-2:], *others) for product, others in products]
            return torch.stack(losses).to(leaves[-1].dtype).mean()
        leaves = (*leaves, *learned)
        check_reverse_mode("RowwiseLoss", leaves, vmap=False)
        return _Loss.apply(self, wants_grad(*leaves), *leaves)

    def others(self, i: int, j: int, start: int, stop: int) -> tuple:
        """Returns fn's arguments beside some rows of logits: positives' columns, a teacher's products and its scale."""
        x, y = self.teachers[i], self.teachers[j]
        positives = torch.arange(self.offset + start, self.offset + stop, device=self.device)
        return positives, None if x is None else torch.mm(x[start:stop], y.T), self.teacher_scale


def _most_rows(x: Tensor, m: int, stats: torch.dtype, scratch_bytes: int) -> int:
    """Returns the rows of a chunk. On a CPU a chunk's matrices should stay in the cache, but few rows make products slow."""
    live = 4  # matrices at a time: the product, its gradient, and about two that fn keeps or its gradient makes
    if x.device.type == "cpu":
        live, most_bytes, least = (1, 4 << 20, 256) if x.dtype == torch.bfloat16 else (2, 16 << 20, 128)
        scratch_bytes = min(scratch_bytes, max(most_bytes, least * m * stats.itemsize))
    return chunk_rows(x.shape[0], m, stats, x.device.type, live, scratch_bytes)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, size: Tensor | None) -> None:
    """Adds size · a b to `total`, unless that is None."""
    if total is None:
        return
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for part, rows in zip(total.split(_ADDED_ROWS), a.split(_ADDED_ROWS)):
        part += torch.mm(rows, b) if size is None else torch.mm(rows, b).to(part.dtype) * size


def _direction(sweep: _Sweep, features, scalars, totals, i: int, j: int) -> Tensor:
    """Returns the mean over a direction's rows. Adds the gradients of the rows' sum to the totals that are not None."""
    x, y, n, stats = features[i][: sweep.n], features[j], sweep.n, scalars[0].dtype
    gradient = any(total is not None for total in totals)
    kept = None if totals[j] is None else totals[j].dtype
    totals[j] = None if kept is None else totals[j].to(stats)  # every chunk adds to it
    count = -(-n // _most_rows(x, len(y), stats, sweep.scratch_bytes))
    edges, most, together = [n * k // count for k in range(count + 1)], -(-n // count), 1
    if gradient and x.dtype == torch.bfloat16:
        together = max(1, min(_MULTIPLIED_ROWS, sweep.scratch_bytes // (2 * len(y))) // most)
    losses = torch.empty(n, device=x.device, dtype=stats)
    scalars = [t.detach().requires_grad_(gradient) for t in scalars]
    for block in (edges[k : k + together + 1] for k in range(0, count, together)):
        first, last = block[0], block[-1]
        product, size = torch.mm(x[first:last], y.T), None
        for start, stop in zip(block, block[1:]):
            chunk, others = product[start - first : stop - first].detach(), sweep.others(i, j, start, stop)
            if not gradient:
                losses[start:stop] = sweep.rows(chunk, *scalars, *others)
                continue
            # A float16 gradient would lose small entries, so the gradient is divided by its largest entry first.
            chunk = (chunk.to(stats) if chunk.dtype == torch.float16 else chunk).requires_grad_()
            losses[start:stop], (g, *d_others) = sweep.rows.gradients([chunk, *scalars], *others)
            if g.dtype != product.dtype:
                size = torch.linalg.vector_norm(g, torch.inf).clamp(min=1e-30)
                g = (g / size).to(product.dtype)
            del chunk, others
            if together == 1:
                product = g
            else:
                product[start - first : stop - first] = g
            for total, d in zip(totals[len(features) :], d_others):
                if total is not None and d is not None:  # None: not needed, or fn does not read it
                    total += d
        if gradient:  # product is now its gradient
            _add_product(None if totals[i] is None else totals[i][first:last], product, y, size)
            _add_product(totals[j], product.T, x[first:last], size)
    totals[j] = None if kept is None else totals[j].to(kept)
    return losses.mean()


class _Loss(torch.autograd.Function):
    """The loss for autograd. forward also computes the gradients that leaves need; backward multiplies them by a number."""

    @staticmethod
    def forward(ctx, sweep, gradient, *leaves):
        k = len(sweep.teachers)
        image, scalars, rest = leaves[0], leaves[k : k + 2], len(leaves) - k
        compute, stats = computes_in(image.dtype, image.device.type), scalars[0].dtype
        kept = image.dtype if image.dtype == torch.bfloat16 else stats  # float16 would lose small gradients
        needs = [gradient and need for need in ctx.needs_input_grad[2:]]
        with no_autocast(image.device):
            dtypes = [kept] * k + [stats] * rest
            totals = [torch.zeros_like(t, dtype=d) if need else None for t, d, need in zip(leaves, dtypes, needs)]
            features = [t.detach().to(compute).contiguous() for t in leaves[:k]]
            sweep.teachers = [None if t is None else t.to(compute) for t in sweep.teachers]
            values = [_direction(sweep, features, scalars, totals, i, j) for i, j in sweep.directions]
            value = torch.stack(values).mean()
        ctx.save_for_backward(value, *totals)
        ctx.dtypes, ctx.share = [t.dtype for t in leaves], 1 / (len(sweep.directions) * sweep.n)
        return value

    @staticmethod
    def backward(ctx, grad):
        value, *totals = ctx.saved_tensors
        with torch.no_grad():
            pairs = zip(totals, ctx.dtypes)
            out = [None if total is None else (ctx.share * grad * total).to(dtype) for total, dtype in pairs]
        if torch.is_grad_enabled():  # with create_graph=True
            out = first_order_only("RowwiseLoss", out, value, grad)
        return None, None, *out
