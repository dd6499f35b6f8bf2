"""Many threads of Python call at once: functions of every kind, objects that change, settings; and what an import does
to the GIL. On a free-threaded interpreter nothing but the library itself keeps them apart."""

import copy
import pickle
import sys
import sysconfig
import threading

import fresh_process
import numpy as np
import pytest
from problems import bits

import fastattn

THREADS = 6
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


@pytest.fixture(autouse=True)
def _change_often():
    """With the GIL: the next thread's turn comes after microseconds, also within a short function."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*works, seconds=30):
    """Run the functions in threads of their own that begin together; raise the first error of any."""
    start, errors = threading.Barrier(len(works)), []

    def run(work):
        try:
            start.wait(seconds)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10 * seconds)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def all_bits(results):
    return [bits(x) for x in (results if isinstance(results, tuple) else (results,))]


# ------------------------------------------------------------------------------------ functions


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def three(rng, *shape, dtype=np.float32):
    return tuple(normal(rng, *shape, dtype=dtype) for _ in range(3))


def attention(rng, n):
    x = three(rng, 2, 3 + 7 * n, 8 * (n + 1))
    return lambda **k: fastattn.dot_product_attention(*x, is_causal=bool(n % 2), return_lse=True, **k)


def long_attention(rng, n):
    x = three(rng, 2, 150 + 31 * n, 40, dtype=(np.float32, np.float64)[n % 2])
    lengths = rng.integers(0, 150, 2)
    return lambda **k: fastattn.dot_product_attention(*x, key_lengths=lengths, **k)


def decoding(rng, n):
    query, (key, value, _) = normal(rng, 2, 1, 32), three(rng, 2, 2500 + 500 * n, 32)
    return lambda **k: fastattn.dot_product_attention(query, key, value, **k)


def additive(rng, n):
    x, w = three(rng, 2, 20 + 9 * n, 16), normal(rng, 16)
    return lambda **k: fastattn.additive_attention(*x, w, **k)


def bilinear(rng, n):
    x, w = three(rng, 2, 20 + 9 * n, 16), normal(rng, 16, 16)
    return lambda **k: fastattn.bilinear_attention(*x, w, **k)


def streamed(rng, n):
    x = three(rng, 1, 90, 8)

    def call(**k):
        stream = fastattn.StreamingAttention(5 + n, 2, **k)
        parts = [stream.push(*(a[:, i : i + 11] for a in x)) for i in range(0, 90, 11)]
        return np.concatenate([*parts, stream.flush()], axis=1)

    return call


def streamed_layer(rng, n):
    x, weights = normal(rng, 90, 16), normal(rng, 4, 16, 16)
    of = fastattn.MultiHeadAttention(*weights, num_heads=2, rotary_base=1e4)

    def call(**k):
        stream = fastattn.StreamingMultiHeadAttention(of, 5 + n, 2, **k)
        return np.concatenate([*(stream.push(x[i : i + 11]) for i in range(0, 90, 11)), stream.flush()])

    return call


def rows(function):
    def make(rng, n):
        x = normal(rng, 30 + n, 20 + 150 * n)
        return lambda **k: getattr(fastattn, function)(x, **k)

    return make


def merged(rng, n):
    outs, lses = [normal(rng, 3, 40, 8 + n) for _ in range(3)], [normal(rng, 3, 40) for _ in range(3)]
    return lambda **k: fastattn.merge_attention(outs, lses)


def rotary(rng, n):
    x = normal(rng, 2, 30 + 100 * n, 16 + 2 * n)
    base = 1000.0 * (n + 1)
    return lambda **k: fastattn.apply_rotary(x, base=base, offset=3 * n, **k)


def rotary_in_places(rng, n):
    x, places = normal(rng, 2, 3, 50 + n, 16), rng.integers(0, 5000, (3, 50 + n))
    return lambda **k: fastattn.apply_rotary(x, positions=places, **k)


def linear(rng, n):
    x = three(rng, 2, 40 + 50 * n, 16)
    return lambda **k: fastattn.linear_attention(*x, is_causal=bool(n % 2), **k)


def neighborhood(rng, n):
    x = three(rng, 2, 12 + 5 * n, 13, 8)
    return lambda **k: fastattn.neighborhood_attention(*x, kernel_size=3 + 2 * (n % 2), **k)


def graph(rng, n):
    nodes = 30 + 20 * n
    x, degrees = three(rng, 2, nodes, 8), rng.integers(0, 9, nodes)
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    indices = rng.integers(0, nodes, indptr[-1])
    return lambda **k: fastattn.graph_attention(*x, (indptr, indices), **k)


def gradients(rng, n):
    x = three(rng, 2, 30 + 40 * n, 16)
    grad = normal(rng, 2, 30 + 40 * n, 16)
    return lambda **k: fastattn.dot_product_attention_vjp(grad, *x, is_causal=bool(n % 2), **k)


def linear_gradients(rng, n):
    x = three(rng, 2, 30 + 40 * n, 16)
    grad = normal(rng, 2, 30 + 40 * n, 16)
    return lambda **k: fastattn.linear_attention_vjp(grad, *x, is_causal=True, **k)


def layer(rng, n):
    x = normal(rng, 2, 20 + 10 * n, 32)
    of = fastattn.MultiHeadAttention(*normal(rng, 4, 32, 32), num_heads=4, rotary_base=10_000.0)

    def call(**k):
        cache = fastattn.KVCache(2, 4, 100, 8)
        out, backward = of.vjp(x, **k)
        return of(x[:, :9], cache=cache, **k), of(x[:, 9:], cache=cache, **k), backward(out)["w_query"]

    return call


def product(rng, n):
    of = fastattn.Linear(normal(rng, 24, 30 + 40 * n), normal(rng, 30 + 40 * n))
    x = normal(rng, (5, 40, 300)[n], 24)

    def call(**k):
        # The form in float64 is made by the first call that needs it.
        return of(x, activation="gelu", **k), of(x.astype(np.float64), **k)

    return call


def norms(rng, n):
    x, w = normal(rng, 40 + 100 * n, 33), normal(rng, 33)

    def call(**k):
        return fastattn.layer_norm(x, w, residual=x, **k), fastattn.rms_norm(x, w, **k)

    return call


FAMILIES = {
    "attention": attention,
    "long attention": long_attention,
    "decoding": decoding,
    "additive": additive,
    "bilinear": bilinear,
    "streams": streamed,
    "streams of a layer": streamed_layer,
    "softmax": rows("softmax"),
    "logsumexp": rows("logsumexp"),
    "sparsemax": rows("sparsemax"),
    "merge": merged,
    "rotary": rotary,
    "rotary in places": rotary_in_places,
    "linear": linear,
    "neighborhood": neighborhood,
    "graph": graph,
    "gradients": gradients,
    "linear gradients": linear_gradients,
    "layer": layer,
    "product": product,
    "norms": norms,
}


def test_all_families_at_once(rng):
    """Each thread goes through all, in three sizes and an order of its own; every bit is that of a call alone."""
    calls = [make(rng, n) for make in FAMILIES.values() for n in range(3)]
    expected = [all_bits(call(num_threads=1)) for call in calls]
    orders = [rng.permutation(len(calls)) for _ in range(THREADS)]

    def work(order):
        for turn in range(3):
            for i in order:
                assert all_bits(calls[i](num_threads=1 + (i + turn) % 2)) == expected[i]

    at_once(*[lambda order=order: work(order) for order in orders])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_at_once(rng, family):
    calls = [FAMILIES[family](rng, n) for n in range(3)]
    expected = [all_bits(call()) for call in calls]

    def work(first):
        for i in range(12):
            n = (first + i) % 3
            assert all_bits(calls[n]()) == expected[n]

    at_once(*[lambda first=first: work(first) for first in range(THREADS)])


def test_first_use_at_once():
    """Modules that are loaded on first use, and the tables of a new process."""
    fresh_process.run(
        """
        import threading
        import numpy as np
        import fastattn
        names = [name for name in fastattn.__all__ if name not in vars(fastattn)]
        assert names
        x = np.random.default_rng(0).standard_normal((2, 40, 8)).astype(np.float32)
        start, errors, found = threading.Barrier(8), [], []
        def work(k):
            try:
                start.wait()
                for name in names[k:] + names[:k]:
                    getattr(fastattn, name)
                found.append((fastattn.apply_rotary(x).tobytes(), fastattn.get_num_threads()))
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        assert len(found) == 8 and len(set(found)) == 1, found
        """
    )


def test_set_num_threads_while_others_compute(rng):
    before = fastattn.get_num_threads()
    calls = [long_attention(rng, n) for n in range(3)] + [gradients(rng, 2), rows("softmax")(rng, 2)]
    expected = [all_bits(call()) for call in calls]
    stop = threading.Event()

    def work():
        for _ in range(15):
            for call, want in zip(calls, expected, strict=True):
                assert all_bits(call()) == want

    def change():
        n = 0
        while not stop.is_set():
            fastattn.set_num_threads(1 + n % 3)
            assert 1 <= fastattn.get_num_threads() <= 3
            n += 1
            stop.wait(0.0002)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        at_once(*[work] * 3)
    finally:
        stop.set()
        changer.join()
        fastattn.set_num_threads(before)


def test_lengths_that_others_change(rng):
    """A call takes lengths and offsets once, before it checks them: later changes cannot lead it out of the arrays."""
    keys = 64
    query, key, value = three(rng, 700, keys, 8)
    lengths = np.zeros((700,), np.int64)
    stop = threading.Event()

    def spoil():
        n = 0
        while not stop.is_set():
            lengths[:] = (1, keys, 1 << 40, -(1 << 40))[n % 4]
            n += 1

    def attend():
        try:
            for _ in range(150):
                try:
                    out = fastattn.dot_product_attention(query, key, value, key_lengths=lengths)
                    assert np.isfinite(out).all()
                except ValueError as error:
                    assert "key_lengths must lie between 0 and 64" in str(error)
        finally:
            stop.set()

    at_once(spoil, attend)


# ------------------------------------------------------------------------------------ objects that change


def refused(function, *arguments, **named):
    """Call it; whether it was refused because another call was changing the object."""
    try:
        function(*arguments, **named)
    except RuntimeError as error:
        assert "is being changed by another call" in str(error)
        return True
    return False


def tokens(start, count, channels=4):
    """Keys and values that say which token they are, in each channel: (1, 2, count, channels)."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.float32)[:, None], (1, 2, count, channels))


def is_a_run(x):
    """Whether each token has the same number in all of its channels and heads."""
    return x.size == 0 or (x == x[:, :1, :, :1]).all()


@pytest.mark.parametrize("window", [None, 40])
def test_appending_to_one_cache_at_once(window):
    """Every append is whole or refused: no token is torn or lost, also if all threads append to one cache."""
    cache = fastattn.KVCache(1, 2, 4000 if window is None else 100, 4, window=window)
    done = []

    def work(k):
        for i in range(100):
            x = tokens(1000 * k + 5 * i, 5)
            done.append(not refused(cache.append, x, -x))

    at_once(*[lambda k=k: work(k) for k in range(THREADS)])
    there = int(cache.lengths[0, 0])
    assert there + int(cache.dropped[0, 0]) == 5 * sum(done)
    assert is_a_run(cache.key)
    np.testing.assert_array_equal(cache.key, -cache.value)
    if window is None:
        starts = cache.key[0, 0, ::5, 0]
        np.testing.assert_array_equal(cache.key[0, 0, :, 0].reshape(-1, 5), starts[:, None] + np.arange(5))
        assert len(set(starts.tolist())) == sum(done)


def test_reading_while_one_appends(rng):
    """Whoever attends to a cache without a window sees the tokens of some moment, each of them whole."""
    cache = fastattn.KVCache(1, 2, 3000, 4)
    query = normal(rng, 1, 2, 1, 4)
    stop = threading.Event()

    def read():
        while not stop.is_set():
            key, value = cache.key, cache.value
            count = min(key.shape[2], value.shape[2])
            key, value = key[:, :, :count], value[:, :, :count]
            np.testing.assert_array_equal(key[0, 0, :, 0], np.arange(count))
            out = fastattn.dot_product_attention(np.zeros_like(query), key, value)
            np.testing.assert_allclose(out, -(count - 1) / 2 if count else 0, rtol=1e-5)
            try:
                other = cache.copy()
            except RuntimeError:
                continue
            there = int(other.lengths[0, 0])
            np.testing.assert_array_equal(other.key[0, 1, :, 2], np.arange(there))

    def append():
        try:
            for i in range(600):
                x = tokens(4 * i, 4)
                cache.append(x, -x)
        finally:
            stop.set()

    at_once(append, *[read] * 3)


def test_any_use_of_one_cache_at_once(rng):
    """Everything at once on a cache with a window: what is legal, or an error; never a crash, nor a broken cache."""
    of = fastattn.MultiHeadAttention(*normal(rng, 4, 8, 8), num_heads=2, rotary_base=100.0)
    cache = fastattn.KVCache(1, 2, 24, 4, window=16)
    x, query = normal(rng, 1, 7, 8), normal(rng, 1, 2, 3, 4)

    def attend():
        return fastattn.dot_product_attention(query, cache.key, cache.value, key_lengths=cache.lengths)

    def again():
        copied = pickle.loads(pickle.dumps(cache))
        assert is_legal(copied)

    def is_legal(cache):
        n = int(cache.lengths[0, 0])
        return 0 <= n <= 24 and cache.key.shape == cache.value.shape == (1, 2, n, 4)

    uses = [
        lambda: of(x, cache=cache),
        lambda: of(x[:, :1], cache=cache),
        lambda: cache.append(tokens(0, 5), tokens(0, 5)),
        cache.reset,
        attend,
        again,
        lambda: is_legal(cache.copy()) or pytest.fail("a broken copy"),
        lambda: cache.crop(cache.lengths),
        lambda: copy.copy(cache),
    ]

    def work(k):
        for i in range(120):
            try:
                uses[(k + i) % len(uses)]()
            except (RuntimeError, ValueError):
                pass

    at_once(*[lambda k=k: work(k) for k in range(THREADS)])
    assert is_legal(cache)
    cache.reset()
    cache.append(tokens(0, 5), tokens(0, 5))
    np.testing.assert_array_equal(cache.key, tokens(0, 5))


def test_a_layer_serves_many_caches_at_once(rng):
    of = fastattn.MultiHeadAttention(*normal(rng, 4, 16, 16), num_heads=2, rotary_base=100.0)
    x = normal(rng, 1, 30, 16)

    def decoded():
        cache = fastattn.KVCache(1, 2, 40, 8)
        return np.concatenate([of(x[:, i : i + 1], cache=cache) for i in range(30)], axis=1)

    expected = bits(decoded())

    def work():
        for _ in range(4):
            assert bits(decoded()) == expected

    at_once(*[work] * THREADS)


def test_a_prompt_that_all_threads_copy(rng):
    prompt = fastattn.KVCache(1, 2, 100, 4)
    prompt.append(tokens(0, 50), tokens(0, 50))

    def work():
        for _ in range(30):
            own = prompt.copy()
            own.append(tokens(50, 3), tokens(50, 3))
            np.testing.assert_array_equal(own.key, tokens(0, 53))

    at_once(*[work] * THREADS)


def test_one_stream_at_once():
    """Each push is whole or refused; a copy made meanwhile is a stream of some moment."""
    stream = fastattn.StreamingAttention(0, 0)  # each row is its own value
    returned, copies = [], []

    def push(k):
        for i in range(150):
            x = np.full((3, 4), 1000 * k + i, np.float32)
            try:
                returned.append(stream.push(x, x, x))
            except RuntimeError as error:
                assert "this stream is being changed" in str(error)

    def look():
        for _ in range(150):
            assert stream.waiting == 0
            copies.append(copy.copy(stream))

    at_once(*[lambda k=k: push(k) for k in range(4)], look)
    assert stream.pushed == stream.returned == 3 * len(returned)
    for rows_of_push in returned:
        assert rows_of_push.shape == (3, 4)
        assert (rows_of_push == rows_of_push[0, 0]).all()
    for one in copies:
        x = np.full((2, 4), 7, np.float32)
        before = one.pushed
        np.testing.assert_array_equal(one.push(x, x, x), x)
        assert one.pushed == before + 2
        break
    stream.reset()
    assert stream.pushed == 0


def test_the_refusal():
    """In a call that changes the cache, another one, as of a signal handler; and afterwards the cache works."""

    class Late:
        """An array that is asked for only within append."""

        def __array__(self, dtype=None, copy=None):
            assert refused(cache.append, tokens(0, 1), tokens(0, 1))
            assert refused(cache.reset)
            assert refused(cache.copy)
            assert refused(pickle.dumps, cache)
            return np.array(tokens(0, 2))

    cache = fastattn.KVCache(1, 2, 10, 4)
    cache.append(Late(), tokens(0, 2))
    np.testing.assert_array_equal(cache.key, tokens(0, 2))
    with pytest.raises(ValueError, match="capacity"):
        cache.append(tokens(0, 20), tokens(0, 20))
    cache.append(tokens(2, 1), tokens(2, 1))
    np.testing.assert_array_equal(cache.copy().key, tokens(0, 3))


# ------------------------------------------------------------------------------------ the GIL


@pytest.mark.skipif(not FREE_THREADED, reason="an interpreter with the GIL")
def test_imports_leave_the_gil_off():
    """Of all modules; of integrations those whose framework is there, unless the framework itself switches it on."""
    fresh_process.run(
        """
        import importlib, pkgutil, sys, warnings
        import numpy
        assert not sys._is_gil_enabled(), "before: run without PYTHON_GIL=1"
        warnings.simplefilter("error")
        import fastattn
        for module in pkgutil.iter_modules(fastattn.__path__, "fastattn."):
            if module.name != "fastattn.__main__":
                try:
                    importlib.import_module(module.name)
                except ImportError as error:
                    assert "matplotlib" in str(error), error
        assert not sys._is_gil_enabled()
        for name in ("torch", "transformers", "jax", "autograd"):
            try:
                importlib.import_module(name)
            except Exception:
                continue
            if not sys._is_gil_enabled():
                importlib.import_module(f"fastattn.integrations.{name}")
                assert not sys._is_gil_enabled(), name
        """,
        PYTHON_GIL=None,
    )


def test_extensions_say_that_they_do_not_need_the_gil():
    """Of all extension modules, in any interpreter: none may be without the slot, which one alone would spoil."""
    import glob
    import os

    folder = os.path.dirname(fastattn.__file__)
    generated = glob.glob(f"{folder}/_*.c")
    if not generated:
        pytest.skip("the C files that Cython made are not here")
    for path in generated:
        with open(path) as file:
            text = file.read()
        assert "define __Pyx_FREETHREADING_COMPATIBLE Py_MOD_GIL_NOT_USED" in text, path
