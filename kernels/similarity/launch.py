"""The options of a call of similarity_loss for its kernels, and the planes of each launch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import COMPILE, interpreted
from simplclip.ops.similarity import call as calls
from simplclip.ops.similarity.call import ColumnStat, SimilarityCall


def features(call: SimilarityCall) -> dict[str, Tensor | None]:
    """The features for the kernels; without a projection the student's own."""
    names = ("image", "text", "teacher_image", "teacher_text")
    projected_image, projected_text = (call.student_image, call.student_text) if call.interactive else (None, None)
    given = {name: getattr(call, name) for name in names}
    return given | {"projected_image": projected_image, "projected_text": projected_text}


def widths(call: SimilarityCall) -> dict[str, int]:
    teacher = call.image if call.teacher_image is None else call.teacher_image
    return {"width": call.image.shape[1], "teacher_width": teacher.shape[1]}


STUDENTS = ("HAS_STUDENT", "HAS_HADAMARD", "HAS_IMAGE_TO_TEACHER", "HAS_TEACHER_TO_TEXT")  # matrices with a gradient


@dataclass(frozen=True)
class Launch:
    """The matrices that one launch multiplies, and the statistics that it computes."""

    HAS_STUDENT: bool = False
    HAS_HADAMARD: bool = False
    HAS_TEACHER: bool = False
    HAS_IMAGE_TO_TEACHER: bool = False
    HAS_TEACHER_TO_TEXT: bool = False
    SOFTMAX: bool = False
    ALL_NEGATIVES: bool = False
    HARD_NEGATIVES: bool = False
    RELATIONAL: bool = False
    KL: bool = False
    COLUMNS: bool = False
    HAS_IDS: bool = False

    @property
    def students(self) -> int:
        """The number of matrices with a gradient."""
        return sum(getattr(self, name) for name in STUDENTS)

    @property
    def tiles(self) -> int:
        """The number of matrices, by which tiles are tuned. The teacher's means with two students count as four."""
        return max(self.students + self.HAS_TEACHER, 4 * (self.RELATIONAL and self.KL))

    @property
    def statistics_tiles(self) -> int:
        """The same for forward; with older compilers a scalar hyperplane's losses need registers too."""
        return self.gradient_tiles if tuning.OLDER else self.tiles

    @property
    def gradient_tiles(self) -> int:
        """The same for backward, where a scalar hyperplane's gradient needs registers too."""
        return self.tiles + ((self.ALL_NEGATIVES or self.HARD_NEGATIVES) and not self.HAS_HADAMARD)

    def constants(self) -> dict[str, bool]:
        return {name: bool(value) for name, value in self.__dict__.items()}

    def constants_of_merge(self, of_rows: bool) -> dict[str, bool]:
        names = ("HAS_TEACHER", "SOFTMAX", "HARD_NEGATIVES", "RELATIONAL", "KL")
        cross = self.HAS_IMAGE_TO_TEACHER if of_rows else self.HAS_TEACHER_TO_TEXT
        constants = {"HAS_CROSS": cross, "ALL_NEGATIVES": self.ALL_NEGATIVES and of_rows}
        return {name: bool(value) for name, value in ({n: getattr(self, n) for n in names} | constants).items()}

    def column_lses(self) -> list[ColumnStat]:
        there = {
            ColumnStat.LSE_TEACHER: self.HAS_TEACHER,
            ColumnStat.LSE_TEACHER_TO_TEXT: self.HAS_TEACHER_TO_TEXT,
            ColumnStat.LSE_STUDENT: self.SOFTMAX,
        }
        return [stat for stat, asked in there.items() if asked]

    def slots(self) -> dict[str, int]:
        """Indices of the statistics in forward's parts, in the same order for rows and columns."""
        t = 2 + self.RELATIONAL + self.KL if self.HAS_TEACHER else 0
        x = 2 if self.HAS_IMAGE_TO_TEACHER or self.HAS_TEACHER_TO_TEXT else 0
        z = 2 + self.HARD_NEGATIVES if self.SOFTMAX else 0
        columns = t + x + z
        return {
            "TEACHER_AT": 0,
            "CROSS_AT": t,
            "STUDENT_AT": t + x,
            "PAIR_MATCHING_AT": columns,
            "ROW_SLOTS": columns + self.ALL_NEGATIVES,
            "COLUMN_SLOTS": columns,
        }


def launches(call: SimilarityCall) -> list[Launch]:
    """Planes that one statistic needs share a launch and a tile: Z with T (relational), U and V with T (kl), L with Z.

    Other planes have launches of their own (similarity_rows launches only U): a single plane has registers for a tile twice
    as large, which reads its operands half as often. Within a launch T is first and is kept, and the student's matrices
    follow one at a time, so that two tiles are in registers instead of four or five.
    """
    ids = {"HAS_IDS": call.ids is not None}
    columns = {"COLUMNS": call.columns}
    z = {
        "HAS_STUDENT": call.has_student,
        "HAS_HADAMARD": call.has_hadamard,
        "SOFTMAX": call.softmax,
        "ALL_NEGATIVES": call.negatives == calls.ALL_NEGATIVES,
        "HARD_NEGATIVES": call.negatives == calls.HARD_NEGATIVES,
        "RELATIONAL": call.relational,
    }
    cross = {"HAS_IMAGE_TO_TEACHER": True, "HAS_TEACHER_TO_TEXT": call.columns}
    if call.interactive and call.relational:
        return [Launch(HAS_TEACHER=True, KL=True, **z, **cross, **columns, **ids)]
    out = []
    if call.has_student:  # relational implies softmax
        out.append(Launch(HAS_TEACHER=call.relational, COLUMNS=call.columns and call.softmax, **z, **ids))
    if call.interactive:
        out.append(Launch(HAS_TEACHER=True, KL=True, **cross, **columns, **ids))
    return out


def arguments(call: SimilarityCall, launch: Launch, tile: tuning.Tile, precision: str) -> dict[str, object]:
    """Arguments of both large kernels."""
    return {
        **features(call),
        "scale": call.scale,
        "teacher_scale": call.teacher_scale,
        "cross_scale": call.cross_scale,
        "plane_weight": call.plane_weight,
        "plane_bias": call.plane_bias,
        "ids": call.ids,
        "text_ids": call.text_ids,
        "n": call.image.shape[0],
        "m": call.text.shape[0],
        **widths(call),
        "label_offset": call.label_offset,
        **launch.constants(),
        "EVEN": call.image.shape[1] % tile.block_k == 0,
        "TEACHER_EVEN": widths(call)["teacher_width"] % tile.block_k == 0,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "INTERPRETED": interpreted(),
        **tile.options(),
        **COMPILE,
    }
