"""Runs programs that a model has written, each in a process of its own with limits on time and memory.

This is no sandbox: the program has the rights of whoever runs it. Use a container, or a machine that has nothing to
lose.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

MEMORY_BYTES = 2 * 2**30


def passes(program: str, seconds: float = 10.0) -> bool:
    """Whether it ends by itself, in time, with status 0. Its own children end with it."""
    with tempfile.TemporaryDirectory() as folder:
        # -I: without our folder, environment variables and user packages.
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED, str(MEMORY_BYTES)], cwd=folder, env={}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(program, timeout=seconds)
            return process.returncode == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
program = sys.stdin.read()
exec(compile(program, "<answer>", "exec"), {"__name__": "__main__"})
"""
