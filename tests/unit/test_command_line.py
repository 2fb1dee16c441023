"""How programs start and end: quiet libraries, Ctrl-C, a closed or full output. In processes that import little."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.platform.failures import os_error_in_words
from megatron.early_exit.training.reporting import Reporter
from tests.configs import make_config

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys
from megatron.early_exit.platform.command_line import run_program
def main():
{body}
sys.exit(run_program(main))
"""


def run(body: str, *words: str, **options: object) -> subprocess.CompletedProcess:
    """A program whose main function has this body."""
    lines = "\n".join("    " + line for line in body.splitlines())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"PYTHONPATH": str(ROOT), **options.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=lines), *words], capture_output="stdout" not in options, text=True,
        cwd=ROOT, env=environment, timeout=60, check=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("body", "status", "message"), [
    ("return 3", 3, ""),
    ("return None", 0, ""),
    ("raise ValueError('--size 3: too small')", 2, "error: --size 3: too small\n"),
    ("open('/nowhere/file')", 2, "error: /nowhere/file: no such file or directory\n"),
    ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted\n"),
])  # fmt: skip
def test_ends(body: str, status: int, message: str) -> None:
    result = run(body)
    assert (result.returncode, result.stderr) == (status, message)


def test_other_ranks_are_silent_when_interrupted() -> None:
    result = run("os.kill(os.getpid(), signal.SIGINT)", environment={"RANK": "1"})
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize("count", [10, 100_000])  # what fits into Python's buffer, and what does not
def test_an_output_that_nobody_reads_ends_a_program_quietly(count: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run(f"for n in range({count}): print(n)", stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_pipe_to_another_process_is_no_closed_output() -> None:
    result = run("raise BrokenPipeError('a worker has ended')")
    assert (result.returncode, result.stderr) == (2, "error: a worker has ended\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands for a full disk")
def test_a_full_output_is_said() -> None:
    with open("/dev/full", "w") as full:
        result = run("print('x')", stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 2
    assert result.stderr == "error: no space left on device; free some space, or choose another folder\n"


def test_characters_that_the_output_cannot_show_are_escaped() -> None:
    result = run("print('the\\u00e9 \\udce9')", environment={"PYTHONIOENCODING": "ascii:strict"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "the\\xe9 \\udce9\n", "")


def test_closed_streams_keep_their_numbers(tmp_path: Path) -> None:
    """Else the first file that is opened becomes standard output, and libraries print into it."""
    path = tmp_path / "file"
    body = f"file = open({str(path)!r}, 'w')\nprint('out')\nos.write(1, b'library')\nfile.write(str(file.fileno() > 2))"
    close_all = lambda: [os.close(number) for number in (0, 1, 2)]
    result = run(body, stdin=None, stdout=None, stderr=None, preexec_fn=close_all)
    assert result.returncode == 0 and path.read_text() == "True"


NOISE = """
import logging, types, warnings
def speak(name):
    exec("import warnings; warnings.warn('warning of ' + __name__)", {"__name__": name})
    logging.getLogger(name).warning("log of " + name)
    logging.getLogger(name).error("error of " + name)
speak("megatron.early_exit.data")
speak("megatron.core.optimizer")
print(sys.argv[1:])
"""


def test_libraries_are_quiet_unless_asked() -> None:
    quiet = run(NOISE, "--size", "3")
    assert quiet.stderr.splitlines() == [
        "WARNING: warning of megatron.early_exit.data", "WARNING: log of megatron.early_exit.data",
        "ERROR: error of megatron.early_exit.data", "ERROR: error of megatron.core.optimizer",
    ]  # fmt: skip
    for flag in ("-v", "--verbose"):
        verbose = run(NOISE, "--size", flag, "3")
        for part in ("warning of megatron.core.optimizer", "log of megatron.core.optimizer"):
            assert part in verbose.stderr
        assert verbose.stdout == quiet.stdout == "['--size', '3']\n"


def test_other_ranks_say_errors_alone() -> None:
    result = run(NOISE, environment={"RANK": "1"})
    assert result.stderr.splitlines() == [
        "ERROR: error of megatron.early_exit.data", "ERROR: error of megatron.core.optimizer",
    ]  # fmt: skip


def test_python_warnings_win() -> None:
    assert "warning of megatron.core" in run(NOISE, environment={"PYTHONWARNINGS": "default"}).stderr


def test_errors_of_the_system_in_words() -> None:
    full = OSError(28, "No space left on device", "/data/x")
    assert os_error_in_words(full) == ("/data/x: no space left on device; free some space, or choose another folder")
    assert os_error_in_words(OSError("plain words")) == "plain words"
    assert "/a -> /b: permission denied" in os_error_in_words(OSError(13, "Permission denied", "/a", None, "/b"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands for a full disk")
def test_training_names_a_full_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reporter = Reporter(make_config(metrics_file=str(tmp_path / "metrics.jsonl")), is_active=True)
    full = open("/dev/full", "w")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        with pytest.raises(OSError) as error:
            reporter.text("iteration 1")
    reporter.close()
    assert os_error_in_words(error.value).startswith("standard output: no space left on device")
    os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    full.close()
