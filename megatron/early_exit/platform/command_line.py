"""How every program of the project starts and ends, whatever it does in between.

    sys.exit(run_program(main))

At the start: what libraries say about themselves is kept from the screen, unless `-v` or `--verbose` is given. At the
end: Ctrl-C (status 130) and an output that nobody reads any more (`generate.py ... | head -1`, status 141) end a
program without a traceback. Imports neither torch nor core: libraries speak while they are imported, so this comes
first.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable

from megatron.early_exit.platform.failures import in_words

STATUS_INTERRUPTED = 128 + signal.SIGINT
STATUS_OUTPUT_CLOSED = 128 + signal.SIGPIPE

_VERBOSE_FLAGS = ("-v", "--verbose")

# Read by libraries when they are imported, and by the processes that we start.
_QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


def run_program(main: Callable[[], int | None]) -> int:
    """Run `main`, which reads `sys.argv`; returns the exit status. Takes `-v` and `--verbose` out of `sys.argv`.

    main: returns its status (None: 0). Errors that it lets through are reported in one line if a user can mend them
    (ValueError, OSError; status 2)."""
    _open_standard_streams()
    is_verbose = any(flag in sys.argv[1:] for flag in _VERBOSE_FLAGS)
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in _VERBOSE_FLAGS]
    configure_output(is_verbose=is_verbose)
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if is_main_rank():
            print("interrupted", file=sys.stderr)
        return STATUS_INTERRUPTED
    except (ValueError, OSError) as error:
        if output_is_closed():
            discard_output()
            return STATUS_OUTPUT_CLOSED
        print(f"error: {in_words(error)}", file=sys.stderr)
        discard_output()  # it may be what failed: a full disk
        return 2


def add_verbose_flag(parser: argparse.ArgumentParser) -> None:
    """Show `-v` in the help of a program that `run_program` runs."""
    parser.add_argument(
        *_VERBOSE_FLAGS, action="store_true", default=argparse.SUPPRESS, help="show what the libraries have to say"
    )


def show_progress(what: str) -> Callable[[int, int], None]:
    """A function of (done, total) that shows progress on a terminal in one line, and elsewhere the end alone."""

    def show(done: int, total: int) -> None:
        is_last = done == total
        if is_last or sys.stderr.isatty():
            print(f"{what}: {done}/{total}", end="\n" if is_last else "\r", file=sys.stderr, flush=True)

    return show


def is_main_rank() -> bool:
    """Whether this process speaks for all that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def configure_output(*, is_verbose: bool) -> None:
    """Decide what is shown of log messages and warnings: of ours, warnings and errors, on the main rank alone; of
    libraries, errors alone. With `is_verbose`, everything from every rank. PYTHONWARNINGS and -W win for warnings."""
    handler = logging.StreamHandler()
    shown = logging.INFO if is_verbose else logging.WARNING if is_main_rank() else logging.ERROR
    logging.basicConfig(level=shown, format="%(levelname)s: %(message)s", handlers=[handler])
    if is_verbose:
        return
    handler.addFilter(lambda record: record.levelno >= logging.ERROR or _is_ours(record.name))
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        if is_main_rank():
            warnings.filterwarnings("default", module=r"megatron\.early_exit(\.|$)")
            warnings.formatwarning = lambda message, *_: f"WARNING: {message}\n"


def _is_ours(name: str) -> bool:
    return name.startswith("megatron.early_exit")


def _open_standard_streams() -> None:
    """Give a stream that was closed (`>&-`) nothing to read or write. Else the next file that is opened gets its
    number, and what C libraries print goes into that. Characters that the encoding of an output lacks are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def output_is_closed() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file of the system's, or closed
        return False


def discard_output() -> None:
    """Send what is still to be printed nowhere: Python would fail again when it ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return
