"""benchmarks.machine_code: parsing of SASS, the pipes of a tile by hand, and compiled kernels."""

import importlib.util
import itertools
from collections import Counter

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from benchmarks.machine_code import sass
from benchmarks.machine_code.__main__ import main, own_rates, parse_tile, tile_text
from benchmarks.machine_code.kernels import ATTENTION, CASES, compiled, kernel_of
from benchmarks.machine_code.peers import PUBLISHED, calibration
from benchmarks.machine_code.pipes import (
    ARCHITECTURES,
    CONSTANTS,
    Phase,
    Program,
    cycles,
    predict,
)
from benchmarks.results_file import RESULTS, read_csv
from simplclip.kernels.tuning import Tile
from simplclip.plan import time
from simplclip.plan.cards import CARDS
from support.ops.predicted_calls import predicted, similarity_call

# A loop over tiles with a loop of two products, as cuobjdump prints it.
TEXT = """
		Function : some_kernel
	.headerflags	@"EF_CUDA_SM86 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM86)"
        /*0000*/                   S2R R6, SR_CTAID.X ;                  /* 0x0000000000067919 */
                                                                         /* 0x000e620000002500 */
        /*0010*/                   IMAD.MOV.U32 R5, RZ, RZ, R6 ;         /* 0x00006b00ff057624 */
        /*0020*/               @P0 BRA 0x40 ;                            /* 0x0000000000067919 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;   /* 0x0000000000067919 */
        /*0040*/                   LDSM.16.M88.4 R8, [R5] ;              /* 0x0000000000067919 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8.reuse, R2, R4 ;  /* 0x0000000000067 */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R3, R4 ;  /* 0x0000000000067919 */
        /*0070*/             @!UP1 LDGSTS.E.BYPASS.128 [R5], [R2.64] ;   /* 0x0000000000067919 */
        /*0080*/              @!P0 BRA 0x40 ;                            /* 0x0000000000067919 */
        /*0090*/                   MUFU.EX2 R7, R4 ;                     /* 0x0000000000067919 */
        /*00a0*/              @!PT LDS RZ, [RZ] ;                        /* 0x0000000000067919 */
        /*00b0*/                   SHFL.BFLY PT, R7, R7, 0x2, 0x1f ;     /* 0x0000000000067919 */
        /*00c0*/                   FADD.FTZ R7, R7, R4 ;                 /* 0x0000000000067919 */
        /*00d0*/                   STS.64 [R5], R6 ;                     /* 0x0000000000067919 */
        /*00e0*/                   LDS.U16 R4, [R5] ;                    /* 0x0000000000067919 */
        /*00f0*/               @P1 BRA 0x10 ;                            /* 0x0000000000067919 */
        /*0100*/               @P2 EXIT ;                                /* 0x0000000000067919 */
        /*0110*/                   EXIT ;                                /* 0x0000000000067919 */
        /*0120*/                   BRA 0x120;                            /* 0x0000000000067919 */
"""


def parsed() -> list[sass.Instruction]:
    return sass.functions(TEXT)["some_kernel"]


def test_functions_end_at_the_exit_of_all_threads():
    instructions = parsed()
    assert len(instructions) == 18
    assert instructions[7] == (0x70, "@!UP1", "LDGSTS.E.BYPASS.128", "[R5], [R2.64]")
    assert instructions[-1].family == "EXIT"


def test_the_loop_of_products_and_what_surrounds_it():
    instructions = parsed()
    loop = sass.Loop(0x40, 0x80)
    assert sass.loops(instructions) == [sass.Loop(0x10, 0xF0), loop]
    assert sass.innermost(instructions) == [loop]
    around = sass.around(instructions, [loop])
    assert [made.address for made in around] == list(range(0x10, 0x100, 0x10))
    rest = sass.without(around, [loop])
    assert [made.family for made in rest[-4:]] == ["FADD", "STS", "LDS", "BRA"]
    assert len(rest) == len(around) - 5


def test_what_a_warp_asks_of_the_units():
    instructions = parsed()
    body = sass.Loop(0x40, 0x80).body(instructions)
    matrices, copies = 4 * 8 * 8 * 2, 32 * 16
    asked = {"issue": 5, "mma.sync": 2 * 16 * 8 * 16, "shared": matrices + copies}
    assert sass.counts(body) == asked
    asked = sass.counts(instructions[9:15])
    assert asked == {"issue": 6, "mufu": 1, "shuffle": 1, "fp32": 1, "shared": 32 * 8 + 32 * 2}


@pytest.mark.parametrize(
    ("name", "operands", "macs", "operand_bytes"),
    [
        ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR8], R24, gsb0", 64 * 64 * 16, 128 * 16 * 2),
        ("HGMMA.64x128x16.F32.BF16", "R24, R4, gdesc[UR8], R24", 64 * 128 * 16, 128 * 16 * 2),
        ("HGMMA.64x64x8.F32.TF32", "R24, gdesc[UR8], RZ, !UPT", 64 * 64 * 8, 128 * 8 * 4),
    ],
)
def test_wgmma_reads_its_operands_from_shared_memory(name, operands, macs, operand_bytes):
    """Four warps execute one; the second of these has its left operand in registers."""
    asked = sass.counts([sass.Instruction(0, "", name, operands)])
    assert asked == {"issue": 1, "tensor": macs // 4, "shared": operand_bytes // 4}


def test_cycles_by_hand():
    """Four warps on an A100: one instruction of each is one cycle of the issue."""
    asked = {"issue": 10, "fp32": 3, "imad": 1, "alu": 2, "mufu": 1, "shuffle": 2, "shared": 256}
    took = cycles(Counter(asked | {"mma.sync": 2048}), 4, 80)
    assert took == {
        "tensor": 8, "issue": 10, "fma": 3 * 2 + 2, "alu": 4, "mufu": 8, "shared": 8 + 8
    }  # fmt: skip


def test_the_busiest_pipe_or_the_latencies_bound_a_kernel():
    body = sass.Loop(0x40, 0x80).body(parsed())
    macs = 4 * 4096 * 8  # four warps, eight steps
    tensor = macs / CONSTANTS["tensor"][86]
    l2 = CONSTANTS["l2"][86] * CONSTANTS["l2 share"][86]
    phases = [Phase(body, 8, 2 * tensor * l2, products=True), Phase([], 1, tensor * l2)]
    found = predict(Program(86, 4, 4, 100), phases, macs)
    assert (found.share, found.bound) == (pytest.approx(1 / 3), "l2")
    assert (found.products["l2"], found.rest["l2"]) == (pytest.approx(2), pytest.approx(1))
    assert found.per_mma == 5 / 2
    waiting = [Phase(body, 8, products=True)]
    found = predict(Program(86, 4, 9, 1), waiting, macs)
    expected = tensor / (tensor + 8 * CONSTANTS["exposed"][86])
    assert (found.share, found.bound) == (pytest.approx(expected), "latency")
    found = predict(Program(86, 4, 9, 2), waiting, macs)
    assert (found.share, found.bound) == (1, "tensor")
    # with two stages the copies of a step start one step before it
    expected = tensor / (8 * CONSTANTS["l2 latency"][86])
    assert predict(Program(86, 4, 2, 1), waiting, macs).share == pytest.approx(expected)


def test_tiles_by_their_text():
    assert parse_tile("128x64x32/4/3/248") == Tile(128, 64, 32, 4, 3, registers=248)
    assert tile_text(parse_tile("64x64x16/8/3")) == "64x64x16/8/3"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--tile", "128x64/4"], "expected block sides, warps, stages such as 128x64x32/4/3, got"),
        (["--kernel", "statistic", "softmax"], "--kernel: expected the beginning of one of"),
        (["--write", "--tile", "64x64x32/4/3"], "--write: expected the tiles of kernels/tuning.py"),
    ],
)
def test_options_are_checked_first(options, error, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert error in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_kernel():
    """The loop has the products of one step, and the copies of a step reach shared memory."""
    counted = compiled(CASES[0], 90, Tile(128, 64, 64, 4, 2))
    (body,) = counted.products
    assert {made.family for made in body if sass.tensor_macs([made])} == {"HGMMA"}
    assert sass.tensor_macs(body) * 4 == 128 * 64 * 64
    copied = sass.counts(made for made in body if made.family == "LDGSTS")["shared"]
    assert copied * 4 == (128 + 64) * 64 * 2
    assert 0 < counted.predicted(512).share <= 1
    assert (counted.row.registers, counted.row.spills) > (64, 0)


def test_the_constants_of_the_plan_are_those_of_the_result_files():
    """The newest ones, by `--write` and `--peers`: every kernel with every architecture."""
    path = max(RESULTS.glob("machine-code-*.csv"))
    assert own_rates(read_csv(path)) == time.OWN_RATES
    assert tuple(sorted(ARCHITECTURES)) == time.OWN_ARCHITECTURES
    kinds = {case.name for case in CASES} | {f"attention {way}" for way in ATTENTION}
    assert {f"own {name}" for name in kinds} == set(time.OWN_RATES)
    peers = read_csv(max(RESULTS.glob("peers-predicted-*.csv")))
    assert calibration(peers) == time.CALIBRATION
    assert len(peers) == len(PUBLISHED)


def test_the_result_file_has_the_tiles_of_the_table():
    """After a change of a tile the shares are counted again."""
    rows = read_csv(max(RESULTS.glob("machine-code-*.csv")))
    tiles = {(row["kernel"], int(row["sm"])): row["tile"] for row in rows}
    for case, architecture in itertools.product(CASES, ARCHITECTURES):
        tile = tile_text(kernel_of(case, architecture).tile)
        assert tiles[case.name, architecture] == tile, (case.name, architecture)


@pytest.mark.parametrize(
    ("name", "ids", "kinds"),
    [
        ("contrastive", False, {"statistics", "gradient"}),
        ("contrastive", True, {"statistics, ids", "gradient, ids"}),
        ("pair matching", False, {"statistics, pair matching", "gradient, pair matching"}),
        ("relational", True, {"statistics, teacher", "gradient, teacher"}),
        ("sigmoid", False, {"sigmoid"}),
    ],
)
def test_the_plan_names_kernels_and_forms(name, ids, kinds):
    """With the machine code's shares in half types; float32 has none."""
    kernels = predicted(
        similarity_call(name, ids=ids), torch.bfloat16, torch.device("cuda", 0)
    ).usage.kernels
    counted = {kernel.rate: kernel for kernel in kernels if kernel.multiply_adds}
    assert {f"own {kind}" for kind in kinds} == {kind for kind in counted if kind[:3] == "own"}
    for kind in kinds:
        kernel = counted[f"own {kind}"]
        share = time.OWN_RATES[kernel.rate][time.OWN_ARCHITECTURES.index(90)] * time.CALIBRATION
        card = CARDS["h100"]
        ms = 2e-9 * kernel.multiply_adds / card.half / share
        assert time.likely_ms(kernel, card)["products"] == pytest.approx(ms)
        kernel.dtype = torch.float32
        assert time.likely_share(kernel, card) == time.ASSUMED_RATES["own"]
