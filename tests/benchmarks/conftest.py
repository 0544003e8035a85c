"""The benchmark on a tiny network, in this process."""

import json

import pytest

from benchmarks import __main__ as program
from benchmarks.options import parse_benchmark
from benchmarks.setting import Setting
from tests.conftest import TINY_RUN

WORDS = [
    *TINY_RUN, "--device", "cpu", "--threads", "1", "--rounds", "1", "--steps_per_turn", "1", "--memory", "false",
]  # fmt: skip


@pytest.fixture
def setting(tmp_path):
    return Setting(*parse_benchmark(WORDS), tmp_path)


@pytest.fixture
def benchmark(tmp_path, capsys, monkeypatch):
    """Run the program on a tiny network; return its report and what it printed."""
    monkeypatch.setattr("benchmarks.measure.TRIALS", 1)
    monkeypatch.setattr("benchmarks.measure.LEAST_SECONDS", 0.01)
    monkeypatch.setattr("benchmarks.setting.JPEGS", 32)

    def run(*words):
        file = tmp_path / "new" / "report.json"
        assert program.main([*WORDS, "--json", str(file), *words]) == 0
        captured = capsys.readouterr()
        printed = captured.err + captured.out
        assert file.with_suffix(".md").read_text() in printed
        return json.loads(file.read_text()), printed

    return run


def rows_by(report):
    return {(row["task"], row["subject"]): row for row in report["rows"]}
