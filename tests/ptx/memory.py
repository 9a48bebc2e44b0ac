"""Global and shared memory of a launch, with shadows that tell who wrote and read each granule
last, and when.

A shadow word holds the program, the time (a number of the memory instruction), the warp and the
lane. Two accesses of a granule, of which one writes, are a race if they come from different
programs, or from different threads of a program with no barrier between them; of a warp, a
bar.warp.sync is enough. What a cp.async writes, or a wgmma reads, is in flight until its thread
waits for it: its time lies in the future and its thread is none, so that any access before is a
race.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from ptx.machine import Batch
    from ptx.parse import Instruction

LANE_BITS, THREAD_BITS, TIME_BITS = 6, 12, 28
NO_LANE = np.int64((1 << LANE_BITS) - 1)
NO_THREAD = np.int64((1 << THREAD_BITS) - 1)  # neither warp nor lane
FUTURE = np.int64(((1 << TIME_BITS) - 1) << THREAD_BITS)
PROGRAM_SHIFT = THREAD_BITS + TIME_BITS
NO_PROGRAM = np.int64(((1 << 23) - 1) << PROGRAM_SHIFT)
_WHO = ~FUTURE  # the bits of program and thread
_WARP = _WHO & ~NO_LANE
GUARD = 4096  # bytes around each tensor that may not be touched
BASE = 1 << 32  # the first address of global memory


@dataclass
class Access:
    """An access to memory by the lanes that execute an instruction."""

    batch: Batch
    instruction: Instruction
    lanes: np.ndarray  # [n]

    @property
    def token(self) -> np.ndarray:  # [n]
        """The shadow words of this access."""
        return self.batch.owner[self.lanes] | self.batch.time << THREAD_BITS

    @property
    def in_flight(self) -> np.ndarray:  # [n]
        return self.token | FUTURE | NO_THREAD

    def report(self, kind: str, bad: np.ndarray) -> None:
        """Reports a hazard of the lanes [n] or [n, ...] for which it is true."""
        if bad.any():
            self.batch.report(kind, self.instruction, self.lanes[bad.reshape(len(bad), -1).any(1)])

    def of(self, chosen: np.ndarray | slice) -> Access:
        return Access(self.batch, self.instruction, self.lanes[chosen])


def _several(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the shadow words of several readers: of no lane, perhaps no warp, no program."""
    word, difference = np.maximum(a, b) | NO_LANE, a ^ b
    word = np.where(difference & _WARP != 0, word | NO_THREAD, word)
    return np.where(difference >> PROGRAM_SHIFT != 0, word | NO_PROGRAM, word)


def _width(values: np.ndarray) -> int:
    """Returns the bytes of a lane's values [n, count]."""
    return values.itemsize * values.shape[1]


class Memory:
    """Bytes with shadows.

    Positions are in bytes; an access of `count` elements of `size` bytes is aligned to all of them.
    """

    name = ""

    def __init__(self, size: int, granule: int):
        self.data = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.granule = granule  # bytes that have a shadow
        self.views = {size: self.data.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.writers = np.zeros(len(self.data) // granule, np.int64)
        self.readers = np.zeros_like(self.writers)

    def places(
        self, access: Access, addresses: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the positions of accesses of so many bytes, and which are bad."""
        raise NotImplementedError

    def checked(
        self, access: Access, addresses: np.ndarray, size: int
    ) -> tuple[Access, np.ndarray, np.ndarray | slice]:
        """Reports lanes with bad addresses; returns the access, positions, and which are good."""
        at, bad = self.places(access, addresses, size)
        unaligned = (at & (size - 1)) != 0
        access.report(f"{self.name} address is not a multiple of {size}", unaligned & ~bad)
        bad |= unaligned
        good = ~bad if bad.any() else slice(None)
        return access.of(good), at[good], good

    def load(self, access: Access, addresses: np.ndarray, size: int, count: int = 1) -> np.ndarray:
        """Returns `count` elements of `size` bytes at each address [n]: [n, count]."""
        access, at, good = self.checked(access, addresses, size * count)
        out = np.full((len(addresses), count), -1).astype(f"u{size}")
        out[good] = self.read(access, at, size, count)
        return out

    def store(self, access: Access, addresses: np.ndarray, values: np.ndarray) -> None:
        """Stores values [n, count] from each address [n] on."""
        access, at, good = self.checked(access, addresses, _width(values))
        self.write(access, at, values[good])

    def read(self, access: Access, at: np.ndarray, size: int, count: int) -> np.ndarray:
        self.track_read(access, self.granules(at, size * count), access.token)
        return self.views[size][self.elements(at, size, count)]

    def write(self, access: Access, at: np.ndarray, values: np.ndarray) -> None:
        raced = self.track_write(access, self.granules(at, _width(values)), access.token)
        view = self.views[values.itemsize]
        places = self.elements(at, values.itemsize, values.shape[1])
        view[places] = values
        lost = (view[places] != values).any(1)
        access.report(
            f"lanes store different values to one place of {self.name} memory", lost & ~raced
        )

    @staticmethod
    def elements(at: np.ndarray, size: int, count: int) -> np.ndarray:
        return (at // size)[:, None] + np.arange(count)

    def granules(self, at: np.ndarray, size: int) -> np.ndarray:
        return self.elements(at, self.granule, max(1, size // self.granule))

    def races(self, access: Access, others: np.ndarray) -> np.ndarray:
        """Returns where shadow words [n, granules] are of accesses that race with this one."""
        batch, difference = access.batch, others ^ access.token[:, None]
        limit = batch.limit[access.lanes, None]
        limit = np.where(difference & _WARP == 0, batch.warp_limit[access.lanes, None], limit)
        unordered = (others >= limit) | (difference >> PROGRAM_SHIFT != 0)
        return (others != 0) & (difference & _WHO != 0) & unordered

    def report_races(self, access: Access, others: np.ndarray, does: str, doing: str) -> np.ndarray:
        if not others.any():
            return np.zeros(others.shape, bool)
        races = self.races(access, others)
        access.report(
            f"{self.name} memory is {does} while another thread or a copy {doing} it", races
        )
        return races

    def track_read(self, access: Access, granules: np.ndarray, token: np.ndarray) -> None:
        writers = self.writers[granules]
        before = self.readers[granules]
        word = token[:, None]
        self.report_races(access, writers, "read", "writes")
        self.check_written(access, writers)
        if before.any():
            word = np.where(self.races(access, before), _several(word, before), word)
        self.readers[granules] = word
        # of the lanes that read the same granule, one has stored its word
        stored = self.readers[granules]
        lost = stored != word
        if lost.any():
            self.readers[granules[lost]] = _several(word, stored)[lost]

    def check_written(self, access: Access, writers: np.ndarray) -> None:
        pass

    def track_write(self, access: Access, granules: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Returns which lanes race with others."""
        races = self.report_races(access, self.writers[granules], "written", "writes")
        races |= self.report_races(access, self.readers[granules], "written", "reads")
        self.writers[granules] = token[:, None]
        return races.any(1)


class GlobalMemory(Memory):
    """Copies of tensors, with guards between them.

    Only their elements may be touched, not the gaps of their strides.
    """

    name = "global"

    def __init__(self, tensors: list[torch.Tensor], granule: int):
        self.storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self.begin, end = {}, GUARD
        for pointer, storage in self.storages.items():
            self.begin[pointer] = end + (pointer - end) % 512  # as aligned as the tensor
            end = self.begin[pointer] + len(storage) + GUARD
        super().__init__(end, granule)
        # bytes of an access -> whether it may be at a multiple of them
        self.allowed = {1: np.zeros(len(self.data), bool)}
        for t in tensors:
            inside = self.allowed[1][self.address(t) - BASE :]
            if t.numel():
                strides = (*(step * t.itemsize for step in t.stride()), 1)
                np.lib.stride_tricks.as_strided(inside, (*t.shape, t.itemsize), strides)[...] = True
        self.fetch()

    def copies_and_storages(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the bytes of each storage here, and in torch."""
        for pointer, storage in self.storages.items():
            begin = self.begin[pointer]
            in_torch = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            yield self.data[begin : begin + len(storage)], in_torch

    def fetch(self) -> None:
        """Takes the tensors' values, and forgets who read and wrote them."""
        for copy, storage in self.copies_and_storages():
            copy[...] = storage
        self.writers[:], self.readers[:] = 0, 0

    def write_back(self) -> None:
        for copy, storage in self.copies_and_storages():
            storage[...] = copy

    def address(self, tensor: torch.Tensor) -> int:
        begin = self.begin[tensor.untyped_storage().data_ptr()]
        return BASE + begin + tensor.storage_offset() * tensor.itemsize

    def places(
        self, access: Access, addresses: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if size not in self.allowed:
            self.allowed[size] = self.allowed[1].reshape(-1, size).all(1)
        at = addresses.view(np.int64) - BASE
        outside = (at < 0) | (at >= len(self.data))
        bad = outside | ~self.allowed[size][np.where(outside, 0, at) // size]
        access.report("global address is outside of the tensors", bad)
        return at, bad


class Copies(NamedTuple):
    """cp.async copies of one instruction that are in flight."""

    lanes: np.ndarray  # [n]
    groups: np.ndarray  # [n] number of the lane's group
    at: np.ndarray  # [n] positions
    values: np.ndarray  # [n, words]


class SharedMemory(Memory):
    """The shared memory of a batch of programs, one after the other."""

    name = "shared"

    def __init__(self, size: int, programs: int, lanes: int, granule: int):
        self.size = -(-size // 128) * 128
        super().__init__(self.size * programs, granule)
        self.groups = np.zeros(lanes, np.int64)  # of cp.async that each thread has ended
        self.copies: list[Copies] = []

    def places(
        self, access: Access, addresses: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        bad = addresses > self.size - size
        access.report("shared address is outside of the program's memory", bad)
        return access.batch.program_of[access.lanes] * self.size + np.where(bad, 0, addresses), bad

    def check_written(self, access: Access, writers: np.ndarray) -> None:
        access.report("shared memory is read that was never written", writers == 0)

    def start_copy(self, access: Access, addresses: np.ndarray, values: np.ndarray) -> None:
        """Starts copies of words [n, words] to each address [n]; the bytes are poisoned."""
        access, at, good = self.checked(access, addresses, _width(values))
        self.track_write(access, self.granules(at, _width(values)), access.in_flight)
        self.views[4][self.elements(at, 4, values.shape[1])] = 0xFFFFFFFF
        self.copies.append(Copies(access.lanes, self.groups[access.lanes].copy(), at, values[good]))

    def end_group(self, lanes: np.ndarray) -> None:
        self.groups[lanes] += 1

    def wait(self, access: Access, unfinished: int) -> None:
        """Finishes the groups of these threads, but the last `unfinished`.

        What they copied is written now.
        """
        waits = np.zeros(len(self.groups), bool)
        waits[access.lanes] = True
        copies, self.copies = self.copies, []
        for copy in copies:
            done = waits[copy.lanes] & (copy.groups < self.groups[copy.lanes] - unfinished)
            lanes, _, at, values = (each[done] for each in copy)
            self.views[4][self.elements(at, 4, values.shape[1])] = values
            written = Access(access.batch, access.instruction, lanes)
            self.writers[self.granules(at, 4 * values.shape[1])] = written.token[:, None]
            if not done.all():
                self.copies.append(Copies(*(each[~done] for each in copy)))
