"""The tables and the chart in README and docs."""

import sys

import pytest

from benchmarks import tables


def test_tables_and_chart_are_those_of_the_result_files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert not ended.value.code, ended.value.code
