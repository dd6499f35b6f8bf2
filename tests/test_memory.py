"""Memory beyond inputs and outputs grows with L + S: the peak memory of processes, each with one large call."""

import sys

import fresh_process
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MEGABYTE = 2**20


def extra_memory(setup, call):
    """By how many bytes the resident memory of a new process rises above where it was before `call`."""
    return int(
        fresh_process.run(
            f"""
            import numpy as np
            import fastattn

            def status(field):
                with open("/proc/self/status") as file:
                    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

            rng = np.random.default_rng(0)
            def normal(*shape):
                return rng.standard_normal(shape, dtype=np.float32)
            small = normal(2, 300, 64)
            fastattn.dot_product_attention(small, small, small, num_threads=2)
            {setup}
            try:
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")  # begin anew with the peak
            except OSError:
                pass
            before = status("VmRSS")
            result = {call}
            print(status("VmHWM") - before)
            """,
        )
    )


def test_the_measure_can_fail():
    """A call that does hold L x S numbers is detected."""
    setup = "query = normal(4096, 64)"
    assert extra_memory(setup, "(query @ query.T).sum()") > 60 * MEGABYTE


def test_long_sequences():
    """L = S = 16384: the scores would take 1 GiB."""
    setup = "query, key, value = normal(16384, 64), normal(16384, 64), normal(16384, 64)"
    extra = extra_memory(setup, "fastattn.dot_product_attention(query, key, value, return_lse=True)")
    assert extra < 64 * MEGABYTE


@pytest.mark.parametrize(
    "arguments",
    [
        "is_causal=True, alibi_slopes=np.float32(0.01)",
        "mask=normal(8192) > 0, bias=normal(8192, 1), window_size=(4000, 4000)",
        "sinks=np.float32(1), num_threads=4",
        "activation='relu'",
        "chunk_size=100, left_chunks=70",
        "window_size=(5000, 3000), relative_bias=normal(8001)",
        "window_size=(100, 27), relative_bias=normal(8192, 128), return_weights='band'",
        "window_size=(100, 27), relative_bias=normal(8192, 128), num_threads=4, return_lse=True",
    ],
)
def test_arguments(arguments):
    """L = S = 8192: the scores would take 256 MiB, a boolean matrix 64 MiB."""
    setup = "query, key, value = normal(8192, 32), normal(8192, 32), normal(8192, 32)"
    extra = extra_memory(setup, f"fastattn.dot_product_attention(query, key, value, {arguments})")
    assert extra < 32 * MEGABYTE


def test_truncated():
    """L = S = 300_000, of which a query sees 41; output and weights take 9.2 and 49 MB."""
    setup = "x, band = normal(300_000, 8), normal(41)"
    call = "fastattn.truncated_attention(x, x, x, 30, 10, relative_bias=band, return_weights='band')"
    assert extra_memory(setup, call) < (9.6 + 49.2 + 16) * 1e6


@pytest.mark.parametrize("arguments", ["", "window_size=(50_000, 0), relative_bias=normal(50_001)", "softcap=5.0"])
def test_one_query(arguments):
    """12 heads that share 4 of 200_000 keys (98 MiB): threads need a state for each of 98 spans, and no more."""
    setup = "query, key, value = normal(12, 1, 32), normal(4, 200_000, 32), normal(4, 200_000, 32)"
    for num_threads in (1, 8):
        options = f"enable_gqa=True, num_threads={num_threads}, {arguments}"
        extra = extra_memory(setup, f"fastattn.dot_product_attention(query, key, value, {options})")
        assert extra < 16 * MEGABYTE


def gradient_memory(setup, arguments):
    """The same for gradients, with those themselves."""
    setup += "; grad_out = normal(*query.shape)"
    return extra_memory(setup, f"fastattn.dot_product_attention_vjp(grad_out, query, key, value, {arguments})")


@pytest.mark.parametrize("more", ["", "num_threads=8", "output=out, lse=lse, grad_lse=lse, num_threads=2"])
def test_long_gradients(more):
    """L = S = 16384, one head of 64: the scores would take 1 GiB, the gradients take 12 MiB."""
    setup = "query, key, value = normal(16384, 64), normal(16384, 64), normal(16384, 64)"
    if "output" in more:
        setup += "; out, lse = fastattn.dot_product_attention(query, key, value, return_lse=True)"
    assert gradient_memory(setup, more) < (64 + 12) * MEGABYTE


@pytest.mark.parametrize(
    "arguments",
    [
        "is_causal=True, alibi_slopes=np.float32(0.01), wrt='alibi_slopes'",
        "mask=normal(8192) > 0, bias=normal(8192, 1), wrt=('query', 'bias')",
        "bias=normal(8192), wrt='bias', num_threads=2",
        "bias=normal(1, 1), sinks=np.float32(1), wrt=('bias', 'sinks', 'key')",
        "activation='relu', softcap=3.0",
        "activation='entmax15', num_threads=2",
        "chunk_size=100, left_chunks=70",
        "window_size=(5000, 3000), relative_bias=normal(8001), wrt='relative_bias'",
        "window_size=(100, 27), relative_bias=normal(8192, 128), wrt=('relative_bias', 'key')",
    ],
)
def test_arguments_of_gradients(arguments):
    """L = S = 8192: the scores would take 256 MiB, a boolean matrix 64 MiB; gradients take 4 MiB at most."""
    setup = "query, key, value = normal(8192, 32), normal(8192, 32), normal(8192, 32)"
    assert gradient_memory(setup, arguments) < (32 + 4) * MEGABYTE


@pytest.mark.parametrize("function", ["additive", "bilinear"])
def test_gradients_of_other_scores(function):
    setup = "x, w, v = normal(8192, 16), normal(16, 8), normal(8)"
    own = {"additive": "v, w_query=w, w_key=w, wrt=('query', 'key', 'value', 'w_score', 'w_query', 'w_key')",
           "bilinear": "w, w, wrt=('query', 'key', 'value', 'w_query', 'w_key')"}[function]  # fmt: skip
    assert extra_memory(setup, f"fastattn.{function}_attention_vjp(x, x, x, x, {own})") < 32 * MEGABYTE


def test_gradients_in_sixteen_bits():
    """One copy in float32 of each gradient, of 4 MiB, and no more."""
    setup = "query, key, value = (normal(16384, 64).astype(np.float16) for _ in range(3))"
    assert gradient_memory(setup, "is_causal=True") < (64 + 12) * MEGABYTE


def test_gradients_of_a_window():
    """L = S = 300_000, of which a query sees 301, which would be 361 MB; gradients take 28.8 MB. All pairs would take
    minutes."""
    setup = "x, band = normal(300_000, 8), normal(301)"
    call = "fastattn.truncated_attention_vjp(x, x, x, x, 200, 100, relative_bias=band, WRT)"
    assert extra_memory(setup, call.replace(", WRT", "")) < (28.8 + 64) * 1e6
    assert extra_memory(setup, call.replace("WRT", "wrt='relative_bias'")) < 64 * 1e6


def test_gradients_of_shared_heads():
    """32 query heads on one key head: its gradient is added up in place."""
    setup = "query, key, value = normal(32, 1024, 32), normal(1, 1024, 32), normal(1, 1024, 32)"
    assert gradient_memory(setup, "enable_gqa=True, wrt=('key', 'value'), num_threads=2") < 16 * MEGABYTE


LAYOUTS = {
    "sequence before heads": "memory = normal(100_000, 2, 64); key, value = memory[:, 0], memory[:, 1]",
    "transposed": "memory = normal(2, 64, 100_000); key, value = memory[0].T, memory[1].T",
    "negative strides": "memory = normal(2, 100_000, 64); key, value = memory[:, ::-1, ::-1]",
    "misaligned": "memory = np.zeros(2 * 25_600_000 + 1, dtype=np.uint8)[1:].view(np.float32);"
    " memory[...] = 1; key, value = memory.reshape(2, 100_000, 64)",
}


@pytest.mark.parametrize("num_queries", [1, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_copy_because_of_strides(layout, num_queries):
    """Key and value take 24.4 MiB each; a copy of one would show."""
    setup = f"{LAYOUTS[layout]}; query = normal({num_queries}, 64)"
    extra = extra_memory(setup, "fastattn.dot_product_attention(query, key, value)")
    assert extra < 16 * MEGABYTE
    assert gradient_memory(setup, "wrt='query'") < 16 * MEGABYTE


def test_softmax_needs_nothing_more():
    extra = extra_memory("x = normal(1000, 10_000)", "fastattn.softmax(x, out=x)")
    assert extra < 4 * MEGABYTE


def test_gradients_of_softmax_need_nothing_more():
    setup = "y, grad = normal(1000, 10_000), normal(1000, 10_000)"
    for axis in (-1, 0):
        extra = extra_memory(setup, f"fastattn.softmax_vjp(grad, y, {axis}, out=grad)")
        assert extra < 4 * MEGABYTE
