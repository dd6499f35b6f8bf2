"""Every instruction set that this CPU has: which kernel runs, and the heart of the suite under each.

A dispatch bug gives right answers slowly, so it is the kernels' names that are looked at.
"""

import os
import subprocess
import sys

import fresh_process
import pytest

import fastattn

HERE = os.path.dirname(os.path.abspath(__file__))
SUITE = ("softmax", "dot_product", "truncated", "decode", "additive", "combinations", "hostile", "same_bits",
         "merge_varlen", "positions", "guard_pages")  # fmt: skip

info = fastattn.cpu_info()


def test_what_is_selected_can_run():
    assert info["selected"] in info["runnable"]
    assert "baseline" in info["runnable"]


def test_kernels_carry_the_name_of_the_instruction_set():
    assert set(info["kernels"]) >= {"float32", "float64"}
    for dtype, kernel in info["kernels"].items():
        assert info["selected"] in kernel, dtype
    assert info["kernels"]["float32"] != info["kernels"]["float64"]


@pytest.mark.parametrize("name", info["runnable"])
def test_forced(name):
    code = "import fastattn; info = fastattn.cpu_info(); print(info['selected'], *info['kernels'].values())"
    selected, *kernels = fresh_process.run(code, FASTATTN_ISA=name).split()
    assert selected == name
    assert kernels
    assert all(name in kernel for kernel in kernels)


@pytest.mark.parametrize("name", ["mmx", "AVX9000", "avx2 ", "base line", "../avx2"])
def test_what_cannot_run_is_refused_at_import(name):
    code = """
    try:
        import fastattn
    except ImportError as error:
        print(error)
    """
    message = fresh_process.run(code, FASTATTN_ISA=name)
    assert name in message
    assert "FASTATTN_ISA" in message
    for runnable in info["runnable"]:
        assert runnable in message


@pytest.mark.parametrize("name", [name for name in info["runnable"] if name != info["selected"]])
def test_suite(name):
    """The tests of numbers, bits and memory access once more, in a process that is forced to `name`."""
    files = [os.path.join(HERE, f"test_{part}.py") for part in SUITE]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider", *files],
        env=fresh_process.environment(FASTATTN_ISA=name),
        cwd=os.path.dirname(HERE),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
