"""wgmma of sm_90: four warps multiply matrices while their threads go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptx import numbers
from ptx.instructions import expect, instruction, reader, vector, writer
from ptx.memory import FUTURE, LANE_BITS, NO_THREAD, THREAD_BITS, Access
from ptx.parse import Immediate, Instruction, Kernel, Register, UnknownPTXError, Vector, registers

if TYPE_CHECKING:
    from ptx.machine import Batch, Lanes

GROUP = 128  # threads
# K of a product, 32 bytes, and the order of a left matrix in registers.
_FORMS = {
    "bf16": (16, numbers.LEFT_HALF),
    "f16": (16, numbers.LEFT_HALF),
    "tf32": (8, numbers.LEFT_TF32),
}


class Product(NamedTuple):
    """A product in flight."""

    lanes: np.ndarray
    number: np.ndarray  # [n] of the lane's group of products
    registers: frozenset[Register]
    granules: np.ndarray  # of shared memory that it reads


class Flights:
    """The products in flight of a batch, and what its warps have made visible to them."""

    def __init__(self, batch: Batch):
        self.groups = np.zeros(batch.size, np.int64)  # that each thread has ended
        # time of each warp's last fence.proxy.async
        self.fenced = np.zeros(batch.size // 32 + 1, np.int64)
        self.products: list[Product] = []

    def check_registers(self, batch: Batch, i: Instruction, lanes: Lanes) -> None:
        """Reports an instruction that uses registers of a product in flight."""
        if i.opcode.startswith("wgmma"):
            return
        for product in self.products:
            if not product.registers.isdisjoint(registers(i.operands)):
                used = np.intersect1d(product.lanes, batch.numbers[lanes])
                if used.size:
                    batch.report("a register of a wgmma in flight is used", i, used)

    def wait(self, batch: Batch, lanes: Lanes, unfinished: int) -> None:
        waits = np.zeros(batch.size, bool)
        products = self.products
        self.products = []
        waits[lanes] = True
        for product in products:
            done = waits[product.lanes] & (product.number < self.groups[product.lanes] - unfinished)
            if not done.all():
                self.products.append(product)
                continue
            readers = batch.memory["shared"].readers
            now = readers[product.granules] & ~FUTURE | batch.time << THREAD_BITS
            in_flight = readers[product.granules] & FUTURE == FUTURE
            readers[product.granules] = np.where(in_flight, now, readers[product.granules])
        for product in self.products:
            batch.memory["shared"].readers[product.granules] |= FUTURE


def check_fences(kernel: Kernel) -> None:
    """Raises an error unless a wgmma.fence follows the last other write to its registers."""
    for place, each in enumerate(kernel.instructions):
        if not each.opcode.startswith("wgmma.mma_async"):
            continue
        used = _registers(each)
        for before in reversed(kernel.instructions[:place]):
            if before.opcode == "wgmma.fence.sync.aligned":
                break
            if not before.opcode.startswith("wgmma") and used.intersection(
                registers(before.operands[:1])
            ):
                raise UnknownPTXError(f"{kernel.name}: no wgmma.fence between {before} and {each}")
        else:
            raise UnknownPTXError(f"{kernel.name}: no wgmma.fence before {each}")


def _registers(product: Instruction) -> frozenset[Register]:
    """Returns the registers of a product in flight: its sums, and a left matrix in registers."""
    return frozenset(
        registers(tuple(each for each in product.operands[:2] if isinstance(each, Vector)))
    )


def _chunks(
    batch: Batch, i: Instruction, lanes: Lanes, words: np.ndarray, rows: int, transposed: bool
) -> np.ndarray:
    """Returns the addresses of a matrix's chunks of 16 bytes, from the descriptors of lanes.

    [groups, rows, 2] along K, or transposed [groups, rows / 8, 16]. A swizzle exchanges the chunks
    of a row of 32, 64 or 128 bytes.
    """
    words = words.reshape(-1, GROUP)
    if (words != words[:, :1]).any():
        batch.report("the descriptors of a warpgroup differ", i, batch.numbers[lanes])
    first = words[:, :1, None]
    start, leading, stride = (
        (first >> np.uint64(s) & np.uint64(0x3FFF)).astype(np.int64) * 16 for s in (0, 16, 32)
    )
    mode = int(words[0, 0]) >> 62
    others = int(words[0, 0]) & ~((0x3FFF << 32 | 0x3FFFFFFF) | 3 << 62)
    if mode == 0 or others or (words >> np.uint64(62) != mode).any():
        raise UnknownPTXError(
            f"{i}: expected a descriptor with one swizzle and no other bits, got "
            f"{int(words[0, 0]):#x}"
        )
    swizzle = 256 >> mode
    if transposed:
        row = np.arange(rows // 8)[:, None]
        k = np.arange(16)
        per = swizzle // 16
        at = start + row // per * leading + row % per * 16 + k // 8 * stride + k % 8 * swizzle
    else:
        row, chunk = np.arange(rows)[:, None], np.arange(2)
        at = start + row // 8 * stride + row % 8 * swizzle + chunk * 16
    return at ^ ((at >> 7 & swizzle // 16 - 1) << 4)


def _matrix(
    batch: Batch, access: Access, at: np.ndarray, kind: str, transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Loads a matrix [groups, rows, K] at chunks [groups, ...]; also returns the granules read."""
    shared, groups = batch.memory["shared"], len(at)
    lane_of_chunk = np.repeat(np.arange(groups) * GROUP, at[0].size)  # the first lane of its group
    per_chunk, places, good = shared.checked(access.of(lane_of_chunk), at.ravel(), 16)
    granules = shared.granules(places, 16)
    shared.track_read(per_chunk, granules, per_chunk.in_flight)
    _check_proxy(batch, per_chunk, shared.writers[granules])
    words = np.zeros((at.size, 4), np.uint32)
    words[good] = shared.views[4][shared.elements(places, 4, 4)]
    decode = numbers.TYPES[kind].decode
    if kind == "tf32":
        return decode(words).reshape(groups, -1, 8), granules
    halves = decode(words.view(np.uint16)).reshape(*at.shape, 8)
    if transposed:  # [groups, rows / 8, K, 8]
        halves = halves.swapaxes(2, 3)
    return halves.reshape(groups, -1, 16), granules


def _check_proxy(batch: Batch, access: Access, writers: np.ndarray) -> None:
    """Reports what was written before a barrier with no fence.proxy.async of either side since."""
    time = (writers & FUTURE) >> THREAD_BITS
    warps = batch.launch.threads // 32
    program = batch.program_of[access.lanes][:, None]
    warp = np.minimum((writers & NO_THREAD) >> LANE_BITS, warps - 1)
    of_writer = batch.flights.fenced[program * warps + warp]
    of_reader = batch.flights.fenced[access.lanes // 32][:, None]
    unfenced = np.maximum(of_writer, of_reader) <= time
    access.report(
        "wgmma reads shared memory with no fence.proxy.async after it was written", unfenced
    )


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(bf16|f16|tf32)\.\3", 6, 8)
def _product(i, match, code):
    width, kind = int(match[1]), match[3]
    sums, left, right, adds, *signs = i.operands
    in_registers, (depth, order_left) = isinstance(left, Vector), _FORMS[kind]
    # have signs that transpose a matrix in shared memory
    of_halves = kind != "tf32" and not in_registers
    expect(int(match[2]) == depth, f"k{depth}")
    sign_count = 4 if of_halves else 2
    expect(
        len(signs) == sign_count,
        "signs of both factors, and of halves in shared memory their order",
    )
    expect(
        signs[:3] == [Immediate(1), Immediate(1), Immediate(0)][: len(signs)],
        "factors 1, a left matrix as it is",
    )
    transposed, used = signs[3:] == [Immediate(1)], _registers(i)
    order, sums = numbers.accumulators(width), vector(sums, width // 2)
    read_sums, write = reader(sums, "b32", code), writer(sums, "f32")
    left, kind_of_left = (vector(left, 4), "b32") if in_registers else (left, "b64")
    read_left = reader(left, kind_of_left, code)
    read_right, read_adds = reader(right, "b64", code), reader(adds, "pred", code)
    code.accesses("shared", 16)

    def run(batch: Batch, lanes: Lanes) -> None:
        lanes = batch.whole(i, lanes, GROUP)
        access, granules = batch.access(i, lanes), []

        def loaded(words: np.ndarray, rows: int, transposed: bool) -> np.ndarray:
            at = _chunks(batch, i, lanes, words, rows, transposed)
            matrix, read = _matrix(batch, access, at, kind, transposed)
            granules.append(read.ravel())
            return matrix

        if in_registers:
            a = numbers.matrices(read_left(batch, lanes), order_left, kind).reshape(-1, 64, depth)
        else:
            a = loaded(read_left(batch, lanes), 64, False)
        b = loaded(read_right(batch, lanes), width, transposed)
        product = (a @ b.swapaxes(1, 2)).reshape(-1, 16, width)
        before = numbers.matrices(read_sums(batch, lanes), order, "f32")
        added = read_adds(batch, lanes).reshape(-1, 32)[:, :1, None]
        write(batch, lanes, numbers.fragments(np.where(added, before + product, product), order))
        group = batch.flights.groups[access.lanes]
        batch.flights.products.append(Product(access.lanes, group, used, np.concatenate(granules)))

    return run


@instruction(r"wgmma\.fence\.sync\.aligned", 0)
def _fence(i, match, code):
    return lambda batch, lanes: None  # check_fences


@instruction(r"wgmma\.commit_group\.sync\.aligned", 0)
def _commit(i, match, code):
    def run(batch: Batch, lanes: Lanes) -> None:
        batch.flights.groups[lanes] += 1

    return run


@instruction(r"wgmma\.wait_group\.sync\.aligned", 1)
def _wait(i, match, code):
    def run(batch: Batch, lanes: Lanes) -> None:
        batch.time += 1
        batch.flights.wait(batch, lanes, i.operands[0].bits)

    return run


@instruction(r"fence\.proxy\.async\.shared::cta", 0)
def _fence_proxy(i, match, code):
    def run(batch: Batch, lanes: Lanes) -> None:
        batch.time += 1
        batch.flights.fenced[np.unique(batch.numbers[lanes] // 32)] = batch.time

    return run
