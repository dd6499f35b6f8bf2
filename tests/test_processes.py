"""Signals, fork and the end of a process while other threads compute. Each test is a process, with a limit."""

import os
import sys
import textwrap

import fresh_process
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX signals")

# Workers that compute until they are told to stop, and check each result.
BUSY = """
    import os, signal, sys, threading, time
    import numpy as np
    import fastattn
    x = np.random.default_rng(0).standard_normal((4, 500, 64)).astype(np.float32)
    def call(num_threads=2):
        out = fastattn.dot_product_attention(x, x, x, is_causal=True, num_threads=num_threads)
        return out.tobytes() + fastattn.softmax(x, num_threads=num_threads).tobytes()
    expected = call()
    stop, wrong, counts = threading.Event(), [], [0] * 3
    def work(k):
        try:
            while not stop.is_set():
                if call(1 + k) != expected:
                    wrong.append(k)
                counts[k] += 1
        except BaseException as error:
            wrong.append(error)
    def start(daemon=False):
        workers = [threading.Thread(target=work, args=(k,), daemon=daemon) for k in range(3)]
        for worker in workers: worker.start()
        while min(counts) == 0: time.sleep(0.001)
        return workers
    def finish(workers):
        stop.set()
        for worker in workers: worker.join()
        assert not wrong, wrong
    def long_call(num_threads=2):
        keys = np.broadcast_to(x[0, :1], (20_000, 64))
        fastattn.dot_product_attention(np.broadcast_to(x[0, :1], (3_000_000, 64)), keys, keys, num_threads=num_threads)
"""


def run(code, timeout=120, **variables):
    return fresh_process.run(textwrap.dedent(BUSY) + textwrap.dedent(code), timeout, **variables)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_ctrl_c_while_others_compute(num_threads):
    """The main thread's call ends; those of the others go on, and are right."""
    run(f"""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = start()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        long_call({num_threads})
        raise SystemExit("the call was not interrupted")
    except KeyboardInterrupt:
        pass
    before = list(counts)
    while min(a - b for a, b in zip(counts, before)) == 0: time.sleep(0.001)
    finish(workers)
    assert call() == expected
    """)


def test_a_handler_that_calls():
    """A signal handler runs in the middle of a call, and makes calls of its own."""
    run("""
    inside = []
    def handler(number, frame):
        inside.append(call(1 + len(inside) % 3) == expected)
        if len(inside) == 5:
            raise InterruptedError("enough")
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.1)
    try:
        long_call()
        raise SystemExit("the call was not interrupted")
    except InterruptedError as error:
        assert str(error) == "enough"
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert inside == [True] * 5
    assert call() == expected
    """)


def test_a_storm_of_signals():
    """System calls that a signal interrupts (locks, files, new threads) are taken up again."""
    run("""
    storms = [0]
    def handler(number, frame): storms[0] += 1
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    workers = start()
    for n in (1, 2, 3, 2, 4, 1, 3) * 10:
        assert call(n) == expected
    finish(workers)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert storms[0] > 10
    """)


def test_fork_while_others_compute():
    """The child computes and ends; the parent's results stay right."""
    run("""
    workers = start()
    for n in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if all(call(k) == expected for k in (1, 2, 3)) else 2)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
    finish(workers)
    """)


def test_fork_in_a_thread_and_exec():
    run("""
    workers = start()
    statuses = []
    def fork_and_exec():
        pid = os.fork()
        if pid == 0:
            code = "import numpy as np, fastattn; fastattn.softmax(np.zeros((300, 300)), num_threads=2)"
            os.execv(sys.executable, [sys.executable, "-c", code])
        statuses.append(os.waitpid(pid, 0)[1])
    others = [threading.Thread(target=fork_and_exec) for _ in range(2)]
    for other in others: other.start()
    for other in others: other.join()
    finish(workers)
    assert statuses == [0, 0]
    """)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, tmp_path):
    """A pool of processes whose parent has threads of its own at work."""
    script = tmp_path / "pool.py"
    body = """
        if __name__ == "__main__":
            import multiprocessing, warnings
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: it is what is tested
            workers = start()
            with multiprocessing.get_context("METHOD").Pool(2) as pool:
                assert pool.map(call, [1, 2, 3, 2]) == [expected] * 4
            finish(workers)
    """
    script.write_text(textwrap.dedent(BUSY) + textwrap.dedent(body).replace("METHOD", method))
    fresh_process.run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", 120)


ENDS = {
    "end": "pass",
    "sys.exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
    "exception elsewhere": """
        threading.excepthook = lambda arguments: None
        failing = threading.Thread(target=lambda: 1 / 0)
        failing.start()
        failing.join()
    """,
    "in a call of the main thread's handler": """
        signal.signal(signal.SIGALRM, lambda number, frame: sys.exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        long_call()
    """,
}


@pytest.mark.parametrize("how", ENDS)
def test_end_while_daemons_compute(how):
    """Daemon threads are in the middle of calls, without the GIL, when the interpreter ends: no crash, no hang."""
    code = textwrap.dedent(BUSY) + "start(daemon=True)\n" + textwrap.dedent(ENDS[how])
    for _ in range(3):
        assert fresh_process.finish(fresh_process.start(code), 120)[::2] == (0, "")


def test_end_in_the_middle_of_a_long_call():
    """A daemon's call that would go on for minutes: the process ends, and does not wait for it."""
    run("""
    for n in (1, 2):
        threading.Thread(target=long_call, args=(n,), daemon=True).start()
    time.sleep(0.3)
    """)


def test_calls_at_exit():
    """atexit callbacks make calls, also in a child that they fork, while daemons compute."""
    printed = run("""
    import atexit
    def last():
        assert call(2) == expected
        pid = os.fork()
        if pid == 0:
            os._exit(0 if call(3) == expected else 1)
        assert os.waitpid(pid, 0)[1] == 0
        print("at exit", flush=True)
    atexit.register(last)
    start(daemon=True)
    """)
    assert printed == "at exit\n"


def test_subinterpreters():
    """Refused with an ImportError, or working; the main interpreter goes on. (NumPy itself refuses most.)"""
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    pytest.importorskip(name)
    run(f"""
    import {name} as interpreters
    code = '''
try:
    import numpy as np
    import fastattn
    assert fastattn.softmax(np.zeros((300, 300)), num_threads=2).max() > 0
except ImportError as error:
    assert str(error)
'''
    one = interpreters.create()
    interpreters.run_string(one, code)
    interpreters.destroy(one)
    assert call() == expected
    """)
