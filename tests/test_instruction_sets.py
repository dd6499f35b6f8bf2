"""Which kernels run, by default and when FASTATTN_ISA selects others.

A dispatch bug gives right answers slowly, so the names of the kernels are checked, and the bits of their results. The
numeric tests run only on the default. `FASTATTN_ISA=avx2 python -m pytest` runs them on another set, and .ci/run does
so for every set that its machine can run; the last lines of each run say which one was used (conftest.py).
"""

import pathlib
import re
import sys
import textwrap

import fresh_process
import numpy as np
import pytest
from conftest import built_instruction_sets, describe_instruction_sets

import fastattn
from fastattn import reference

info = fastattn.cpu_info()


def kernels_of(name, dtype):
    """The set whose kernels serve a dtype: avx512_bf16 and avx512_amx have some for bfloat16 only."""
    return name if dtype == "bfloat16" else name.removesuffix("_bf16").removesuffix("_amx")


def test_what_is_selected_can_run():
    assert info["selected"] in info["runnable"]
    assert "baseline" in info["runnable"]


def test_kernels_carry_the_name_of_the_instruction_set():
    assert set(info["kernels"]) >= {"float32", "float64"}
    for dtype, kernel in info["kernels"].items():
        assert kernel.endswith(f"_{kernels_of(info['selected'], dtype)}"), dtype
    assert info["kernels"]["float32"] != info["kernels"]["float64"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_features_are_those_that_the_operating_system_lists():
    listed = {name: name for name in ("amx_bf16", "avx512_bf16", "avx512_fp16")}
    if info["machine"] == "aarch64":
        listed = {"fp16": "asimdhp", "fhm": "asimdfhm", "bf16": "bf16"}
    words = set(re.findall(r"\w+", pathlib.Path("/proc/cpuinfo").read_text()))
    if info["machine"] == "aarch64" and "asimd" not in words:
        pytest.skip("an emulator, which shows the file of the machine that it runs on")
    assert set(info["features"]) == {name for name, word in listed.items() if word in words}


def problem():
    """Long sums of arbitrary numbers: the result depends on the order of additions, and so on the set."""
    return np.random.default_rng(5).standard_normal((3, 2, 300, 64), dtype=np.float32)


def show_forced():
    """In a child: the selected set, its kernels, and their result for the problem in hexadecimal."""
    child = fastattn.cpu_info()
    out = fastattn.dot_product_attention(*problem())
    kernels = ",".join(f"{dtype}:{kernel}" for dtype, kernel in child["kernels"].items())
    print(child["selected"], kernels, out.tobytes().hex())


@pytest.fixture(scope="module")
def forced():
    """From children with a forced set: {set: (its name there, names of kernels, output)}."""
    answers = {}
    for name in info["runnable"]:
        code = "import test_instruction_sets; test_instruction_sets.show_forced()"
        selected, kernels, out = fresh_process.run(code, FASTATTN_ISA=name).split()
        out = np.frombuffer(bytes.fromhex(out), dtype=np.float32)
        kernels = dict(kernel.split(":") for kernel in kernels.split(","))
        answers[name] = selected, kernels, out.reshape(problem()[0].shape)
    return answers


@pytest.mark.parametrize("name", info["runnable"])
def test_forced(name, forced):
    selected, kernels, out = forced[name]
    assert selected == name
    assert len(kernels) == len(info["kernels"])
    assert all(kernel.endswith(f"_{kernels_of(name, dtype)}") for dtype, kernel in kernels.items())
    np.testing.assert_allclose(out, reference.dot_product_attention(*problem()), atol=1e-5)


def test_what_is_forced_is_what_runs(forced):
    """Sets whose vectors differ add in different orders, so no two give the same bits, while the same set does."""
    sets = {kernels_of(name, "float32") for name in info["runnable"]}
    assert len({out.tobytes() for _, _, out in forced.values()}) == len(sets)
    assert forced[info["selected"]][2].tobytes() == fastattn.dot_product_attention(*problem()).tobytes()


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


# Tiles need more room than this on a signal's stack: Linux gives them only where there is none of this size, and then
# refuses such stacks.
SMALL_STACK = """
    import ctypes

    class Stack(ctypes.Structure):
        _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    def set_small_stack():
        global memory
        memory = ctypes.create_string_buffer(8192)
        stack = Stack(ctypes.addressof(memory), 0, 8192)
        return ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
    """


@pytest.mark.skipif("avx512_amx" not in info["runnable"], reason="no AMX here")
def test_without_leave_to_use_tiles_others_run():
    code = textwrap.dedent(SMALL_STACK) + textwrap.dedent("""
    assert set_small_stack()
    import fastattn
    info = fastattn.cpu_info()
    print(info["selected"], *info["runnable"])
    print(info["kernels"]["bfloat16"])
    """)
    sets, kernel = fresh_process.run(code, FASTATTN_ISA=None).splitlines()
    others = [name for name in info["runnable"] if name != "avx512_amx"]
    assert sets.split() == [others[0], *others]
    assert kernel.endswith(others[0])


@pytest.mark.skipif("avx512_amx" not in info["runnable"], reason="no AMX here")
def test_who_asks_for_others_keeps_small_stacks():
    """Importing fastattn restricts nothing in a process that has named another set."""
    code = textwrap.dedent(SMALL_STACK) + "import fastattn; print(fastattn.cpu_info()['selected'], set_small_stack())"
    for name, allowed in (("avx512_amx", False), ("avx512", True), ("baseline", True)):
        assert fresh_process.run(code, FASTATTN_ISA=name).split() == [name, str(allowed)]


def test_the_summary_names_what_was_not_tested():
    assert set(built_instruction_sets()) >= set(info["runnable"])
    lines = describe_instruction_sets("avx2", ["avx2", "baseline"], ["avx2", "avx512", "baseline"], forced=False)
    assert [line.split(":")[0] for line in lines] == ["avx2", "avx512", "baseline"]
    assert "cannot run it" in lines[1]
    assert "FASTATTN_ISA=baseline" in lines[2]
    assert not any("forced by" in line for line in lines)
    assert "forced by" in describe_instruction_sets("baseline", ["avx2", "baseline"], [], forced=True)[0]
