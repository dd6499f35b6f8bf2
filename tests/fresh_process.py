"""Run Python code in a fresh interpreter: for tests of imports, signals, forks and memory."""

import os
import subprocess
import sys
import textwrap


def environment(**changes):
    """The environment of a child that imports the same fastattn as this process; None removes a variable."""
    variables = dict(os.environ)
    # With the tests' folder, so that a child can use its modules.
    paths = [os.path.dirname(os.path.abspath(__file__)), *(path or os.getcwd() for path in sys.path)]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    for name in ("FASTATTN_NUM_THREADS", "OMP_NUM_THREADS"):
        variables.pop(name, None)
    for name, value in changes.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = str(value)
    return variables


def start(code, **changes):
    """Start `code` and return the process, its output piped as text."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Seconds after which a child counts as hanging: far more than the slowest takes on a busy machine.
HANGS = float(os.environ.get("FASTATTN_TEST_HANGS", "300"))  # an emulator takes longer


def finish(process, timeout=HANGS):
    """Wait for a process of `start`; returns (return code, stdout, stderr), and never leaves it running."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{stdout}\n{stderr}") from None
    return process.returncode, stdout, stderr


def run(code, timeout=HANGS, **changes):
    """Run `code`, require that it succeeds, and return its standard output."""
    returncode, stdout, stderr = finish(start(code, **changes), timeout)
    assert returncode == 0, f"exit status {returncode}\n{stdout}\n{stderr}"
    return stdout
