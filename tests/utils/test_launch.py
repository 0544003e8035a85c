"""Signals set one flag, which a lost exception does not clear."""

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from hf_ddpm.utils.launch import SIGNALS, Interrupted, run_script, signals
from tests.conftest import LIMIT, TINY_RUN

ROOT = Path(__file__).parents[2]
HANDLED = (*SIGNALS, signal.SIGALRM)


@pytest.fixture(autouse=True)
def signals_are_reset(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/sample.py"])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signals.number == 0


def exit_code_of(main):
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code


def wait_forever():
    while True:
        time.sleep(0.01)


def lost_in_a_callback(number):
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert reference() is None
    wait_forever()


def swallowed_by_a_library(number):
    try:
        signal.raise_signal(number)
    except BaseException:
        pass
    wait_forever()


def replaced_by_another_error(number):
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise ValueError("cannot import torch") from None


def wrapped_in_another_error(number):
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as error:
        raise ImportError("no module") from error


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "main",
    [
        signal.raise_signal,
        lost_in_a_callback,
        swallowed_by_a_library,
        replaced_by_another_error,
        wrapped_in_another_error,
    ],
)
def test_signal_prints_one_line_even_if_its_exception_is_lost(capsys, number, main):
    assert exit_code_of(lambda argv: main(number)) == 128 + number
    assert capsys.readouterr().err == f"sample.py: stopped by {signal.Signals(number).name}\n"


def test_cleanup_is_not_interrupted(monkeypatch):
    monkeypatch.setattr("hf_ddpm.utils.launch.AGAIN", 0.01)
    cleaned = []

    def main(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            again, fired = signals._raise_again, []
            signal.signal(signal.SIGALRM, lambda *at: (fired.append(at), again(*at)))
            end = time.monotonic() + LIMIT
            while len(fired) < 3:
                assert time.monotonic() < end
                time.sleep(0.01)
            cleaned.append(True)
            signal.signal(signal.SIGALRM, again)

    assert exit_code_of(main) == 128 + signal.SIGTERM and cleaned == [True]


def test_signals_are_deferred_except_second_ctrl_c():
    with signals.handled(deferred=True):
        signal.raise_signal(signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        with pytest.raises(Interrupted), signals.at_once():
            raise AssertionError("not reached")
        signals.settle()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        signals.settle()
        with pytest.raises(Interrupted), signals.at_once():
            signal.raise_signal(signal.SIGTERM)
        signals.settle()


def test_signal_of_earlier_call_does_not_stop_next_call():
    with signals.handled(deferred=True):
        signal.raise_signal(signal.SIGTERM)
    with signals.handled(deferred=True):
        assert signals.number == 0


def test_training_restores_signal_handlers(run_training, tmp_path):
    before = [signal.getsignal(number) for number in HANDLED]
    assert run_training(tmp_path, "--max_train_steps", "1") == 0
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_help_and_errors_keep_their_codes():
    def wrong(argv):
        raise OSError("disk full")

    assert exit_code_of(lambda argv: 0) == 0
    assert exit_code_of(lambda argv: sys.exit(0)) == 0
    assert exit_code_of(wrong) == 1
    with pytest.raises(RuntimeError):
        run_script(lambda argv: exec("raise RuntimeError"))


def command(script, folder, trained):
    return {
        "train": [*TINY_RUN, "--output_dir", str(folder), "--max_train_steps", "20"],
        "sample": ["--model", str(trained), "--output", str(folder), "--num_images", "4"],
    }[script]


def start(script, words):
    # Each import prints a line: signals are sent after a number of lines, not of seconds.
    return subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / "scripts" / f"{script}.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_import(line):
    return line.startswith("import time:")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("script", ["train", "sample"])
def test_signal_at_any_time_during_startup_prints_one_line(trained, tmp_path, script, number):
    whole = start(script, command(script, tmp_path / "whole", trained))
    lines = [line for line in whole.stderr if is_import(line)]
    first = next(i for i, line in enumerate(lines) if line.split("|")[-1].strip() == "hf_ddpm.cli") + 1
    for moment in range(10):
        folder = tmp_path / f"{moment}"
        process = start(script, command(script, folder, trained))
        seen = 0
        for line in process.stderr:
            seen += is_import(line)
            if seen == first + 1 + (len(lines) - first - 2) * moment // 10:
                break
        process.send_signal(number)
        rest = [line for line in process.stderr.read().splitlines() if not is_import(line)]
        assert process.wait() == 128 + number, (moment, rest)
        assert not any("Traceback" in line or "Exception ignored" in line for line in rest), (moment, rest)
        assert sum("stopped by" in line for line in rest) == 1, (moment, rest)


@pytest.mark.parametrize("lines", [1, 100_000])
def test_reader_that_closes_output_ends_program_quietly(lines):
    program = (
        f"from hf_ddpm.utils.launch import run_script\nrun_script(lambda _: [print(i) for i in range({lines})] and 0)"
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", program], **options) as process:
        process.stdout.close()  # like `| head`, before the first line
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
