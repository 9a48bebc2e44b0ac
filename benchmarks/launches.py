"""What the host does for a loss on a GPU, without one: the kernels that it starts, and its time.

    python -m benchmarks.launches

Kernels are those of a step on fake tensors. The time is of a small step on a CPU: Triton gets the
launches of an RTX 3090, for which it has compiled, but its driver runs nothing, and torch's kernels
are the CPU's. On a GPU each launch adds what CUDA takes. The time is the least of all runs, since
other programs on the machine lengthen most of them. Writes benchmarks/results/launches-*.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

import simplclip
from benchmarks import results_file
from benchmarks.cards import calls
from benchmarks.cards.bound import predicted
from benchmarks.measure import interleaved_times
from simplclip.kernels import runtime
from simplclip.kernels.similarity import blocks
from simplclip.ops import backends, registry
from simplclip.ops.similarity import sweeps
from simplclip.plan.cards import CARDS
from simplclip.plan.compile import Driver

CARD = "rtx-3090"
PAIRS = 4096  # of the step whose kernels are counted; they are those of one block
SMALL, WIDTH = 16, 64  # of the step that is timed


class StillDriver(Driver):
    """Triton's driver of a card on which nothing runs."""

    def __init__(self, architecture: int):
        super().__init__(architecture)
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    @property
    def utils(self) -> StillDriver:
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10}

    def load_binary(self, *binary: object) -> tuple:
        """Returns module, function, registers, spills and the most threads."""
        return object(), None, 0, 0, 1024

    def unload_module(self, module: object) -> None: ...


@contextmanager
def still_card() -> Iterator[None]:
    """Context in which similarity_loss of CPU tensors starts Triton's kernels, and none runs."""
    import triton

    card = CARDS[CARD]
    numbers = card.architecture, card.multiprocessors, card.l2 << 20
    patches = (
        (backends, "why_not_kernels", lambda *_: None),
        (backends, "capability", lambda _: divmod(card.architecture, 10)),
        (runtime, "_device", lambda _: numbers),
        (sweeps, "computes_in", lambda dtype, _: dtype),
        (blocks, "product", lambda out, *_, add: out.zero_()),  # cuBLAS's
        (triton.runtime.driver, "_active", StillDriver(card.architecture)),
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(registry._selected, clear=True))
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        stack.enter_context(simplclip.backend(similarity_loss="triton"))
        yield


def small_step(terms: tuple[str, ...]) -> Callable[[], object]:
    """Returns a step of few pairs on the CPU, of the arguments of `calls.loss`."""

    def leaf(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_(grad)

    with mock.patch.object(calls, "_leaf", leaf):
        total = calls.loss_function(terms, SMALL, WIDTH, torch.bfloat16)
    return lambda: total().backward()


def measure(repeats: int) -> list[dict]:
    """Returns a row for each loss."""
    with still_card():
        timed = {name: small_step(terms) for name, terms in calls.LOSSES.items()}
        times, _ = interleaved_times(timed, repeats, warmup=repeats // 10 + 1)
    rows = []
    for case in calls.losses((PAIRS,)):
        _, total = predicted(case, "bfloat16", True, CARD)
        row = {
            "call": case.name,
            "triton_launches": total["own_kernels"],
            "torch_launches": total["torch_kernels"],
            "host_us": round(1e6 * min(times[case.name].whole)),
        }
        rows.append(row)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows, where = measure(1000), results_file.describe()
    print("\n".join(results_file.table(rows)))
    path = results_file.result_path("launches", where)
    results_file.write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
