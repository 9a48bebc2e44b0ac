"""What a call of similarity_loss asks for, and which of its planes go into one launch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import COMPILE, interpreted
from simplclip.ops.similarity.call import NEGATIVES_ALL, NEGATIVES_HARD, ColumnStat


@dataclass(frozen=True)
class Call:
    """The arguments that forward and backward share, in their order."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    scale: Tensor  # []
    teacher_image: Tensor | None  # [N, D̂]
    teacher_text: Tensor | None  # [M, D̂]
    teacher_scale: Tensor | None  # []
    projected_image: Tensor | None  # [N, D̂]
    projected_text: Tensor | None  # [M, D̂]
    cross_scale: Tensor | None  # []
    plane_weight: Tensor | None  # [] or [D]
    plane_bias: Tensor | None  # []
    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64
    label_offset: int
    softmax: bool
    columns: bool
    negatives: int
    relational: bool
    interactive: bool
    entropy: float

    @property
    def hadamard(self) -> bool:
        return bool(self.negatives) and self.plane_weight.dim() == 1

    @property
    def similarity(self) -> bool:
        return bool(self.softmax or self.negatives)

    @property
    def teacher(self) -> bool:
        return self.relational or self.interactive

    def features(self) -> dict[str, Tensor | None]:
        """The kernels' features: where no projection is given the student's own serve."""
        cross = self.interactive
        return {
            "image": self.image,
            "text": self.text,
            "teacher_image": self.teacher_image,
            "teacher_text": self.teacher_text,
            "projected_image": (self.image if self.projected_image is None else self.projected_image) if cross else None,
            "projected_text": (self.text if self.projected_text is None else self.projected_text) if cross else None,
        }

    def widths(self) -> dict[str, int]:
        teacher = self.image if self.teacher_image is None else self.teacher_image
        return {"width": self.image.shape[1], "teacher_width": teacher.shape[1]}


@dataclass(frozen=True)
class Launch:
    """The planes that one launch multiplies, and what it makes of them."""

    Z: bool = False
    L: bool = False
    T: bool = False
    U: bool = False
    V: bool = False
    SOFTMAX: bool = False
    ALL: bool = False
    HARD: bool = False
    RELATIONAL: bool = False
    KL: bool = False
    COLUMNS: bool = False
    IDS: bool = False

    @property
    def students(self) -> int:
        """Planes that have a gradient."""
        return self.Z + self.L + self.U + self.V

    @property
    def tiles(self) -> int:
        """Planes, what tiles are tuned by. T's means with Z and with U take the registers of four planes, V there or not."""
        return max(self.students + self.T, 4 * (self.RELATIONAL and self.KL))

    @property
    def statistics_tiles(self) -> int:
        """What forward's tiles are tuned by: older compilers hold a scalar hyperplane's losses besides."""
        return self.gradient_tiles if tuning.OLDER else self.tiles

    @property
    def gradient_tiles(self) -> int:
        """The same for backward, which holds a scalar hyperplane's gradient besides."""
        return self.tiles + ((self.ALL or self.HARD) and not self.L)

    def constants(self) -> dict[str, bool]:
        return {name: bool(value) for name, value in self.__dict__.items()}

    def constants_of_merge(self, of_rows: bool) -> dict[str, bool]:
        shared = {name: bool(getattr(self, name)) for name in ("T", "SOFTMAX", "HARD", "RELATIONAL", "KL")}
        return {**shared, "X": bool(self.U if of_rows else self.V), "ALL": bool(self.ALL and of_rows)}

    def column_lses(self) -> list[ColumnStat]:
        there = ((self.T, ColumnStat.LSE_T), (self.V, ColumnStat.LSE_V), (self.SOFTMAX, ColumnStat.LSE_Z))
        return [stat for asked, stat in there if asked]

    def slots(self) -> dict[str, int]:
        """Places of the statistics in the parts (similarity_forward): of rows, and in the same order of columns."""
        t = 2 + self.RELATIONAL + self.KL if self.T else 0
        x = 2 if self.U or self.V else 0
        z = 2 + self.HARD if self.SOFTMAX else 0
        columns = t + x + z
        return {
            "T_AT": 0,
            "X_AT": t,
            "Z_AT": t + x,
            "MATCH_AT": columns,
            "ROW_SLOTS": columns + self.ALL,
            "COLUMN_SLOTS": columns,
        }


def launches(call: Call) -> list[Launch]:
    """Planes that meet in a statistic share a launch and a tile: Z with T (relational), U and V with T (kl), L with Z.

    Others would gain nothing from it (similarity_rows launches U alone): without a statistic of two planes each alone has the
    registers for a tile twice as large, which reads its operands half as often. Within a launch T comes first and stays, the
    students follow one at a time, so that four or five planes hold two tiles, not five.
    """
    ids = {"IDS": call.ids is not None}
    columns = {"COLUMNS": call.columns}
    z = {
        "Z": call.similarity,
        "L": call.hadamard,
        "SOFTMAX": call.softmax,
        "ALL": call.negatives == NEGATIVES_ALL,
        "HARD": call.negatives == NEGATIVES_HARD,
        "RELATIONAL": call.relational,
    }
    cross = {"U": True, "V": call.columns}
    if call.interactive and call.relational:
        return [Launch(T=True, KL=True, **z, **cross, **columns, **ids)]
    out = []
    if call.similarity:  # relational comes with softmax
        out.append(Launch(T=call.relational, COLUMNS=call.columns and call.softmax, **z, **ids))
    if call.interactive:
        out.append(Launch(T=True, KL=True, **cross, **columns, **ids))
    return out


def arguments(call: Call, launch: Launch, tile: tuning.Tile, precision: str) -> dict[str, object]:
    """Arguments that the large kernels share."""
    widths = call.widths()
    return {
        **call.features(),
        "scale": call.scale,
        "teacher_scale": call.teacher_scale,
        "cross_scale": call.cross_scale,
        "plane_weight": call.plane_weight,
        "plane_bias": call.plane_bias,
        "ids": call.ids,
        "text_ids": call.text_ids,
        "n": call.image.shape[0],
        "m": call.text.shape[0],
        **widths,
        "label_offset": call.label_offset,
        **launch.constants(),
        "EVEN": widths["width"] % tile.block_k == 0,
        "TEACHER_EVEN": widths["teacher_width"] % tile.block_k == 0,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "INTERPRETED": interpreted(),
        **tile.options(),
        **COMPILE,
    }
