"""simplclip plan: the time of a run on a card, what bounds it, and the line to paste."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from simplclip.commands.plan import parse_count
from simplclip.common.errors import InputError
from simplclip.plan import count, fake, report, search
from simplclip.plan.cards import CARDS, GIB
from simplclip.plan.kernels import Kernel
from simplclip.plan.measure import predict
from simplclip.plan.search import Budget, Planner
from simplclip.plan.step import TrainerStep
from simplclip.plan.time import step_time
from simplclip.train import config
from support.programs import call

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
CUDA, CARD = torch.device("cuda", 0), CARDS["rtx-3090"]
COPY = Kernel("torch", "copy_", torch.float16, bytes=10**14)


def time_of(tiny, *changes):
    step = TrainerStep(config.load(tiny, changes), "bf16")
    return step_time(predict(step, CUDA).kernels, CARD)


@pytest.mark.slow
def test_time_grows_with_the_batch_and_with_caching(tiny):
    """Gradient caching encodes all but the last micro-batch twice.

    A forward is a third of forward and backward.
    """
    one, two = (time_of(tiny, f"data.batch_size={n}") for n in (2048, 4096))
    assert one.least < one.likely
    assert two.likely == pytest.approx(2 * one.likely, rel=0.1)
    cached = time_of(tiny, "data.batch_size=16384", "data.micro_batch=2048")
    assert 1.15 < cached.likely / (8 * one.likely) < 1.45


@pytest.mark.slow
def test_a_model_without_a_config(monkeypatch):
    monkeypatch.setattr(search, "MOST_PAIRS", 2048)  # fewer predictions
    result = call(
        "plan", "siclip-tiny", "--card", "RTX 3060", "--pairs", "100k", "--set", "run.epochs=3"
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "rtx-3060" in lines[0]
    _, whole, cached = (line for line in lines if " yes " in line)
    likely, least, rate = (float(word.replace(",", "")) for word in whole.split()[-3:])
    assert 0 < least < likely
    assert whole.split()[4] == "2,048+"  # larger ones were not tried
    assert rate == pytest.approx(1e3 * 2048 / likely, rel=0.02)
    text = dict(
        re.split(r"\s{2,}", line, maxsplit=1)
        for line in lines
        if re.match(r"(run|bound by|loader|error|paste) ", line)
    )
    assert "an epoch of 100,000 pairs takes" in text["run"]
    assert "the run of 3 epochs" in text["run"]
    assert sum(
        map(int, re.findall(r"(\d+)%[,;]", text["bound by"].split("of all")[0]))
    ) == pytest.approx(100, abs=2)
    assert "300 images/s a worker, assumed" in text["loader"]
    assert text["paste"] == "--set data.batch_size=256 --set data.micro_batch=null"


def test_the_step_that_is_chosen(tiny, monkeypatch):
    """One graph where it fits, else the configured micro-batch, else the largest that fits."""

    def predict(step, device, card):
        return count.Usage(peak=step.config.data.images_at_a_time, kernels=[COPY])

    def chosen(usable):
        planner.budget = Budget(usable, context=0, libraries=0, fragmentation=0)
        row = report.chosen(planner, list(planner.rows()))
        return row and (row.batch_size, row.micro_batch)

    monkeypatch.setattr(search, "predict", predict)
    values = config.load(tiny, ["data.batch_size=96", "data.micro_batch=48"])
    planner = Planner(values, Budget(GIB), card="rtx-3090")
    assert [chosen(usable) for usable in (200, 95, 40, 0)] == [(96, None), (96, 48), (96, 16), None]


@pytest.mark.parametrize(("card", "precision"), [("rtx-3090", "bf16"), ("t4", "fp32")])
def test_automatic_precision_is_that_of_training_on_the_card(tiny, card, precision):
    values = config.load(tiny, ["run.precision=auto"])
    assert Planner(values, Budget(GIB), card=card).precision == precision


@pytest.mark.slow
def test_cards_share_their_predictions(tiny):
    """Memory and time of other batches and cards lie between three predictions, as near as a search
    would find them.
    """
    planner = Planner(config.load(tiny, []), Budget(GIB), card="rtx-3090")
    limits = [Budget(memory * GIB).usable for memory in (2, 4, 8)]
    graphs = search.predict_graphs(
        planner.predict_in_one_graph, limits[0], limits[2], lambda line: None
    )
    assert len(graphs.usages) == 3
    size, rate = graphs.largest_batch(limits[1], CARDS["rtx-4090"])
    direct = Planner(planner.config, Budget(4 * GIB), card="rtx-4090")
    row = direct.predict_row("in one graph", size, None)
    assert row.peak <= limits[1] < 1.03 * row.peak
    assert rate == pytest.approx(row.images_per_s, rel=0.02)


def test_one_prediction_is_enough_for_cards():
    usage = count.Usage(peak=100, kernels=[Kernel("torch", "mm", torch.float16, bytes=10**9)])
    size, rate = search.Graphs({10: usage}).largest_batch(1000, CARD)
    assert (size, search.Graphs({10: usage}).largest_batch(5, CARD)) == (98, (0, 0.0))
    assert rate == pytest.approx(1e3 * 10 / step_time(usage.kernels, CARD).ms)


@pytest.mark.slow
def test_layouts_of_convolutions_in_bfloat16(tiny):
    """cuDNN keeps channels_last.

    Without a device torch would take another library for bfloat16, which does not.
    """
    x, weight = (
        torch.empty(2, 16, n, n, device="meta").contiguous(memory_format=torch.channels_last)
        for n in (8, 3)
    )
    mode = FakeTensorMode(allow_fallback_kernels=False)
    images, weights = (fake.faker(mode, CUDA)(t.to(torch.bfloat16)) for t in (x, weight))
    with fake.fake_step(mode, CUDA):
        assert torch.conv2d(images, weights).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_rates_of_loaders(tiny):
    assert report.loader_rate(config.load(tiny)) is None


@pytest.mark.slow
def test_pairs_that_are_held_out_take_no_time(tiny, monkeypatch):
    monkeypatch.setattr(report.data, "dataset_size", lambda shards: 3000)
    row = SimpleNamespace(batch_size=96, images_per_s=5.0, time=SimpleNamespace(ms=96.0))
    texts = [report._duration_text(seconds) for seconds in (0.2, 7, 90)]
    assert texts == ["less than a second", "7 s", "1.5 minutes"]
    for share, pairs in ((0, "3,000 pairs takes 10.0"), (0.1, "2,700 pairs takes 9.0")):
        settings = config.load(tiny, [f"eval.hold_out={share}"])
        assert f"an epoch of {pairs} minutes" in report._run_length_text(settings, row, None)


def rows_of_all_cards(tiny, capsys, *changes, **options):
    """Returns the output of --cards all, as a text and as the words of each card's row."""
    report.run_all(config.load(tiny, ["data.micro_batch=null", *changes]), **options)
    text = capsys.readouterr().out
    words = [line.split() for line in text.splitlines()]
    rows = {row[0]: row for row in words if row and row[0] in CARDS}
    assert len(rows) > 10
    return text, rows


def test_all_cards_read_the_pairs_from_the_shards(tiny, monkeypatch, capsys):
    """Hours of 2 epochs of the 2,700 of 3,000 pairs that are not held out, 96 a step."""
    monkeypatch.setattr(report.data, "dataset_size", lambda shards: 3000)
    usage = count.Usage(peak=GIB, kernels=[COPY])
    monkeypatch.setattr(search, "predict", lambda step, device, card: usage)
    _, rows = rows_of_all_cards(tiny, capsys, "run.epochs=2", "eval.hold_out=0.1")
    for name, row in rows.items():
        ms = step_time([COPY], CARDS[name]).ms
        assert float(row[6]) == pytest.approx(2 * 2700 / 96 * ms / 3.6e6, abs=0.05)


def test_hours_of_all_cards(tiny, monkeypatch, capsys):
    """Of 10 epochs of --pairs, at the largest batch where the run does not fit, none where nothing
    fits.
    """

    def predict(step, device, card):
        size = step.config.data.batch_size
        copy = replace(COPY, bytes=size * 10**13)
        return count.Usage(peak=(least + size // 4) * GIB, kernels=[copy])

    least = 5
    monkeypatch.setattr(search, "predict", predict)
    text, rows = rows_of_all_cards(tiny, capsys, "data.batch_size=96", pairs=1000)
    assert "hours: of 10 epochs (the default) of 1,000 pairs\n" in text
    assert "Where the run does not fit, its hours are those of the largest batch.\n" in text
    assert max(map(len, text.splitlines())) <= 80
    for name, fits in (("rtx-3090", "no"), ("a100-40", "yes")):
        ms = step_time([COPY], CARDS[name]).ms
        assert rows[name][4] == fits
        assert float(rows[name][6]) == pytest.approx(10 * 1000 * ms / 10 / 3.6e6, rel=0.1)
    assert rows["rtx-3090"][5] == "-"
    least = 200
    text, rows = rows_of_all_cards(tiny, capsys)
    assert "hours: of the run's 50 steps (--pairs: of epochs)\n" in text
    assert {(row[2], *row[4:7]) for row in rows.values()} == {("-", "no", "-", "-")}
    assert "Where the run" not in text


def test_progress_on_a_terminal_is_a_line_that_vanishes(monkeypatch, capsys):
    terminal = io.StringIO()
    monkeypatch.setattr(
        report, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=60)
    )
    with report.Output("siclip-s0") as output:
        output.print("a row")
        output.tell("256 pairs")
    assert capsys.readouterr() == ("a row\n", "")
    shown = terminal.getvalue()
    assert "predicting siclip-s0, which may take a minute" in shown
    assert "256 pairs" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # up, and erased


def test_a_loader_that_is_slower_than_the_card():
    few, many = report.loader_text(4700.0, None), report.loader_text(28_725.0, 250.0)
    assert few.startswith("16 workers for 4,700 images/s (300 images/s a worker, assumed")
    assert many.startswith("bounds the run: 16 workers bring 4,000 of 28,725 images/s (250 ")


@pytest.mark.slow
def test_counts_and_wrong_usage(tiny):
    counts = {None: None, "12.4M": 12_400_000, "500k": 500_000, "1,000": 1000}
    assert {text: parse_count(text) for text in counts} == counts
    for text in ("", "many", "-5", "nan"):
        with pytest.raises(InputError, match="--pairs: expected a number of pairs such as 12.4M"):
            parse_count(text)
    assert "expected a card or the size of its memory, or --cards all" in call("plan", tiny).output
    assert "got 'siclip-s9'" in call("plan", "siclip-s9", "--card", "3090").output
    for options in (["--json"], ["--device", "cpu"]):
        result = call("plan", tiny, "--cards", "all", *options)
        assert "expected neither --json nor --device cpu" in result.output
