"""RowwiseLoss: a loss of the user's own over whole rows of the similarity matrix, which is never
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simplclip.losses.base import STUDENT, TEACHER, DistributedLoss
from simplclip.ops import checks, distributed
from simplclip.ops.autocast import autocast, no_autocast
from simplclip.ops.calls import accumulate_dtype
from simplclip.ops.similarity import inputs

_LEAST_ROWS = 64  # of a chunk: fewer make products slow


class RowwiseLoss(DistributedLoss):
    r"""The mean of a function of the user's own over the rows, and over the columns, of the
    similarity matrix.

        Z = s · image · textᵀ + b
        T = ŝ · x̂ · ŷᵀ, a teacher's logits, where its features are given
        loss = ½ [ mean_i fn(Z_i, i, T_i) + mean_j fn(column j of Z, j, column j of T) ]

    where column i is the positive of row i. With symmetric=False the loss is the mean over the rows
    alone. The N×M matrix is never stored: chunks of rows are computed, and once more in backward.
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
        **unknown: Never,
    ) -> None:
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **unknown
        )
        if not callable(fn):
            raise TypeError(f"fn: expected a function or an nn.Module, got {type(fn).__name__}")
        checks.boolean("symmetric", symmetric)
        self.fn, self.symmetric = fn, symmetric

    def extra_repr(self) -> str:
        name = (
            ""
            if isinstance(self.fn, nn.Module)
            else f"fn={getattr(self.fn, '__qualname__', self.fn)}, "
        )
        return f"{name}symmetric={self.symmetric}"

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
        """Returns the loss [], float32 (float64 for float64 features); with output_dict, as
        {"rowwise_loss": loss}.

        image_features, text_features: float32, bfloat16, float16 or float64; under autocast they
        are cast to its dtype. Row i's positive is text i; with M > N the columns' direction covers
        the first N texts. dist_...: x̂, ŷ and ŝ of a teacher, all three or none. They are
        constants.

        Raises: TypeError, ValueError: features or the result of fn are not valid; the message names
        them.
        """
        checks.features("image_features", image_features, "[N, D]")
        checks.features("text_features", text_features, "[M, D]")
        image, text = columns = autocast(image_features, text_features)
        if self.world_size > 1:
            image, text = self._own_rows(image, text)
        student = dict(zip(STUDENT, (image, text)))
        inputs.check_pair(student, equal_rows=self.world_size > 1)
        n = len(image)
        offset = 0
        fn = self.fn
        if len(text) < n:
            got = checks.shape_of(text)
            raise ValueError(
                f"text_features: expected at least {n} rows, a positive for each image, got {got}"
            )
        arguments = dict(zip(TEACHER, (dist_image_features, dist_text_features, dist_logit_scale)))
        teacher: list[Any] = [None, None, None]
        if any(value is not None for value in arguments.values()):
            *teacher, teacher_scale = inputs.constants_of_teacher(
                arguments, student, "a teacher has features and a scale"
            )
            teacher = [t.to(image.dtype) for t in teacher] + [teacher_scale]
        wide = accumulate_dtype(image.dtype)
        scale = checks.scalar("logit_scale", logit_scale, image.device, wide)
        bias = (
            None
            if logit_bias is None
            else checks.scalar("logit_bias", logit_bias, image.device, wide)
        )
        if self.world_size > 1:
            constant, offset = self.local_loss and not self.gather_with_grad, self.rank * n
            columns = [
                distributed.gather(t.detach() if constant else t, self._group())
                for t in (image, text)
            ]
            fn = self._with_learned_parameters()
        columns_of_teacher = [self._gathered(t) for t in teacher[:2]]
        sides = [(image, columns[1], teacher[0], columns_of_teacher[1])]
        if self.symmetric:
            sides.append(
                (
                    text[:n],
                    columns[0],
                    None if teacher[1] is None else teacher[1][:n],
                    columns_of_teacher[0],
                )
            )
        with no_autocast(image.device):
            means = [self._mean(fn, *side, scale, bias, teacher[2], offset) for side in sides]
            value = sum(means) / len(means)
        value = value if self.world_size <= 1 else self._value(value)
        return {"rowwise_loss": value} if output_dict else value

    def _with_learned_parameters(self) -> Callable[..., Tensor]:
        """Returns fn; backward averages the gradients of its parameters over the ranks."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        learned = dict(
            zip(
                (name.removeprefix("fn.") for name in parameters),
                self._learned(*parameters.values()),
            )
        )
        module: Any = self.fn
        return lambda *args: (
            torch.func.functional_call(module, learned, args) if learned else module(*args)
        )

    def _mean(
        self, fn: Callable[..., Tensor], x: Tensor, y: Tensor, x_teacher: Any, y_teacher: Any,
        scale: Tensor, bias: Tensor | None, teacher_scale: Any, offset: int,
    ) -> Any:  # fmt: skip
        """Returns the mean of fn over the rows of x against the columns y."""
        dtype, n = accumulate_dtype(x.dtype), len(x)
        # float16 would lose small gradients
        multiplied = x.dtype if x.dtype == torch.bfloat16 else dtype

        def of_chunk(
            rows: Tensor, columns: Tensor, of_rows: Tensor | None, index: Tensor
        ) -> Tensor:
            logits = scale * torch.mm(rows.to(multiplied), columns.to(multiplied).T).to(dtype)
            logits = logits if bias is None else logits + bias
            teachers = (
                ()
                if of_rows is None
                else (teacher_scale * torch.mm(of_rows, y_teacher.T).to(dtype),)
            )
            result = fn(logits, index, *teachers)
            if not isinstance(result, Tensor) or result.shape != index.shape:
                got = (
                    checks.shape_of(result) if isinstance(result, Tensor) else type(result).__name__
                )
                raise ValueError(f"fn: expected a tensor [R] = [{len(index)}], got {got}")
            return result.sum()

        count = -(-n // max(_LEAST_ROWS, self.scratch_bytes // (len(y) * dtype.itemsize)))
        sizes = [n * (k + 1) // count - n * k // count for k in range(count)]
        of_rows = [None] * count if x_teacher is None else x_teacher.split(sizes)
        index = torch.arange(offset, offset + n, device=x.device).split(sizes)
        columns = y.to(dtype)  # the gradients of chunks are added in this dtype
        chunks = zip(x.to(dtype).split(sizes), of_rows, index)
        return (
            sum(checkpoint(of_chunk, r, columns, t, i, use_reentrant=False) for r, t, i in chunks)
            / n
        )
