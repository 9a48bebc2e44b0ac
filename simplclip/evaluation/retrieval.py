"""The nearest candidates of queries, and R@k with its chance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from simplclip.evaluation.results import Figure, Recall

KS = (1, 5, 10)
_TILE_BYTES = 64 * 2**20  # of a tile of similarities
_TILE_COLUMNS = 16384


def nearest(
    queries: Tensor, candidates: Tensor, k: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the k most similar candidates of each query, for a part of the queries at a time.

    queries: [n, D], candidates: [m, D], compared by their dot products.
    A part of q queries is the number of its first query, the similarities [q, k] and the rows [q,
    k] of the candidates, the most similar first (min(k, m) of them), both on `device`. The
    similarities are computed there in tiles of at most 64 MiB.
    """
    width = min(len(candidates), _TILE_COLUMNS)
    height = max(1, _TILE_BYTES // (4 * width))
    for start in range(0, len(queries), height):
        part = queries[start : start + height].to(device)
        for first in range(0, len(candidates), width):
            tile = part @ candidates[first : first + width].to(device).T
            values, columns = tile.topk(min(k, tile.shape[1]))
            if first == 0:
                similarities, rows = values, columns
                continue
            values = torch.cat([similarities, values], 1)
            columns = torch.cat([rows, columns + first], 1)
            similarities, order = values.topk(min(k, values.shape[1]))
            rows = columns.gather(1, order)
        yield start, similarities, rows


def recall(
    queries: Tensor,
    candidates: Tensor,
    query_groups: Tensor,
    candidate_groups: Tensor,
    device: torch.device | str = "cpu",
) -> Recall:
    """Returns, for each k of KS, the share of queries with a right answer among the k nearest.

    A candidate is right if it is of the query's group.
    queries: [n, D], candidates: [m, D], groups: int64 [n] and [m] on the CPU. device: where
    similarities are computed.
    With as many groups as pairs this is the usual R@k. Its chance is the share if candidates are
    ranked at random: 1 - C(m-r, k)/C(m, k), with binomial coefficients C, for r right candidates of
    m, averaged over the queries. Extra memory: a tile of similarities, 64 MiB; never [n, m].
    """
    m = len(candidates)
    hits = torch.zeros(len(KS), dtype=torch.int64)
    for start, _, rows in nearest(queries, candidates, max(KS), device):
        right = candidate_groups[rows.cpu()] == query_groups[start : start + len(rows), None]
        hits += torch.stack([right[:, :k].any(1).sum() for k in KS])
    groups, sizes = candidate_groups.unique(return_counts=True)
    index = torch.searchsorted(groups, query_groups).clamp(max=len(groups) - 1)
    right_answers = torch.where(groups[index] == query_groups, sizes[index], 0).double()
    figures = {}
    for k, count in zip(KS, hits.tolist()):
        tries = torch.arange(min(k, m))
        miss = ((m - right_answers[:, None] - tries).clamp(min=0) / (m - tries)).prod(1)
        figures[f"R@{k}"] = Figure(value=count / len(queries), chance=(1 - miss).mean().item())
    return figures
