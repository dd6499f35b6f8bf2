"""Threads, forks, signals, and what importing the library does to the process."""

import os
import platform
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGINT

import fresh_process
import numpy as np
import pytest
from problems import bits, qkv

import fastattn
from fastattn import _runtime

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX signals")

# ------------------------------------------------------------------------------------ how many threads


def test_set_and_get():
    before = fastattn.get_num_threads()
    assert isinstance(before, int)
    assert before >= 1
    try:
        for n in (1, 3, np.int64(2)):
            fastattn.set_num_threads(n)
            assert fastattn.get_num_threads() == n
    finally:
        fastattn.set_num_threads(before)


def threads_of_a_child(setup="", **variables):
    """get_num_threads() in a new process, and its warnings: (number, text of the RuntimeWarnings)."""
    code = f"""
        import warnings
        {setup}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastattn
            number = fastattn.get_num_threads()
            fastattn.softmax([1.0, 2.0])
        print(number)
        print(*(w.message for w in caught if issubclass(w.category, RuntimeWarning)))
    """
    number, _, warned = fresh_process.run(code, **variables).partition("\n")
    return int(number), warned.strip()


def test_environment_variables():
    assert threads_of_a_child(FASTATTN_NUM_THREADS=3) == (3, "")
    assert threads_of_a_child(OMP_NUM_THREADS=5) == (5, "")
    assert threads_of_a_child(FASTATTN_NUM_THREADS=3, OMP_NUM_THREADS=5) == (3, "")


@pytest.mark.parametrize("malformed", ["three", "0", "-1", "1.5", "2x", "0x10"])
def test_malformed_environment_variable(malformed):
    number, warned = threads_of_a_child(FASTATTN_NUM_THREADS=malformed, OMP_NUM_THREADS=5)
    assert number == 5
    assert "FASTATTN_NUM_THREADS" in warned
    assert malformed in warned


def test_malformed_openmp_variable():
    number, warned = threads_of_a_child(OMP_NUM_THREADS="many")
    assert number == threads_of_a_child()[0]
    assert "OMP_NUM_THREADS='many'" in warned


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no CPU affinity here")
def test_default_is_the_cpus_of_this_process():
    number, warned = threads_of_a_child()
    assert 1 <= number <= len(os.sched_getaffinity(0))
    assert warned == ""
    one_cpu = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert threads_of_a_child(one_cpu) == (1, "")


def test_set_num_threads_beats_the_environment():
    code = "import fastattn; fastattn.set_num_threads(2); print(fastattn.get_num_threads())"
    assert fresh_process.run(code, FASTATTN_NUM_THREADS=3) == "2\n"


# OpenMP limited by others: threadpoolctl and joblib. A build without OpenMP has one thread, whatever they set.
openmp = pytest.mark.skipif(not fastattn._runtime.openmp_version, reason="a build without OpenMP")

LIMITS = """
    import threading
    import numpy as np
    import fastattn
    from fastattn import get_num_threads, set_num_threads
    from threadpoolctl import threadpool_limits
    free = get_num_threads()
"""


@openmp
def test_threadpoolctl_limits_the_thread_that_says_so():
    fresh_process.run(
        LIMITS
        + """
    for n in (1, 3, 1):
        with threadpool_limits(n):
            assert get_num_threads() == n
            with threadpool_limits(2, user_api="openmp"):
                assert get_num_threads() == 2
            assert get_num_threads() == n
        assert get_num_threads() == free
    inside = []
    with threadpool_limits(free + 3):
        other = threading.Thread(target=lambda: inside.append(get_num_threads()))
        other.start()
        other.join()
    assert inside == [free]
    with threadpool_limits(1):
        set_num_threads(free + 2)
        assert get_num_threads() == free + 2, "set_num_threads goes first"
    """
    )
    fresh_process.run(
        LIMITS
        + """
    with threadpool_limits(1):
        assert get_num_threads() == 7, "FASTATTN_NUM_THREADS goes first"
    """,
        FASTATTN_NUM_THREADS=7,
    )
    fresh_process.run(
        LIMITS
        + """
    assert free == 5
    for n in (1, 8):
        with threadpool_limits(n):
            assert get_num_threads() == n
    assert get_num_threads() == 5
    """,
        OMP_NUM_THREADS=5,
    )


@openmp
@linux
def test_threadpoolctl_limits_the_threads_of_a_call():
    fresh_process.run(
        LIMITS
        + """
    import os
    def threads():
        return len(os.listdir("/proc/self/task"))
    before = threads()
    x = np.ones((8, 600, 64), dtype=np.float32)
    with threadpool_limits(1, user_api="openmp"):
        fastattn.dot_product_attention(x, x, x)
        fastattn.softmax(x)
        assert threads() == before
    with threadpool_limits(3, user_api="openmp"):
        fastattn.dot_product_attention(x, x, x)
        assert threads() == before + 2
    with threadpool_limits(1, user_api="openmp"):
        fastattn.dot_product_attention(x, x, x, num_threads=4)
        assert threads() == before + 3, "num_threads goes first"
    """
    )


@openmp
@pytest.mark.parametrize("inner", [{}, {"inner_max_num_threads": 3}])
def test_workers_of_joblib_take_the_threads_that_it_gives_them(inner):
    """loky tells its processes through the environment how many threads each may use."""
    pytest.importorskip("joblib")
    printed = fresh_process.run(
        LIMITS
        + f"""
    import os
    import joblib
    def ask():
        import fastattn
        x = np.ones((4, 300, 64), dtype=np.float32)
        fastattn.dot_product_attention(x, x, x)
        return int(os.environ["OMP_NUM_THREADS"]), fastattn.get_num_threads()
    with joblib.parallel_config("loky", n_jobs=2, **{inner}):
        for told, taken in joblib.Parallel()(joblib.delayed(ask)() for _ in range(2)):
            assert told == taken
            print(taken)
    """
    )
    if inner:
        assert printed.split() == ["3", "3"]


@openmp
def test_threads_of_joblib_take_the_threads_that_each_sets():
    pytest.importorskip("joblib")
    fresh_process.run(
        LIMITS
        + """
    import joblib
    together = threading.Barrier(3)
    def ask(n):
        with threadpool_limits(n, user_api="openmp"):
            together.wait()
            inside = get_num_threads()
            together.wait()
        return inside
    with joblib.parallel_config("threading", n_jobs=3):
        assert joblib.Parallel()(joblib.delayed(ask)(n) for n in (1, 5, 3)) == [1, 5, 3]
    assert get_num_threads() == free
    """
    )


@linux
def test_import_and_small_calls_start_no_thread():
    fresh_process.run(
        """
        import os
        import numpy as np
        def threads():
            return len(os.listdir("/proc/self/task"))
        before = threads()
        import fastattn
        assert threads() == before, "import"
        fastattn.set_num_threads(4)
        x = np.ones((2, 8, 8), dtype=np.float32)
        fastattn.dot_product_attention(x, x, x)
        fastattn.softmax(x)
        assert threads() == before, "a small call"
        x = np.ones((8, 400, 64), dtype=np.float32)
        fastattn.dot_product_attention(x, x, x, num_threads=1)
        assert threads() == before, "num_threads=1"
        """
    )


@linux
def test_large_calls_use_the_threads_asked_for():
    """And no more, counted in the process; a build without OpenMP has one."""
    used = fresh_process.run(
        """
        import os
        import numpy as np
        def threads():
            return len(os.listdir("/proc/self/task"))
        before = threads()
        import fastattn
        x = np.ones((8, 600, 64), dtype=np.float32)
        fastattn.dot_product_attention(x, x, x, num_threads=3)
        print(threads() - before)
        """
    )
    assert int(used) == (2 if _runtime.openmp_version else 0)


# ------------------------------------------------------------------- a system that gives no more threads

# Everything that starts a region. The limit counts all processes of a user and does not apply to root: the child
# becomes a user of its own.
LIMITED = """
    import os, resource, threading
    import numpy as np
    import fastattn
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 600, 64)).astype(np.float32)
    keys = np.concatenate([x.reshape(1, -1, 64)] * 4, axis=1)
    calls = {
        "attention": lambda n: fastattn.dot_product_attention(x, x, x, num_threads=n),
        "decoding": lambda n: fastattn.dot_product_attention(x[:1, :1], keys, keys, num_threads=n),
        "additive": lambda n: fastattn.additive_attention(x[:4, :99], x[:4, :99], x[:4, :99], x[0, 0], num_threads=n),
        "softmax": lambda n: fastattn.softmax(x, num_threads=n),
        "rotary": lambda n: fastattn.apply_rotary(x, num_threads=n),
        "gradients": lambda n: np.stack(fastattn.dot_product_attention_vjp(x, x, x, x, num_threads=n)),
        "merge": lambda n: (fastattn.set_num_threads(n), *fastattn.merge_attention([x, x], [x[..., 0], x[..., 1]]))[1],
    }
    call = calls["CALL"]
    expected = call(1).tobytes()
    user = 1_000_000_000 + os.getpid()
    os.setgid(user)
    os.setuid(user)
    def limit(room):
        resource.setrlimit(resource.RLIMIT_NPROC, (threads() + room, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
    def threads():
        return len(os.listdir("/proc/self/task"))
    def check(n):
        assert call(n).tobytes() == expected, "other bits"
        return threads()
    before = threads()
    limit(0)
    try:
        threading.Thread(target=int).start()
        print("not limited")
        os._exit(0)
    except RuntimeError:
        pass
"""


def limited(call, code, timeout=60):
    """Run `code` after LIMITED; without OpenBLAS' threads, which would also count."""
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without other processes, to whom the limit on threads applies")
    text = textwrap.dedent(LIMITED).replace("CALL", call) + textwrap.dedent(code)
    printed = fresh_process.run(text, timeout, OPENBLAS_NUM_THREADS=1)
    if printed == "not limited\n":
        pytest.skip("this system does not enforce RLIMIT_NPROC")
    return printed


@linux
@pytest.mark.parametrize(("room", "used"), [(0, 0), (1, 0), (3, 1)])
@pytest.mark.parametrize("call", ["attention", "decoding", "additive", "gradients", "softmax", "rotary", "merge"])
def test_no_more_threads(call, room, used):
    """The first region, a larger one, and one after a smaller one run on the available threads, with the same bits.

    Two are left for others.
    """
    printed = limited(
        call,
        """
        limit(ROOM)
        print([check(n) - before for n in (4, 2, 8)])
        """.replace("ROOM", str(room)),
    )
    assert printed == f"{[used if fastattn._runtime.openmp_version else 0] * 3}\n"


@linux
def test_no_more_threads_after_larger_and_smaller_regions():
    """OpenMP ends the threads that a smaller region does not need: the next one has to create them again."""
    limited(
        "attention",
        """
        limit(5)
        check(4)
        for n in (2, 4, 3, 8, 2, 16, 1, 4):
            assert check(n) <= before + 5
        """,
    )


@linux
def test_no_more_threads_in_a_forked_child():
    limited(
        "attention",
        """
        limit(4)
        assert check(3) == before + 2
        # The fork lets the parent's threads go; the child is one more.
        pid = os.fork()
        if pid == 0:
            try:
                for n in (3, 2, 8):
                    check(n)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        check(8)
        """,
    )


@linux
def test_no_more_threads_for_several_callers():
    """Each Python thread has its own OpenMP threads; together they stay within the limit."""
    limited(
        "attention",
        """
        limit(4 + 4)
        start = threading.Barrier(4)
        failures = []
        def work():
            start.wait()
            try:
                for n in (2, 4, 3, 2, 8):
                    check(n)
            except BaseException as error:
                failures.append(error)
        callers = [threading.Thread(target=work) for _ in range(4)]
        for caller in callers: caller.start()
        for caller in callers: caller.join()
        assert not failures, failures
        """,
    )


@linux
def test_no_more_threads_for_several_processes():
    """Processes of one user that all want more threads at the same time do not count on the same ones."""
    limited(
        "softmax",
        """
        import time
        limit(9)
        begin = time.monotonic() + 0.2
        children = []
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                time.sleep(max(0, begin - time.monotonic()))
                try:
                    for n in (2, 3, 4, 2, 4, 3, 4) * 5:
                        assert call(n).tobytes() == expected
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 5
        """,
    )


@linux
def test_no_memory_for_the_stacks_of_threads():
    """Without memory for a stack there is no thread; OMP_STACKSIZE, which OpenMP reads, is taken into account."""
    fresh_process.run(
        """
        import resource
        import numpy as np
        import fastattn
        x = np.ones((8, 600, 64), dtype=np.float32)
        expected = fastattn.softmax(x, num_threads=1)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, resource.getrlimit(resource.RLIMIT_AS)[1]))
        assert (fastattn.softmax(x, num_threads=4) == expected).all()
        """,
        OMP_STACKSIZE="1G",
    )


# ----------------------------------------------------------------------------------- concurrent calls


def test_concurrent_calls(rng):
    """Concurrent calls from several Python threads, each with its own threads, give the same as alone."""
    problems = [qkv(rng, (2,), 100 + 37 * k, 300, 32) for k in range(6)]
    expected = [bits(fastattn.dot_product_attention(*p, is_causal=True)) for p in problems]

    def work(k):
        p = problems[k % 6]
        num_threads = 1 + k % 3
        return bits(fastattn.dot_product_attention(*p, is_causal=True, num_threads=num_threads)) == expected[k % 6]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(120)))


def test_concurrent_softmax(rng):
    x = rng.standard_normal((200, 1000)).astype(np.float32)
    expected = bits(fastattn.softmax(x))
    with ThreadPoolExecutor(4) as pool:
        assert all(bits(y) == expected for y in pool.map(lambda _: fastattn.softmax(x), range(60)))


def test_other_python_threads_go_on(rng):
    """The GIL is released: another thread counts while a long call runs."""
    ticks = 0
    stop = threading.Event()

    def count():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        # Make the call long enough on this machine for the count to be meaningful.
        length, elapsed, counted = 1024, 0.0, 0
        while elapsed < 0.3:
            length *= 2
            query, key, value = qkv(rng, (), length, length, 64)
            before, begin = ticks, time.perf_counter()
            fastattn.dot_product_attention(query, key, value, num_threads=1)
            elapsed, counted = time.perf_counter() - begin, ticks - before
    finally:
        stop.set()
        thread.join()
    assert counted >= 5


# ----------------------------------------------------------------------------------------------- fork

FORK = """
    import os
    import numpy as np
    import fastattn
    x = np.random.default_rng(0).standard_normal((4, 600, 64)).astype(np.float32)
    def call(num_threads):
        out = fastattn.dot_product_attention(x, x, x, is_causal=True, num_threads=num_threads)
        back = fastattn.dot_product_attention_vjp(out, x[0], x[0], x, wrt="key", num_threads=num_threads)
        return out.tobytes() + back.tobytes() + fastattn.softmax(x, num_threads=num_threads).tobytes()
    expected = call(PARENT_THREADS)
    def child(depth):
        for num_threads in (1, 2, 3):
            assert call(num_threads) == expected
        if depth:
            fork(depth - 1)
    def fork(depth):
        pid = os.fork()
        if pid == 0:
            try:
                child(depth)
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert call(2) == expected, "the parent afterwards"
"""


@posix
@pytest.mark.parametrize("parent_threads", [1, 2, 3])
def test_fork(parent_threads):
    """After the parent used threads, a forked child works, so does its child, and the parent still works."""
    code = FORK.replace("PARENT_THREADS", str(parent_threads))
    fresh_process.run(code + "\n    for _ in range(3): fork(1)")


@posix
def test_fork_while_another_thread_computes():
    code = FORK.replace("PARENT_THREADS", "2")
    fresh_process.run(
        code
        + """
    import threading
    stop = threading.Event()
    results = []
    def work():
        while not stop.is_set():
            results.append(call(2) == expected)
    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(5): fork(0)
    stop.set()
    thread.join()
    assert all(results)
    """,
    )


# --------------------------------------------------------------------------------------------- Ctrl-C


LONG_CALLS = {
    "many queries": "attend(np.broadcast_to(row, (1_000_000, 64)), keys, keys, num_threads=n)",
    "many heads": "attend(np.broadcast_to(row, (2_000_000, 1, 64)), keys, keys, num_threads=n)",
    # Exactly one task per thread, so that none returns for another one.
    "many keys": "attend(np.ones_like(row, shape=(2, 1, 64)), endless, endless, num_threads=n)",
    "gradients": "back(*[np.broadcast_to(row, (200_000, 64))] * 4, num_threads=n)",
    "gradients of many heads": "back(*[np.broadcast_to(row, (3_000_000, 1, 64))] * 4, num_threads=n)",
    "gradients of a window": "back(*[np.broadcast_to(row, (3_000_000, 64))] * 4, num_threads=n, window_size=300)",
    "softmax": "fastattn.logsumexp(np.broadcast_to(keys.reshape(-1), (1_000_000, 1_280_000)), num_threads=n)",
}


@posix
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("call", LONG_CALLS)
def test_ctrl_c(call, num_threads):
    """A long call ends in KeyboardInterrupt within seconds, and the library still works."""
    process = fresh_process.start(
        f"""
        import signal
        import numpy as np
        import fastattn
        from fastattn import dot_product_attention as attend
        back = getattr(fastattn, "dot_product_attention_vjp", None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        n = {num_threads}
        keys = np.ones((20_000, 64), dtype=np.float32)
        row = keys[:1]
        endless = np.broadcast_to(row, (2**30, 64))
        attend(keys[:2000], keys[:2000], keys[:2000], num_threads=n)
        print("begin", flush=True)
        try:
            {LONG_CALLS[call]}
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        assert (attend(keys[:300], keys[:300], keys[:300], num_threads=2) == 1).all()
        """
    )
    watchdog = threading.Timer(20, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline() == "begin\n", process.stderr.read()
        time.sleep(0.5)
        assert process.poll() is None, "the call was too short to be interrupted"
        begin = time.monotonic()
        process.send_signal(SIGINT)
        line = process.stdout.readline()
        elapsed = time.monotonic() - begin
        returncode, _, stderr = fresh_process.finish(process)
        assert line == "interrupted\n", stderr
        assert returncode == 0, stderr
        assert elapsed < 5
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------ floating point


def test_floating_point_mode_is_left_alone():
    """No flush to zero and no other rounding mode, in any thread, after import and after calls."""
    fresh_process.run(
        """
        import threading
        import numpy as np
        def check():
            one, three = np.ones(1), np.full(1, 3.0)
            assert (np.full(1, 5e-324) * one)[0] == 5e-324, "denormals, float64"
            assert (np.full(1, 1e-45, dtype=np.float32) * np.float32(1))[0] != 0, "denormals, float32"
            assert (np.full(1, 1e-30, dtype=np.float32) * np.float32(1e-12))[0] != 0, "denormal results"
            assert (one / three)[0] == 0.3333333333333333 and (-one / three)[0] == -0.3333333333333333
            assert (2 * one / three)[0] == 0.6666666666666666, "rounding"
        check()
        import fastattn
        check()
        x = np.ones((4, 500, 64), dtype=np.float32)
        fastattn.dot_product_attention(x, x, x, num_threads=2)
        fastattn.softmax(x)
        check()
        failures = []
        threading.excepthook = failures.append
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
        assert not failures
        """
    )


@linux
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="knows the words of x86-64 and AArch64")
def test_floating_point_control_word_is_left_alone():
    """The control word itself (rounding, denormals, traps), around calls that raise every flag; flags may change."""
    fresh_process.run(
        """
        import ctypes
        import platform
        import numpy as np
        libm = ctypes.CDLL("libm.so.6")
        x86 = platform.machine() == "x86_64"
        def mode():
            environment = (ctypes.c_uint32 * 8)()
            assert libm.fegetenv(environment) == 0
            # x87's control word, and MXCSR without its flags; or FPCR, which has none.
            return (environment[0] & 0xFFFF, environment[7] & ~0x3F) if x86 else environment[0]
        before = mode()
        import fastattn
        assert mode() == before, "import"
        x = np.ones((8, 600, 64), dtype=np.float32)
        for factor in (1, np.inf, np.nan, np.float32(3e38), np.float32(1e-40)):
            with np.errstate(all="ignore"):
                y = x * factor
            fastattn.dot_product_attention(x, -y, y, is_causal=True, num_threads=2)
            fastattn.softmax(y, num_threads=2)
            assert mode() == before, factor
        assert libm.fesetround(0x400 if x86 else 0x800000) == 0
        assert mode() != before, "the check can fail"
        """
    )


@pytest.mark.parametrize("num_threads", [1, 3])
def test_denormals_count_in_every_thread(num_threads):
    """Means of a number that flushing to zero would lose, in more rows than one thread processes."""
    tiny = np.float32(1e-40)
    query = np.zeros((8, 600, 64), dtype=np.float32)
    out = fastattn.dot_product_attention(query, query, query + tiny, is_causal=True, num_threads=num_threads)
    np.testing.assert_allclose(out, tiny, rtol=1e-3)


# --------------------------------------------------------------------------------------------- memory


@linux
def test_memory_stays_flat():
    """Many calls, good and bad, small and threaded, of every form, do not leak memory."""
    fresh_process.run(
        """
        import gc
        import numpy as np
        import fastattn
        def resident():
            gc.collect()
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096
        small = np.ones((2, 5, 8), dtype=np.float32)
        large = np.ones((4, 200, 64), dtype=np.float32)
        mask = np.ones((5, 5), dtype=bool)
        def work(count):
            for _ in range(count):
                fastattn.dot_product_attention(small, small, small, mask=mask, return_lse=True)
                fastattn.dot_product_attention(small.tolist(), small, small, key_lengths=np.array([3, 4]))
                fastattn.dot_product_attention(large, large, large, num_threads=2, is_causal=True)
                fastattn.dot_product_attention_vjp(small, small, small, small, sinks=1.0, wrt=("sinks", "key"))
                fastattn.dot_product_attention_vjp(large, large, large[0], large, num_threads=2)
                fastattn.softmax(large)
                fastattn.logsumexp(small, axis=None)
                fastattn.varlen_attention(small, small, small, [0, 2, 5])
                fastattn.merge_attention([small, small], [small[..., 0], small[..., 0]])
                try:
                    fastattn.dot_product_attention(large, large, large, window_size=-3)
                except ValueError:
                    pass
                try:
                    fastattn.dot_product_attention(large, large, large, bias=np.ones((200, 3)))
                except ValueError:
                    pass
        work(200)
        before = resident()
        work(1500)
        grown = resident() - before
        assert grown < 2 * 2**20, grown
        """,
    )


@pytest.mark.parametrize("first", ["fastattn", "numpy"])
def test_import_leaves_the_environment_alone(first):
    """The spins of thread pools are only set while their libraries are loaded."""
    code = f"""
    import os
    before = dict(os.environ)
    import {first}
    import fastattn, numpy
    assert dict(os.environ) == before
    from fastattn import _load
    print(sorted(_load.SPINS))
    """
    clean = dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OPENBLAS_THREAD_TIMEOUT"))
    returncode, stdout, stderr = fresh_process.finish(fresh_process.start(code, **clean))
    assert returncode == 0, stderr
    expected = ["GOMP_SPINCOUNT"] + ["OPENBLAS_THREAD_TIMEOUT"] * (first == "fastattn")
    assert stdout.strip() == str(expected)


def test_what_the_user_has_set_about_spinning_stands():
    code = """
    import fastattn._load
    print(fastattn._load.SPINS)
    """
    process = fresh_process.start(code, OMP_WAIT_POLICY="passive", OPENBLAS_THREAD_TIMEOUT="20")
    returncode, stdout, _ = fresh_process.finish(process)
    assert returncode == 0
    assert stdout.strip() == "{}"
