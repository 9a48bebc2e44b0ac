"""RowwiseLoss: a loss of the user's own over rows of the similarity matrix, never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simplclip.calls.fields import accumulate_dtype
from simplclip.losses.base import NAMES, DistributedLoss
from simplclip.ops import checks
from simplclip.ops.modes import autocast, no_autocast
from simplclip.ops.similarity import inputs
from simplclip.ops.similarity.pairs import Pairs, Teacher

_LEAST_ROWS = 64  # of a chunk but the last: fewer make products slow


class RowwiseLoss(DistributedLoss):
    r"""The mean of a user's function over the rows and over the columns of the similarity matrix.

        Z = s · image · textᵀ + b
        T = ŝ · x̂ · ŷᵀ, a teacher's logits, where its features are given
        loss = ½ [ mean_i fn(Z_i, i, T_i) + mean_j fn(column j of Z, j, column j of T) ]

    where column i is the positive of row i. With symmetric=False the loss is the mean over only the
    rows. The N×M matrix is never stored: chunks of rows are computed, and once more in backward.
    docs/recipes.md has examples.

    Args:
        fn: fn(logits [R, M], index [R] int64) -> [R] in plain torch, or with a teacher fn(logits,
            index, teacher_logits [R, M]). `index` has the rows' numbers in the batch of all ranks,
            which are the columns of their positives: for ids of all N pairs, ids[index] are those
            of the rows. It must treat each row by itself, since a chunk has any number R of rows.
            The logits are float32 (float64 for float64 features) and autocast is disabled. fn may
            be an nn.Module, whose parameters are trained as those of this loss, and may draw random
            numbers. torch.compile(fn, dynamic=True) saves memory and time.
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss; see
            DistributedLoss for the values and gradients of each mode. use_horovod is not supported
            with several ranks.
        symmetric: whether the columns count too.

    Cost: 4 matrix products of N·M·D a direction, 1 if no gradient is needed. Image or text features
    that need no gradient cost 1 less each, a teacher 2 more. Products are in the features' dtype
    (float32 for float16), sums in float32 or float64.

    Memory: copies of the features in float32 (float64 for float64), their gradients, and about 4
    matrices [R, M] at a time, more where fn is not compiled. `scratch_bytes`, the size of one of
    them, may be set on an instance.

    Source: this library; for losses as in Robinson et al. 2021 (arXiv 2010.04592), Chuang et al.
    2022 (arXiv 2201.04309).
    """

    scratch_bytes = 16 << 20

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
        symmetric: bool = True,
    ) -> None:
        """Stores fn, see the class; the parameters of an nn.Module become parameters of this loss.

        symmetric: whether the columns count too. Other arguments, and errors, as in
        `DistributedLoss`; TypeError if fn cannot be called.
        """
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        if not callable(fn):
            raise TypeError(f"fn: expected a function or an nn.Module, got {type(fn).__name__}")
        checks.check_boolean("symmetric", symmetric)
        self.fn = fn
        self.symmetric = symmetric

    def extra_repr(self) -> str:
        """Returns symmetric, and the name of an fn that is no module, for `repr`."""
        symmetric = f"symmetric={self.symmetric}"
        if isinstance(self.fn, nn.Module):
            return symmetric
        return f"fn={getattr(self.fn, '__qualname__', self.fn)}, {symmetric}"

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
        """Returns the loss [], float32 (float64 for float64 features).

        With output_dict it is in a dict, {"rowwise_loss": loss}.

        image_features, text_features: float32, bfloat16, float16 or float64; under autocast they
        are cast to its dtype. Row i's positive is text i; with M > N the columns' direction covers
        the first N texts. dist_...: x̂, ŷ and ŝ of a teacher, all three or none. They are
        constants.

        Raises: TypeError, ValueError: features or the result of fn are not valid; the message names
        them.
        """
        checks.check_features("image_features", image_features, "[N, D]")
        checks.check_features("text_features", text_features, "[M, D]")
        image, text = autocast(image_features, text_features)
        values = (dist_image_features, dist_text_features, dist_logit_scale)
        given: Any = Teacher(*values) if any(value is not None for value in values) else None  # type: ignore[arg-type]
        pairs = Pairs(image, text, logit_scale, logit_bias, teacher=given)  # type: ignore[arg-type]
        if self.world_size > 1:
            pairs = self._check_and_scale_with_all_ranks(pairs)
        image, text = pairs.image, pairs.text
        inputs.check_features(NAMES, image, text, equal_rows=self.world_size > 1)
        n = len(image)
        if len(text) < n:
            got = checks.shape_of(text)
            raise ValueError(
                f"text_features: expected at least {n} rows, a positive for each image, got {got}"
            )
        teacher = None
        if pairs.teacher is not None:
            why = "a teacher has features and a scale"
            teacher = inputs.checked_teacher(pairs, NAMES, why)
            product_dtype = _product_dtype(image.dtype)
            teacher = replace(
                teacher, image=teacher.image.to(product_dtype), text=teacher.text.to(product_dtype)
            )
        dtype = accumulate_dtype(image.dtype)
        scale = checks.scalar("logit_scale", logit_scale, image.device, dtype)
        bias = None
        if logit_bias is not None:
            bias = checks.scalar("logit_bias", logit_bias, image.device, dtype)
        pairs = Pairs(image, text, scale, bias, teacher=teacher)
        columns = self._gathered(pairs, constant=self.local_loss and not self.gather_with_grad)
        fn = self._with_learned_parameters() if self.world_size > 1 else self.fn
        directions = [pairs.against(columns)]
        if self.symmetric:
            rows = _with_texts(pairs, n).swapped()
            directions.append(rows.against(columns.swapped()))
        with no_autocast(image.device):
            means = [self._mean(fn, direction) for direction in directions]
            value = sum(means) / len(means)
        if value.requires_grad:
            value = _Unchanged.apply(value, *_tensors_of(pairs))
        if self.world_size > 1:
            value = self._averaged_over_ranks(value)
        return {"rowwise_loss": value} if output_dict else value

    def _with_learned_parameters(self) -> Callable[..., Tensor]:
        """Returns fn with `_synchronised_parameters`, which must be all of this loss."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        outside = [name for name in parameters if not name.startswith("fn.")]
        if outside:
            raise TypeError(
                "fn: expected an nn.Module with all parameters of the loss, since ranks average "
                f"their gradients, got {', '.join(outside)} of {type(self).__name__} beside it"
            )
        learned = self._synchronised_parameters(*parameters.values())
        if not learned:
            return self.fn
        names = [name.removeprefix("fn.") for name in parameters]
        module: Any = self.fn
        return partial(_call, module, dict(zip(names, learned)))

    def _mean(self, fn: Callable[..., Tensor], direction: Pairs) -> Any:
        """Returns the mean [] of fn over images as rows, with texts of all ranks as columns."""
        rows = direction.image
        n = len(rows)
        dtype = accumulate_dtype(rows.dtype)
        product_dtype = _product_dtype(rows.dtype)

        def chunk_sum(
            chunk: Tensor, columns: Tensor, teacher_chunk: Tensor | None, index: Tensor
        ) -> Tensor:
            """Returns the sum [] of fn over rows: chunk [R, D], teacher_chunk [R, D̂], index [R]."""
            logits = direction.scale * _product(chunk.to(product_dtype), columns, dtype)
            if direction.bias is not None:
                logits = logits + direction.bias
            arguments = [logits, index]
            if teacher_chunk is not None:
                teacher: Any = direction.teacher
                arguments.append(teacher.scale * _product(teacher_chunk, teacher.text, dtype))
            result = fn(*arguments)
            _check_result(result, len(index))
            return result.sum(dtype=dtype)

        columns = direction.text.to(dtype)  # the gradients of chunks are added in this dtype
        sizes = _chunk_sizes(n, self.scratch_bytes // (len(columns) * dtype.itemsize))
        first = self.rank * n
        indices = torch.arange(first, first + n, device=rows.device).split(sizes)
        teacher_chunks: Any = [None] * len(sizes)
        if direction.teacher is not None:
            teacher_chunks = direction.teacher.image.split(sizes)
        chunks = zip(rows.to(dtype).split(sizes), teacher_chunks, indices)
        total: Any = 0
        for chunk, teacher_chunk, index in chunks:
            total = total + checkpoint(
                chunk_sum, chunk, columns, teacher_chunk, index, use_reentrant=False
            )
        return total / n


class _Unchanged(torch.autograd.Function):
    """Returns a value as it is; its backward raises torch's error if a tensor of the others was
    changed in place since.

    It runs before all chunks. An error of a chunk would leave other chunks ready to run in a queue
    that torch empties when the process ends; there the hooks of `checkpoint` end it by SIGSEGV.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *tensors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None for _ in ctx.saved_tensors]


def _tensors_of(pairs: Pairs) -> list[Tensor]:
    """Returns the features and scalars of pairs and of their teacher, detached."""
    values = [pairs.image, pairs.text, pairs.scale, pairs.bias]
    if pairs.teacher is not None:
        values += [pairs.teacher.image, pairs.teacher.text, pairs.teacher.scale]
    return [value.detach() for value in values if value is not None]


def _chunk_sizes(n: int, most: int) -> list[int]:
    """Returns the rows of each chunk of n rows: at most `most`, or 2 _LEAST_ROWS if that is more.

    Each has a row less than the one before, so that matrices fit where those of that chunk were.
    """
    most = max(2 * _LEAST_ROWS, most)
    sizes: list[int] = []
    while n > 0:
        sizes.append(min(n, most - len(sizes) % (most // 2)))
        n -= sizes[-1]
    return sizes


def _product(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rows [R, D] · columnsᵀ [M, D], computed in the rows' dtype, in another dtype."""
    return torch.mm(rows, columns.to(rows.dtype).T).to(dtype)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of products: float16 would lose small gradients, and a teacher's digits."""
    return dtype if dtype == torch.bfloat16 else accumulate_dtype(dtype)


def _with_texts(pairs: Pairs, n: int) -> Pairs:
    """Returns new pairs with only the first n texts, those of the teacher too; all images stay."""
    teacher = pairs.teacher
    if teacher is not None:
        teacher = replace(teacher, text=teacher.text[:n])
    return replace(pairs, text=pairs.text[:n], teacher=teacher)


def _call(module: nn.Module, parameters: dict[str, Tensor], *args: Tensor) -> Tensor:
    return torch.func.functional_call(module, parameters, args)


def _check_result(result: Any, rows: int) -> None:
    """Raises ValueError or TypeError unless `result` of the user's fn is floating, [rows]."""
    if not isinstance(result, Tensor):
        got = type(result).__name__
    elif result.shape != (rows,):
        got = checks.shape_of(result)
    else:
        checks.check_floating("fn", result)
        return
    raise ValueError(f"fn: expected a tensor [R] = [{rows}], got {got}")
