"""Memory that runs out at every place where it is asked for: MemoryError, nothing half-written, no leak, and the next
call right. `faults.py` has the calls."""

import time

import faults
import fresh_process
import pytest

import fastattn
from fastattn import _runtime

debug = pytest.mark.skipif(not hasattr(_runtime, "fail_allocation"), reason="only a debug build has the switch")


def test_every_function_that_takes_arrays_is_a_case():
    """Classes have cases of their own; what is left computes nothing."""
    classes = {"KVCache", "Linear", "MultiHeadAttention", "QuantizedKV"}
    classes |= {"StreamingAttention", "StreamingMultiHeadAttention"}
    settings = {"cpu_info", "get_include", "get_num_threads", "set_num_threads", "show_config"}
    assert set(fastattn.__all__) - classes - settings == faults.FUNCTIONS


def settled(wanted=None, patience=5.0):
    """The blocks that are alive once the workers of threads that are gone have ended, too."""
    end = time.monotonic() + (patience if wanted is not None else 0.2)
    while time.monotonic() < end and _runtime.live_allocations() != wanted:
        time.sleep(0.01)
    return _runtime.live_allocations()


@debug
@pytest.mark.parametrize("name", faults.CASES)
def test_compiled_code(name):
    """Its own requests, one by one; and blocks that are alive after failures are those that were alive before."""
    make = faults.CASES[name]
    run = faults.in_new_thread if "threads" in name else lambda call: call()
    requests = faults.survives(make, faults.Compiled(), run)
    alive = settled()
    assert faults.survives(make, faults.Compiled(), run) == requests
    assert settled(alive) == alive
    if "threads" in name and _runtime.openmp_version:
        assert requests >= 1, "the record of a thread's workers"


@debug
def test_a_failure_that_costs_threads_costs_no_bits():
    """Without memory for the records of threads there are fewer of them: the documented fallback."""
    case = faults.CASES["softmax by threads"]
    expected = faults.bits(case().call())
    counts = []
    for n in range(1, 5):
        made = case()

        def call(n=n, made=made):
            _runtime.fail_allocation(n)
            try:
                return faults.bits(made.call())
            except MemoryError:
                return None
            finally:
                counts.append(_runtime.fail_allocation(0))

        assert faults.in_new_thread(call) in (expected, None)
    assert 0 in counts


# Not tried: where a request of Python or NumPy for a few bytes fails in the middle of something that is not undone.
NOT_TRIED = {
    "gradients, additive": "Cython's handlers crash where NumPy fails without an exception",
    "gradients, bilinear": "the same",
    "cache, append past the window": "tokens that move to the front are moved one sequence after the other",
    "cache, append what the window holds": "the same",
    "cache, append itself": "the same",
    "layer, cache with a window": "the same",
    "layer, cache of a window's size": "the same",
    "stream, push": "NumPy raises ValueError for an array whose flags it could not make",
    "stream, flush": "the same",
    "stream, first push": "the same",
    "stream, push with a bias": "the same",
    "stream of a layer, first push": "the same",
    "stream of a layer, push": "the same",
    "stream of a layer, flush": "the same",
}
GROUPS = 6


@pytest.mark.parametrize("group", range(GROUPS))
def test_everything(group):
    """Each request of Python, NumPy and this library; in a process of its own, whose interpreter may lose something."""
    pytest.importorskip("_testcapi", reason="this interpreter has no switch that lets allocations fail")
    names = [name for name in list(faults.CASES)[group::GROUPS] if name not in NOT_TRIED]
    fresh_process.run(
        f"""
        import faults
        everything = faults.Everything()
        for name in {names!r}:
            print(name, flush=True)
            try:
                print(faults.survives(faults.CASES[name], everything), "requests", flush=True)
            except AssertionError as error:
                raise AssertionError(name) from error
        """,
        OMP_NUM_THREADS=1,
    )
