"""Host time of one small call, forward and backward, beside a baseline's.

Sizes are so small that what is timed is not the arithmetic: one thread, float32. On a CPU processor
time, on a GPU the time until the last kernel is started. Writes benchmarks/results/host-*.csv.

    python -m benchmarks.host
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results_file
from benchmarks.measure import interleaved_times
from simplclip.losses import ClipPMLoss
from simplclip.nn import SimplifiedBlock
from simplclip.ops import shaped_attention


def cases(device: str) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Returns pairs of functions that compute a number: ours, and a baseline."""
    with torch.device(device):
        image, text = (torch.randn(16, 32).requires_grad_() for _ in range(2))
        scale = torch.tensor(10.0, requires_grad=True)
        contrastive = ClipPMLoss(pm_weight=0)
        with_plane = ClipPMLoss()
        plain_loss = open_clip.ClipLoss()

        x = torch.randn(1, 4, 64).requires_grad_()
        mask = torch.full((4, 4), -torch.inf).triu(1)
        block = SimplifiedBlock(64, 1, causal=True)
        plain_block = open_clip.transformer.ResidualAttentionBlock(64, 1)

        q, k, v = (torch.randn(1, 4, 1, 64).requires_grad_() for _ in range(3))
        gains = [torch.ones(1, requires_grad=True) for _ in range(3)]
        counts = torch.arange(1, 5)[:, None, None]

    def shaped() -> Tensor:
        return shaped_attention(q, k, v, *gains, causal=True).sum()

    def dense_contrastive() -> Tensor:
        return plain_loss(image, text, scale)

    def plain_attention() -> Tensor:
        alpha, beta, gamma = (gain[:, None] for gain in gains)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        return (alpha * v + beta * attended - gamma * (v.cumsum(1) / counts)).sum()

    return {
        "contrastive": (lambda: contrastive(image, text, scale), dense_contrastive),
        "with pair matching": (lambda: with_plane(image, text, scale), dense_contrastive),
        "block": (lambda: block(x).sum(), lambda: plain_block(x, attn_mask=mask).sum()),
        "attention": (shaped, plain_attention),
    }


def measure(calls: int, device: str) -> list[dict]:
    """Returns a row for each case, from so many interleaved calls of ours and of the baseline."""
    rows = []
    for name, pair in cases(device).items():
        steps = {
            side: lambda run=run: run().backward() for side, run in zip(("ours", "baseline"), pair)
        }
        times, _ = interleaved_times(steps, calls, warmup=calls // 10 + 1)
        ours, baseline = (
            statistics.median(times[side].host or times[side].whole) for side in steps
        )
        row = {
            "call": name,
            "ours_ms": round(1e3 * ours, 3),
            "baseline_ms": round(1e3 * baseline, 3),
            "ratio": round(ours / baseline, 2),
        }
        rows.append(row)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows, where = measure(2000, "cpu"), results_file.describe()
    print("\n".join(results_file.table(rows)))
    path = results_file.result_path("host", where)
    results_file.write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
