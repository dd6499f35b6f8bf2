"""The OpenMP library: the one that is loaded already, else the system's, else threads of each region's own (gomp.c)."""

import shutil
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest

import fastattn
from fastattn import _runtime

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="modules look for libgomp on Linux alone"),
    pytest.mark.skipif(not _runtime.openmp_version, reason="a build without OpenMP"),
]

RESULTS = """
    import os
    import numpy as np
    before = len(os.listdir("/proc/self/task"))  # with those of NumPy's BLAS
    import fastattn
    from fastattn import _runtime
    x = np.random.default_rng(0).standard_normal((8, 300, 64)).astype(np.float32)
    keys = np.concatenate([x.reshape(1, -1, 64)] * 4, axis=1)
    def results(n):
        yield fastattn.dot_product_attention(x, x, x, is_causal=True, num_threads=n)
        yield fastattn.dot_product_attention(x[:1, :1], keys, keys, num_threads=n)
        yield fastattn.softmax(x, num_threads=n)
        yield fastattn.softmax(x, axis=0, num_threads=n)
        yield fastattn.apply_rotary(x, num_threads=n)
        yield from fastattn.dot_product_attention_vjp(x, x, x, x, num_threads=n)
        yield from fastattn.linear_attention_vjp(x, x, x, x, num_threads=n)
        fastattn.set_num_threads(n)
        yield from fastattn.merge_attention([x, x], [x[..., 0], x[..., 1]])
"""


@pytest.fixture
def no_library(tmp_path):
    """An environment in which the system's libgomp cannot be loaded."""
    (tmp_path / "libgomp.so.1").write_text("not a library")
    return {"LD_LIBRARY_PATH": str(tmp_path)}


def test_no_module_needs_the_library():
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    modules = sorted(Path(fastattn.__file__).parent.glob("*.so"))
    assert modules
    for module in modules:
        text = subprocess.run(
            ["readelf", "--wide", "--dynamic", "--dyn-syms", module], capture_output=True, text=True, check=True
        ).stdout
        assert "libgomp" not in text, module.name
        assert "GOMP_" not in text and " omp_" not in text, module.name


def test_without_the_library(no_library):
    """All threads asked for, the bits of one, and none that stays."""
    fresh_process.run(
        RESULTS
        + """
    import io
    assert _runtime.own_threads
    text = io.StringIO()
    fastattn.show_config(text)
    assert "threads of its own" in text.getvalue()
    assert fastattn.get_num_threads() == len(os.sched_getaffinity(0))
    expected = [a.tobytes() for a in results(1)]
    for n in (2, 3, 5):
        assert [a.tobytes() for a in results(n)] == expected, n
    assert len(os.listdir("/proc/self/task")) == before

    import threading
    peak, done = 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, len(os.listdir("/proc/self/task")))
    watcher = threading.Thread(target=watch)
    watcher.start()
    x = np.ones((8, 2000, 64), np.float32)
    fastattn.dot_product_attention(x, x, x, num_threads=3)
    done = True
    watcher.join()
    assert peak == before + 3, "a watcher, and two beside the caller"
    """,
        **no_library,
    )


def test_without_the_library_and_without_threads(no_library):
    """A system that gives no more: a smaller team, the same bits."""
    fresh_process.run(
        RESULTS
        + """
    import resource
    expected = [a.tobytes() for a in results(1)]
    user = 1_000_000_000 + os.getpid()
    try:
        os.setgid(user)
        os.setuid(user)
    except PermissionError:
        os._exit(0)
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    for room in (0, 1, 2):
        resource.setrlimit(resource.RLIMIT_NPROC, (len(os.listdir("/proc/self/task")) + room, hard))
        assert [a.tobytes() for a in results(5)] == expected, room
    """,
        **no_library,
    )


def test_a_library_that_comes_after_the_first_module(no_library):
    """As with PyTorch's wheel, imported after fastattn: modules that are loaded later use its libgomp, which ends a
    process that is given no thread."""
    path = fresh_process.run("""
    import fastattn
    with open("/proc/self/maps") as file:
        print(next((line.split()[-1] for line in file if "libgomp" in line), ""))
    """).strip()
    if not path:
        pytest.skip("there is no libgomp here")
    fresh_process.run(
        f"""
    import ctypes, os, resource
    import numpy as np
    import fastattn
    from fastattn import _runtime
    assert _runtime.own_threads
    ctypes.CDLL({path!r})
    x = np.random.default_rng(0).standard_normal((8, 300, 64)).astype(np.float32)
    expected = [a.tobytes() for a in fastattn.dot_product_attention_vjp(x, x, x, x, num_threads=1)]
    user = 1_000_000_000 + os.getpid()
    try:
        os.setgid(user)
        os.setuid(user)
    except PermissionError:
        os._exit(0)
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    for room in (0, 1, 2):
        resource.setrlimit(resource.RLIMIT_NPROC, (len(os.listdir("/proc/self/task")) + room, hard))
        assert [a.tobytes() for a in fastattn.dot_product_attention_vjp(x, x, x, x, num_threads=5)] == expected, room
        fastattn.dot_product_attention(x, x, x, num_threads=5)
    """,
        **no_library,
    )


def test_callers_at_the_same_time_without_the_library(no_library):
    fresh_process.run(
        RESULTS
        + """
    import threading
    expected = [a.tobytes() for a in results(1)]
    wrong = []
    def call():
        for _ in range(3):
            if [a.tobytes() for a in results(3)] != expected:
                wrong.append(1)
    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    """,
        **no_library,
    )


@pytest.mark.parametrize("first", ["fastattn", "torch"])
@pytest.mark.parametrize("library", ["the system's", "a renamed copy", "none"])
def test_children_of_a_process_that_used_torch(first, library, tmp_path, no_library):
    """
    A child that uses PyTorch after its parent did hangs: its libgomp waits for threads that stayed in the parent.
    fastattn releases the threads of every libgomp before a fork, so that neither hangs, whoever came first and whether
    both share one or, as with wheels that rename theirs, do not.
    """
    pytest.importorskip("torch")
    load = ""
    if library == "a renamed copy":
        copy = tmp_path / "libgomp-12345678.so.1"
        found = subprocess.run(["gcc", "-print-file-name=libgomp.so.1"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute() or shutil.which("patchelf") is None:
            pytest.skip("needs gcc's libgomp and patchelf")
        shutil.copy(found, copy)
        subprocess.run(["patchelf", "--set-soname", copy.name, copy], check=True)
        load = f"import ctypes; ctypes.CDLL({str(copy)!r}, mode=ctypes.RTLD_LOCAL)"
    if library == "none" and fresh_process.finish(fresh_process.start("import torch", **no_library), 300)[0] != 0:
        pytest.skip("this PyTorch has no libgomp of its own")
    fresh_process.run(
        f"""
    import os
    {load}
    def use_fastattn():
        import numpy as np
        import fastattn
        x = np.ones((8, 600, 64), np.float32)
        fastattn.dot_product_attention(x, x, x, num_threads=2)
    def use_torch():
        import torch
        torch.set_num_threads(2)
        torch.softmax(torch.ones(400, 400, 64), -1)
    uses = [use_fastattn, use_torch]
    for use in uses if {first == "fastattn"} else reversed(uses):
        use()
    for use in uses:
        child = os.fork()
        if child == 0:
            use()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """,
        **(no_library if library == "none" else {}),
    )
