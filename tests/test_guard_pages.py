"""Nothing outside the arrays is read or written: they are placed flush against forbidden pages.

A read past the end whose result is discarded passes every numeric test, until the array happens to be last on its page.
Here it always is.
"""

import ctypes
import mmap
import signal
import sys

import fresh_process
import numpy as np
import pytest

import fastattn
from fastattn.positions import apply_rotary

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through ctypes")

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded(array, at_end):
    """A copy that ends where a forbidden page begins (or begins where one ends)."""
    if array.size == 0:
        return array
    pages = (array.nbytes + PAGE - 1) // PAGE
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for page in (start, start + (pages + 1) * PAGE):
        if libc.mprotect(page, PAGE, PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * PAGE - array.nbytes if at_end else PAGE
    view = np.frombuffer(memory, dtype=array.dtype, count=array.size, offset=offset).reshape(array.shape)
    view[...] = array
    return view


def guarded_rows(array, at_end):
    """The same for a matrix with gaps between rows: the gap after the last row is forbidden."""
    rows, columns = array.shape
    stride = columns + 5
    flat = np.zeros((rows - 1) * stride + columns, dtype=array.dtype)
    view = np.lib.stride_tricks.as_strided(
        guarded(flat, at_end), array.shape, (stride * array.itemsize, array.itemsize)
    )
    view[...] = array
    return view


def guarded_columns(array, at_end):
    """The same for a matrix in column order."""
    return guarded(np.ascontiguousarray(array.T), at_end).T


def forbidden_outside(array, begin, end):
    """A copy of which only the rows [begin, end) may be read: they fill whole pages, all others are forbidden."""
    row = array.nbytes // len(array)
    assert begin * row % PAGE == end * row % PAGE == 0
    memory = mmap.mmap(-1, array.nbytes + PAGE)
    view = np.frombuffer(memory, dtype=array.dtype, count=array.size).reshape(array.shape)
    view[begin:end] = array[begin:end]
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for first, last in ((0, begin * row), (end * row, (array.nbytes + PAGE - 1) // PAGE * PAGE)):
        if last > first and libc.mprotect(start + first, last - first, PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return view


def look_through_windows(dtype):
    """Keys, values and entries of a relative bias that are not visible are not read. Runs in a child."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    itemsize = np.dtype(dtype).itemsize
    dim = 64
    unit = PAGE // (dim * itemsize)  # rows that fill a page
    num_keys = 300 * unit
    for begin, end in ((0, 1), (1, 2), (7, 8), (19, 60), (100, 300), (299, 300), (0, 300)):
        begin, end = begin * unit, end * unit
        key, value = (forbidden_outside(normal(num_keys, dim), begin, end) for _ in range(2))
        for num_queries in (1, 2, 4, 5, 8, min(9, unit), unit):
            query = normal(num_queries, dim)
            # The first query sees the first visible key, and the last one the last.
            left = (end - begin - num_queries) // 2
            right = end - begin - num_queries - left
            arguments = {"query_offset": begin + left, "window_size": (left, right)}
            for num_threads in (1, 2):
                for extra in (
                    {},
                    {"relative_bias": normal(num_queries, left + right + 1), "return_weights": "band"},
                    {"relative_bias": normal(1), "return_weights": True, "mask": rng.random(num_keys) < 0.7},
                ):
                    fastattn.dot_product_attention(query, key, value, **arguments, **extra, num_threads=num_threads)
            fastattn.additive_attention(query, key, value, normal(dim), **arguments)
            for num_threads in (1, 2):
                fastattn.dot_product_attention_vjp(
                    query, query, key, value, **arguments, wrt="query", num_threads=num_threads
                )
            fastattn.dot_product_attention(query, key, value, key_lengths=end, window_size=(end - begin - 1, 0),
                                           query_offset=end - 1)  # fmt: skip
        # A chunk is visible as a whole.
        for num_queries in (1, 4, 9):
            query = normal(num_queries, dim)
            arguments = {"chunk_size": end - begin, "left_chunks": 0}
            if begin % (end - begin) == 0 and num_queries <= end - begin:
                fastattn.dot_product_attention(query, key, value, **arguments, query_offset=begin)
                fastattn.dot_product_attention(query, key, value, **arguments, query_offset=end - num_queries)
    # Entries of a relative bias for keys before the first and after the last. One page of entries is visible, or one
    # entry less.
    entries = PAGE // itemsize
    key, value = normal(entries, 8), normal(entries, 8)
    for num_queries in (1, 2, 5, 40):
        query = normal(num_queries, 8)
        for page in (0, 3, 6):
            band = forbidden_outside(normal(7 * entries), page * entries, (page + 1) * entries)
            # For the first query entry `page * entries` belongs to key 0.
            left = page * entries
            right = 7 * entries - 1 - left
            arguments = {"window_size": (left, right), "query_offset": 0}
            single = fastattn.dot_product_attention(query[:1], key, value, relative_bias=band, **arguments)
            assert np.isfinite(single).all()
            # For all others too: each has its own row of entries, starting one entry further left.
            rows = np.lib.stride_tricks.as_strided(band, (num_queries, band.size), (itemsize, itemsize))
            out = fastattn.dot_product_attention(query, key, value, relative_bias=rows, **arguments)
            assert np.isfinite(out).all()


def walk(dtype, at_end):
    """Call everything with every array guarded. Runs in a child, which a fault would kill."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return guarded(rng.standard_normal(shape).astype(dtype), at_end)

    def check(out):
        assert np.isfinite(out).all()

    for num_queries in (1, 2, 7, 17, 50):
        for num_keys in (1, 7, 16, 17, 65, 130, 515):
            for head_dim, value_dim in (
                (1, 1),
                (3, 5),
                (8, 8),
                (15, 17),
                (16, 31),
                (17, 15),
                (64, 64),
                (65, 33),
                (130, 2),
            ):
                shape = (num_queries, num_keys)
                query, key, value = (
                    normal(2, num_queries, head_dim),
                    normal(2, num_keys, head_dim),
                    normal(2, num_keys, value_dim),
                )
                out = normal(2, num_queries, value_dim)
                check(fastattn.dot_product_attention(query, key, value, out=out))
                w_score = normal(head_dim)
                check(fastattn.additive_attention(query, key, value, w_score, out=out))
                fastattn.dot_product_attention(
                    query,
                    key,
                    value,
                    is_causal=True,
                    window_size=(num_keys // 2, 3),
                    key_lengths=guarded(np.array([num_keys, num_keys // 2]), at_end),
                    mask=guarded(rng.random(shape) < 0.8, at_end),
                    bias=normal(2, *shape),
                    relative_bias=normal(2, num_queries, num_keys // 2 + 1),
                    alibi_slopes=normal(2),
                    sinks=normal(2),
                    out=out,
                    return_weights=True,
                    return_lse=True,
                )
                check(out)
                width = 2 * (num_keys // 3) + 1
                _, band = fastattn.dot_product_attention(
                    query,
                    key,
                    value,
                    window_size=num_keys // 3,
                    relative_bias=normal(2, 1, width),
                    query_offset=guarded(np.array([-3, num_keys - 2]), at_end),
                    chunk_size=5,
                    out=out,
                    return_weights="band",
                )
                check(out)
                check(band)
                # Three query heads on one key head: a tile has rows of all three.
                slopes, biases = normal(2, 3), normal(3, 1, num_keys)
                heads, keys, values = (
                    normal(2, 3, num_queries, head_dim),
                    normal(2, 1, num_keys, head_dim),
                    normal(2, 1, num_keys, value_dim),
                )
                out_of_heads = normal(2, 3, num_queries, value_dim)
                check(fastattn.dot_product_attention(heads, keys, values, enable_gqa=True, out=out_of_heads))
                fastattn.dot_product_attention(
                    heads,
                    keys,
                    values,
                    enable_gqa=True,
                    alibi_slopes=slopes,
                    sinks=slopes,
                    bias=biases,
                    window_size=num_keys // 3,
                    relative_bias=normal(3, 1, width),
                    out=out_of_heads,
                    return_weights="band",
                    return_lse=True,
                )
                check(out_of_heads)
                for layout in (guarded_rows, guarded_columns):
                    arrays = [layout(x[0], at_end) for x in (query, key, value, out)]
                    bias, mask = (
                        layout(rng.standard_normal(shape).astype(dtype), at_end),
                        rng.random(shape) < 0.8,
                    )
                    check(fastattn.dot_product_attention(*arrays[:3], out=arrays[3]))
                    check(fastattn.additive_attention(*arrays[:3], w_score, out=arrays[3]))
                    fastattn.dot_product_attention(
                        *arrays[:3], out=arrays[3], bias=bias, mask=layout(mask, at_end), is_causal=True
                    )
                for activation in ("sparsemax", "entmax15"):
                    for scale in (1e-3, 3):  # many weights and few
                        rule = {"activation": activation, "scale": scale}
                        check(fastattn.dot_product_attention(query, key, value, out=out, **rule))
                        check(fastattn.dot_product_attention(*arrays[:3], out=arrays[3], is_causal=True, **rule))
                # Padding past the lengths may hold anything, but nothing past the array may be read.
                check(fastattn.dot_product_attention(query, key, value, key_lengths=num_keys - 1, out=out))
    for length in (1, 3, 15, 16, 17, 33, 63, 65, 129, 1000):
        x, out = normal(5, length), normal(5, length)
        mask = guarded(rng.random((5, length)) < 0.5, at_end)
        for axis in (-1, 0):
            for function in (fastattn.softmax, fastattn.log_softmax, fastattn.sparsemax, fastattn.entmax15):
                function(x, axis, out=out)
                function(x, axis, mask=mask, out=out)
                function(guarded_columns(x, at_end), axis, out=guarded_columns(out, at_end))
            fastattn.logsumexp(x, axis, mask=mask, out=normal(5 if axis else length))
            for function in (
                fastattn.softmax_vjp,
                fastattn.log_softmax_vjp,
                fastattn.sparsemax_vjp,
                fastattn.entmax15_vjp,
            ):
                y, g = normal(5, length), normal(5, length)
                np.abs(y, out=y)
                function(g, y, axis, out=out)
                function(g, y, axis, mask=mask, out=g)
                function(*(guarded_columns(z, at_end) for z in (g, y)), axis, out=guarded_columns(out, at_end))
                function(guarded_rows(g, at_end), y, axis, out=guarded_rows(out, at_end))
            fastattn.logsumexp_vjp(normal(5 if axis else length), x, axis, mask=mask, out=out)
            if axis == 0:  # rows too long for scratch
                fastattn.softmax(normal(4200, min(length, 70)), axis, out=normal(4200, min(length, 70)))
        query, value = normal(3, length, 9), normal(3, length, 7)
        cuts = guarded(np.array([0, length // 3, length]), at_end)
        fastattn.varlen_attention(query, query, value, cuts, out=normal(3, length, 7), return_lse=True)
        parts = [normal(length, 7), normal(length, 7)], [normal(length), normal(length)]
        fastattn.merge_attention(*parts)
        fastattn.merge_attention_vjp(normal(length, 7), *parts, grad_lse=normal(length))
        for rotary_dim in {length // 2 * 2, length // 4 * 2}:
            for interleaved in (False, True):
                options = {"rotary_dim": rotary_dim, "interleaved": interleaved}
                check(apply_rotary(x, out=out, inverse=True, **options))
                check(apply_rotary(x, out=out, **options))
                check(apply_rotary(x, out=x, offset=guarded(np.full(1, 3), at_end)[0], **options))
                for layout in (guarded_rows, guarded_columns):
                    check(apply_rotary(layout(x, at_end), out=layout(out, at_end), **options))
                check(apply_rotary(normal(2, 3, length), offset=guarded(np.array([3, 9]), at_end), **options))
                for places in (np.array([[4], [7]]), np.array([2, 9, 5]), np.array([0, 3, 10**9])):
                    for far in (places, places.astype(np.int32)):
                        options["positions"] = guarded(far, at_end)
                        options["frequencies"] = guarded(rng.standard_normal(rotary_dim // 2), at_end)
                        check(apply_rotary(normal(2, 3, length), attention_factor=1.5, **options))


def walk_back(dtype, at_end):
    """The same for gradients: inputs, what the forward call returned, and gradients are all guarded."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return guarded(rng.standard_normal(shape).astype(dtype), at_end)

    def back(name, grad_out, call, wrt, **more):
        outs = tuple(guarded(np.zeros_like(call[n]), at_end) for n in wrt)
        results = getattr(fastattn, f"{name}_vjp")(grad_out, **call, wrt=wrt, out=outs, **more)
        assert all(x is out and np.isfinite(x).all() for x, out in zip(results, outs, strict=True))

    tokens = ("query", "key", "value")
    for num_queries in (1, 7, 17, 50):
        for num_keys in (1, 16, 17, 65, 130, 515):
            for head_dim, value_dim in ((1, 1), (3, 5), (15, 17), (16, 31), (64, 64), (65, 33), (130, 2)):
                shape = (num_queries, num_keys)
                call = {"query": normal(2, num_queries, head_dim), "key": normal(2, num_keys, head_dim),
                        "value": normal(2, num_keys, value_dim)}  # fmt: skip
                grad_out, grad_lse = normal(2, num_queries, value_dim), normal(2, num_queries)
                out, lse = normal(2, num_queries, value_dim), normal(2, num_queries)
                out[...], lse[...] = fastattn.dot_product_attention(**call, return_lse=True)
                back("dot_product_attention", grad_out, call, tokens, output=out, lse=lse, grad_lse=grad_lse)
                rules = {
                    "is_causal": True,
                    "window_size": (num_keys // 2, 3),
                    "key_lengths": guarded(np.array([num_keys, num_keys // 2]), at_end),
                    "mask": guarded(rng.random(shape) < 0.8, at_end),
                    "bias": normal(2, *shape),
                    "relative_bias": normal(2, num_queries, num_keys // 2 + 1),
                    "alibi_slopes": normal(2),
                    "sinks": normal(2),
                }
                names = (*tokens, "bias", "relative_bias", "alibi_slopes", "sinks")
                back("dot_product_attention", grad_out, {**call, **rules}, names)
                rules |= {"bias": normal(2, 1, num_keys), "relative_bias": normal(num_keys // 2 + 1)}
                back("dot_product_attention", grad_out, {**call, **rules}, names)
                rules |= {"bias": normal(num_queries, 1), "relative_bias": normal(num_queries, 1)}
                back("dot_product_attention", grad_out, {**call, **rules}, names)
                # Three query heads on one key head, and rows with gaps or in column order.
                heads = {"query": normal(3, num_queries, head_dim), "key": normal(1, num_keys, head_dim),
                         "value": normal(1, num_keys, value_dim)}  # fmt: skip
                grad_of_heads = normal(3, num_queries, value_dim)
                back("dot_product_attention", grad_of_heads, {**heads, "enable_gqa": True}, tokens)
                for layout in (guarded_rows, guarded_columns):
                    arrays = {n: layout(x[0], at_end) for n, x in call.items()}
                    outs = tuple(layout(x[0], at_end) for x in call.values())
                    grad = layout(grad_out[0], at_end)
                    for activation in ("softmax", "relu", "entmax15"):
                        fastattn.dot_product_attention_vjp(grad, **arrays, activation=activation, out=outs)
                        assert all(np.isfinite(x).all() for x in outs)
                hidden = value_dim
                own = {"w_query": normal(head_dim, hidden), "w_key": normal(head_dim, hidden)}
                if num_keys <= 130:
                    more = {**own, "w_score": normal(hidden), "b_hidden": normal(hidden)}
                    back("additive_attention", grad_out, {**call, **more}, (*tokens, *more))
                more = {**own, "b_query": normal(hidden), "b_key": normal(hidden)}
                back("bilinear_attention", grad_out, {**call, **more}, (*tokens, *more))
        cuts = guarded(np.array([0, num_queries // 3, num_queries]), at_end)
        query, value = normal(3, num_queries, 9), normal(3, num_queries, 7)
        call = {"query": query, "key": query.copy(), "value": value, "cu_seqlens_q": cuts}
        back("varlen_attention", value, call, tokens)


def walk_layers(dtype, at_end):
    """The same for products and norms; the matrix and its bias are guarded while they are packed."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return guarded(rng.standard_normal(shape).astype(dtype), at_end)

    placed = (lambda x: guarded(x, at_end), lambda x: guarded_rows(x, at_end), lambda x: guarded_columns(x, at_end))
    for d_in in (0, 1, 5, 16, 33, 130, 600):
        for d_out in (1, 7, 16, 31, 64, 65, 100, 193):
            linear = fastattn.Linear(normal(d_in, d_out), normal(d_out))
            for rows in (1, 2, 5, 8, 9, 13, 30):
                x, out, multiply, residual = (normal(rows, n) for n in (d_in, d_out, d_out, d_out))
                for place in placed if d_in else placed[:1]:
                    arrays = {"multiply": place(multiply), "residual": place(residual), "out": place(out)}
                    for activation in (None, "gelu"):
                        result = linear(place(x), activation=activation, **arrays)
                        assert result is arrays["out"] and np.isfinite(result).all()
                    linear(place(x), out=arrays["residual"], residual=arrays["residual"])
            if dtype == "float32":
                numbers = guarded(rng.integers(-128, 128, (d_in, d_out), dtype=np.int8), at_end)
                small = fastattn.Linear(numbers, normal(d_out), weight_scale=normal(d_out))
                for rows in (1, 2, 3, 8, 9, 30):
                    out = small(place(normal(rows, d_in)), out=guarded(np.zeros((rows, d_out), dtype), at_end))
                    assert np.isfinite(out).all()
            wide = rng.standard_normal((9, d_in))
            linear(guarded(wide, at_end), out=guarded(np.zeros((9, d_out)), at_end))
    for channels in (1, 3, 8, 15, 16, 17, 31, 33, 64, 65, 129, 1000):
        x, out, residual = (normal(5, channels) for _ in range(3))
        for place in placed:
            arrays = {"residual": place(residual), "out": place(out)}
            weight, bias = normal(channels), normal(channels)
            for _ in range(2):
                fastattn.layer_norm(place(x), weight, bias, **arrays)
                fastattn.rms_norm(place(x), weight, offset=1, return_sum=True, **arrays)
                assert np.isfinite(arrays["out"]).all()
                arrays["out"] = arrays["residual"]


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_access_outside_the_arrays_of_layers(dtype, at_end):
    fresh_process.run(
        f"import faulthandler; faulthandler.enable()\n"
        f"import test_guard_pages; test_guard_pages.walk_layers({dtype!r}, {at_end})",
    )


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_access_outside_the_arrays_of_gradients(dtype, at_end):
    fresh_process.run(
        f"import faulthandler; faulthandler.enable()\n"
        f"import test_guard_pages; test_guard_pages.walk_back({dtype!r}, {at_end})",
    )


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_access_outside_the_arrays(dtype, at_end):
    fresh_process.run(
        f"import faulthandler; faulthandler.enable()\n"
        f"import test_guard_pages; test_guard_pages.walk({dtype!r}, {at_end})",
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nothing_outside_of_a_window_is_read(dtype):
    fresh_process.run(
        f"import faulthandler; faulthandler.enable()\n"
        f"import test_guard_pages; test_guard_pages.look_through_windows({dtype!r})",
    )


def test_a_look_outside_of_the_window_is_seen():
    """A window one key too large ends the process."""
    code = """
    import numpy as np
    from test_guard_pages import PAGE, forbidden_outside
    import fastattn
    unit = PAGE // 64 // 4
    x = np.ones((4 * unit, 64), dtype=np.float32)
    key = forbidden_outside(x, unit, 2 * unit)
    call = lambda left: fastattn.dot_product_attention(
        x[:1], key, x, query_offset=2 * unit - 1, window_size=(left, 0)
    )
    call(unit - 1)
    print("so far", flush=True)
    call(unit)
    """
    returncode, stdout, _ = fresh_process.finish(fresh_process.start(code))
    assert stdout.strip() == "so far"
    assert returncode == -signal.SIGSEGV


@pytest.mark.parametrize("beyond", [True, False])
def test_the_guard_holds(beyond):
    """One byte outside, on either side, ends the process."""
    code = f"""
    import ctypes
    import numpy as np
    from test_guard_pages import guarded
    array = guarded(np.ones(7, dtype=np.float32), {beyond})
    address = array.ctypes.data
    assert len(ctypes.string_at(address, array.nbytes)) == array.nbytes
    ctypes.string_at(address + array.nbytes if {beyond} else address - 1, 1)
    """
    returncode, _, _ = fresh_process.finish(fresh_process.start(code))
    assert returncode == -signal.SIGSEGV
