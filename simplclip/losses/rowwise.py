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
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.registry import autocast, check_reverse_mode, first_order_only, no_autocast, transforms, wants_grad
from simplclip.ops.similarity.sweep import chunk_rows, computes_in

# Matrices of a chunk at a time: the product, its gradient, and about two that fn keeps or its gradient makes.
_LIVE = 4
_CPU_BYTES = 16 << 20  # of one of them on a CPU, and a quarter for bfloat16
_ADDED_ROWS, _MULTIPLIED_ROWS = 2048, 512  # at a time, of products and of gradients in bfloat16


class RowwiseLoss(SimilarityLoss):
    r"""The mean of a function of the user's own over the rows, and over the columns, of the similarity matrix.

        Z = s · image · textᵀ + b          T = ŝ · x̂ · ŷᵀ, a teacher's logits, where its features are given
        loss = ½ [ mean_i fn(Z_i, y_i, T_i) + mean_j fn(column j of Z, y_j, column j of T) ]

    where y_i is the column of row i's positive. With symmetric=False the loss is the mean over the rows alone. The N×M matrix
    is never stored: chunks of rows are computed, autograd differentiates fn at once, and both products of its gradient are
    added up in the forward pass. Focal InfoNCE, for example:

        def focal(logits, positives):
            cross_entropy = F.cross_entropy(logits, positives, reduction="none")
            return (1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy

        loss = RowwiseLoss(focal)
        value = loss(image_features, text_features, logit_scale)

    Args:
        fn: fn(logits [R, M], positives [R] int64) -> [R] in plain torch, or with a teacher fn(logits, positives,
            teacher_logits [R, M]). It must treat each row by itself, since a chunk has any number R of rows. The logits are
            float32 (float64 for float64 features) and autocast is disabled. fn may be an nn.Module, whose parameters are
            trained as those of this loss, and may draw random numbers. Its gradient reaches the logits and the parameters.
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss; see SimilarityLoss for the
            values and gradients of each mode. use_horovod is not supported with several ranks.
        parameters: the nn.Parameters that fn reads, if fn is a function with trainable parameters.
        symmetric: whether the columns count too.
        compile: whether to compile fn with torch.compile (dynamic=True, so that a chunk of other size compiles nothing).
            Where that fails, e.g. because there is no C++ compiler, fn runs uncompiled and a warning says why.

    `scratch_bytes`, the budget of one [R, M] matrix of a chunk, may be set on an instance. On a CPU it is at most 16 MiB or
    128 rows (bfloat16: 4 MiB or 256 rows); elsewhere a chunk has at most 1024 rows.

    Cost: 3 matrix products of N·M·D a direction, all in the forward pass: 6 if symmetric, as many as of open_clip's losses,
    which make the logits of each direction. Dense torch that keeps one matrix for both needs 3. Without a gradient to
    compute, 1 a direction; features that need no gradient save theirs; a teacher adds 1 a direction. backward multiplies the
    stored gradients by a number, so it can be run again with retain_graph.

    Memory: stored for backward are the gradients [N, D] and [M, D], those of the scale, the bias and the parameters. They are
    in float32 (float64 for float64), i.e. in full precision for a loss scaled by a GradScaler, except those of bfloat16
    features: these are summed in float32 and rounded once a direction. During the sweep about 4 matrices [R, M], more where
    fn runs uncompiled and makes more of them, and for bfloat16 the gradients of up to 512 rows. With world_size > 1, in
    addition the gathered features, and each direction stores gradients of its own.

    Products are in the features' dtype (float32 on a CPU for float16, and for bfloat16 without instructions for it), sums in
    float32 or float64. Only first derivatives in reverse mode are supported, except under simplclip.backend("reference"),
    where the loss is the formula in plain torch, which stores the matrix, and which torch.vmap needs. Under torch.compile the
    loss breaks the graph. For meta and fake tensors fn is not compiled.

    Source: this library; for losses as of Robinson et al. 2021 (arXiv 2010.04592), Chuang et al. 2022 (arXiv 2201.04309).
    """

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
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod,
            pm_weight=0.0, plane="scalar", embed_dim=None,
        )  # fmt: skip
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
        """Copies and pickles compile fn again: compiled, it would still be this object's."""
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
        dist_image_features, dist_text_features, dist_logit_scale: x̂, ŷ and ŝ of a teacher, all three or none. They are
        constants.

        Raises:
            TypeError, ValueError: an argument or the result of fn is not valid; the message names it.
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
        checks.like("text_features", text_features, "image_features", image_features)
        n, m, device = image_features.shape[0], text_features.shape[0], image_features.device
        if text_features.shape[1] != image_features.shape[1]:
            width = image_features.shape[1]
            raise ValueError(f"text_features: expected the width of image_features, {width}, got {text_features.shape[1]}")
        if m < n or (self.world_size > 1 and m > n):
            least = f"{n} rows" if self.world_size > 1 else f"at least {n} rows"
            raise ValueError(f"text_features: expected {least}, a positive for each image, got {m}")
        image, text = autocast(image_features, text_features)
        stats = accumulate_dtype(image.dtype)
        scale = checks.scalar("logit_scale", logit_scale, device, stats, "image_features")
        bias = checks.scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, device, stats, "image_features")
        teacher = self._teacher(image, text, dist_image_features, dist_text_features, dist_logit_scale)

        if self._rows is None:
            self._rows = _Rows(self.fn, self.compile_fn)
        self._rows.parameters = [p for p in self.parameters() if p.requires_grad]
        if self.world_size <= 1:
            value = _Sweep(self._rows, teacher, 0, self.symmetric, self.scratch_bytes).loss(image, text, scale, bias)
        else:
            value = self._of_ranks(image, text, scale, bias, teacher)
        value = self._value(value)
        return {"rowwise_loss": value} if output_dict else value

    def _of_ranks(self, image, text, scale, bias, teacher) -> Tensor:
        """The loss of this rank's rows and columns, each against the features of all ranks."""
        group = self._group()
        constant = self.local_loss and not self.gather_with_grad
        offset = torch.distributed.get_rank(group) * image.shape[0]

        def direction(own, others, own_teacher, others_teacher):
            others = distributed.gather(others.detach() if constant else others, group)
            if teacher:
                own_teacher = own_teacher, distributed.gather(others_teacher, group), teacher[2]
            return _Sweep(self._rows, own_teacher, offset, False, self.scratch_bytes).loss(own, others, scale, bias)

        teacher_image, teacher_text = teacher[:2] if teacher else (None, None)
        value = direction(image, text, teacher_image, teacher_text)
        return 0.5 * (value + direction(text, image, teacher_text, teacher_image)) if self.symmetric else value

    @staticmethod
    def _teacher(image: Tensor, text: Tensor, teacher_image, teacher_text, teacher_scale):
        """The teacher's features in the dtype of the student's, and its scale; None without a teacher."""
        given = {"dist_image_features": teacher_image, "dist_text_features": teacher_text, "dist_logit_scale": teacher_scale}
        if all(value is None for value in given.values()):
            return None
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"{missing[0]}: expected a value, since other arguments of the teacher are given, got None")
        features = []
        for (name, value), own, letters in zip(given.items(), (image, text), ("[N, D̂]", "[M, D̂]")):
            checks.features(name, value, letters)
            if value.shape[0] != own.shape[0]:
                raise ValueError(f"{name}: expected {own.shape[0]} rows, as the student's features, got {value.shape[0]}")
            if value.device != own.device:
                raise ValueError(f"{name}: expected the device of the student's features, {own.device}, got {value.device}")
            features.append(checks.constant(name, value).to(own.dtype).contiguous())
        if features[0].shape[1] != features[1].shape[1]:
            widths = [t.shape[1] for t in features]
            raise ValueError(f"dist_text_features: expected the width of dist_image_features, {widths[0]}, got {widths[1]}")
        stats = accumulate_dtype(image.dtype)
        scale = checks.scalar("dist_logit_scale", teacher_scale, image.device, stats, "image_features")
        return *features, checks.constant("dist_logit_scale", scale)


class _Rows:
    """fn applied to a chunk's products, compiled where possible, with checks of its result."""

    def __init__(self, fn: Callable, compile: bool):
        def rows(product, scale, bias, positives, teacher_product, teacher_scale):
            logits = product.to(scale.dtype) * scale + bias
            if teacher_product is None:
                return fn(logits, positives)
            return fn(logits, positives, teacher_product.to(scale.dtype) * teacher_scale)

        self.plain = rows
        self.compiled = None
        self.parameters: list[nn.Parameter] = []
        if compile:
            # Dynamo counts the compilations of a code object: of a shared one, the ninth loss would run uncompiled.
            own = types.FunctionType(rows.__code__.replace(), rows.__globals__, rows.__name__, None, rows.__closure__)
            self.compiled = torch.compile(own, dynamic=True)

    def __call__(self, *arguments) -> Tensor:  # those of `rows` -> [R]
        product = arguments[0]
        if self.compiled is None or product.is_meta or type(product) is not Tensor:  # meta and fake tensors compile nothing
            return self.checked(self.plain(*arguments), product)
        try:
            result = self.compiled(*arguments)
        except TorchDynamoException as error:
            result = self.plain(*arguments)  # an error of fn itself appears here
            self.compiled = None
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            warnings.warn(f"RowwiseLoss: fn runs uncompiled, since torch.compile failed: {lines[0]}", stacklevel=2)
        return self.checked(result, product)

    def checked(self, result, product) -> Tensor:
        r = product.shape[0]
        if not isinstance(result, Tensor):
            raise TypeError(f"fn: expected a tensor [R] = [{r}], got {type(result).__name__}")
        if result.shape != (r,):
            raise ValueError(f"fn: expected [R] = [{r}], got {checks.shape_of(result)}")
        checks.floating("fn", result)
        return result

    def gradients(self, leaves: list[Tensor], positives, teacher_product, teacher_scale) -> tuple[Tensor, tuple]:
        """The result [R], and the gradients of its sum for product, scale and bias (the leaves) and for the parameters."""
        inputs = [*leaves, *self.parameters]
        with torch.enable_grad():
            result = self(*leaves, positives, teacher_product, teacher_scale)
            self._check_graph(result, inputs)
            return result.detach(), torch.autograd.grad(result, inputs, torch.ones_like(result), allow_unused=True)

    def _check_graph(self, result: Tensor, inputs: list[Tensor]) -> None:
        """Raises if the result does not depend on the logits, or depends on parameters whose gradient would be lost."""
        found, nodes, seen = [], [result.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found += [node.variable] if hasattr(node, "variable") else []
                nodes += [following for following, _ in node.next_functions]
        if not any(t is inputs[0] for t in found):
            raise ValueError("fn: expected a result with a gradient for the logits, got one that does not depend on them")
        for t in found:
            if not any(t is known for known in inputs):
                raise ValueError(f"parameters: expected all that fn reads, got none for a parameter {checks.shape_of(t)}")


@dataclass
class _Sweep:
    """One sweep over the rows, and if symmetric over the columns, of a similarity matrix."""

    rows: _Rows
    teacher: tuple[Tensor, Tensor, Tensor] | None  # features [N, D̂] and [M, D̂] in the student's dtype, scale []
    offset: int  # column of the first row's positive
    symmetric: bool  # then the offset is 0
    scratch_bytes: int

    @torch.compiler.disable
    def loss(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if backends.forced() == "reference":
            return self._definition(image, text, scale, bias)
        leaves = (image, text, scale, bias, *self.rows.parameters)
        check_reverse_mode("RowwiseLoss", leaves)
        if "vmap" in transforms():
            raise NotImplementedError(
                "RowwiseLoss: expected the features of one batch, got a call under torch.vmap; "
                'run it under simplclip.backend("reference")'
            )
        return _Loss.apply(self, *leaves) if wants_grad(*leaves) else _run(self, leaves, [False] * len(leaves))[0]

    def _definition(self, image, text, scale, bias):
        n = image.shape[0]
        positives = torch.arange(self.offset, self.offset + n, device=image.device)
        product, teacher_product, teacher_scale = image @ text.T, None, None
        if self.teacher:
            teacher_product, teacher_scale = self.teacher[0] @ self.teacher[1].T, self.teacher[2]

        def mean(product, teacher_product):
            rows = self.rows.plain(product, scale, bias, positives, teacher_product, teacher_scale)
            return self.rows.checked(rows, product).to(scale.dtype).mean()

        value = mean(product, teacher_product)
        if not self.symmetric:
            return value
        return 0.5 * (value + mean(product[:, :n].T, None if teacher_product is None else teacher_product[:, :n].T))


def _run(sweep: _Sweep, leaves, needs) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and for those leaves that need it the gradient of the sum over the rows of all directions."""
    image, text, scale, bias, *_ = leaves
    n = image.shape[0]
    compute = computes_in(image.dtype, image.device.type)
    kept = image.dtype if image.dtype == torch.bfloat16 else scale.dtype  # float16 would lose small gradients
    dtypes = [kept, kept] + [scale.dtype] * len(leaves[2:])
    with torch.no_grad(), no_autocast(image.device):
        totals = [torch.zeros_like(t, dtype=d) if need else None for t, d, need in zip(leaves, dtypes, needs)]
        x, y = (t.detach().to(compute).contiguous() for t in (image, text))
        teacher = sweep.teacher or (None, None, None)
        x_teacher, y_teacher = (None if t is None else t.to(compute) for t in teacher[:2])
        value = _direction(sweep, (x, y), (x_teacher, y_teacher, teacher[2]), (scale, bias), sweep.offset, totals)
        if sweep.symmetric:
            totals[:2] = totals[1], totals[0]
            swapped = (y_teacher, x_teacher, teacher[2])
            value = 0.5 * (value + _direction(sweep, (y[:n], x), swapped, (scale, bias), 0, totals))
            totals[:2] = totals[1], totals[0]
    return value, totals


def _most_rows(x: Tensor, m: int, stats: torch.dtype, scratch_bytes: int) -> int:
    """Rows of a chunk. On a CPU its matrices should stay in the cache, but products are slow with few rows."""
    live = _LIVE
    if x.device.type == "cpu":
        live, most_bytes, least = (1, _CPU_BYTES // 4, 256) if x.dtype == torch.bfloat16 else (2, _CPU_BYTES, 128)
        scratch_bytes = min(scratch_bytes, max(most_bytes, least * m * stats.itemsize))
    return chunk_rows(x.shape[0], m, stats, x.device.type, live, scratch_bytes)


def _direction(sweep: _Sweep, features, teacher, scalars, offset: int, totals) -> Tensor:
    """The mean over the rows. Adds the gradients of the sum over the rows to the totals that are not None."""
    x, y = features
    n, m, stats = x.shape[0], y.shape[0], scalars[0].dtype
    gradient = any(total is not None for total in totals)
    kept = None if totals[1] is None else totals[1].dtype
    totals[1] = None if kept is None else totals[1].to(stats)  # every chunk adds to it
    count = -(-n // _most_rows(x, m, stats, sweep.scratch_bytes))
    losses = torch.empty(n, device=x.device, dtype=stats)
    scalars = [t.detach().requires_grad_(gradient) for t in scalars]
    # Gradients in bfloat16 wait for those of the next chunks, since each product is added to sums in float32.
    most, first = -(-n // count), 0
    together = min(n, _MULTIPLIED_ROWS, sweep.scratch_bytes // (m * x.element_size()))
    waiting = x.new_empty(together if gradient and x.dtype == torch.bfloat16 and most < together else 0, m)
    for start, stop in ((n * k // count, n * (k + 1) // count) for k in range(count)):
        rows = x[start:stop]
        product = torch.mm(rows, y.T)
        teacher_product = None if teacher[0] is None else torch.mm(teacher[0][start:stop], teacher[1].T)
        positives = torch.arange(offset + start, offset + stop, device=x.device)
        if not gradient:
            losses[start:stop] = sweep.rows(product, *scalars, positives, teacher_product, teacher[2])
            continue
        if product.dtype == torch.float16:  # its gradient is scaled before it is rounded to float16
            product = product.to(stats)
        leaves = [product.requires_grad_(), *scalars]
        losses[start:stop], (g, *others) = sweep.rows.gradients(leaves, positives, teacher_product, teacher[2])
        del product, leaves, teacher_product
        exponent = None
        if g.dtype != x.dtype:
            exponent = torch.frexp(torch.linalg.vector_norm(g, torch.inf)).exponent.clamp(min=-100)
            g = torch.ldexp(g, -exponent).to(x.dtype)
        if len(waiting):
            waiting[start - first : stop - first] = g
            g = waiting[: stop - first]
        if stop == n or stop - first + most > len(waiting):
            _add_product(None if totals[0] is None else totals[0][first:stop], g, y, exponent)
            _add_product(totals[1], g.T, x[first:stop], exponent)
            first = stop
        for total, other in zip(totals[2:], others):
            if total is not None and other is not None:
                total += other
    totals[1] = None if kept is None else totals[1].to(kept)
    return losses.mean()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, exponent: Tensor | None) -> None:
    """total += 2^exponent a b"""
    if total is None:
        return
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for part, rows in zip(total.split(_ADDED_ROWS), a.split(_ADDED_ROWS)):  # whose product stays in the cache
        product = torch.mm(rows, b)
        part += product if exponent is None else torch.ldexp(product.to(total.dtype), exponent)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sweep, *leaves):
        value, totals = _run(sweep, leaves, ctx.needs_input_grad[1:])
        ctx.save_for_backward(value, *totals)
        ctx.dtypes = [t.dtype for t in leaves]
        ctx.share = (0.5 if sweep.symmetric else 1.0) / leaves[0].shape[0]
        return value

    @staticmethod
    def backward(ctx, grad):
        value, *totals = ctx.saved_tensors
        with torch.no_grad():
            pairs = zip(totals, ctx.dtypes)
            out = [None if total is None else (ctx.share * grad * total).to(dtype) for total, dtype in pairs]
        if torch.is_grad_enabled():  # with create_graph=True
            out = first_order_only("RowwiseLoss", out, value, grad)
        return None, *out
