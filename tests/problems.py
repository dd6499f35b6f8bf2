"""Inputs for the tests: random arrays of a given shape, and the same array in every memory layout."""

import tempfile

import numpy as np

# Around the sizes where vectors, tiles and blocks begin and end.
AWKWARD = (0, 1, 15, 16, 17, 63, 65, 129)
HEAD_DIMS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 80, 96, 127, 128, 129, 192, 257, 300)
DTYPES = (np.float32, np.float64)


def sixteen_bits():
    """The available 16-bit dtypes: bfloat16 only if ml_dtypes is installed."""
    try:
        import ml_dtypes
    except ImportError:
        return (np.float16,)
    return (np.float16, ml_dtypes.bfloat16)


def qkv(rng, batch=(), num_queries=17, num_keys=33, head_dim=16, value_dim=None, dtype=np.float32, kv_batch=None):
    """Standard normal query, key and value; `kv_batch` if key and value have other batch axes."""
    kv_batch = batch if kv_batch is None else kv_batch
    value_dim = head_dim if value_dim is None else value_dim
    return (
        rng.standard_normal((*batch, num_queries, head_dim)).astype(dtype),
        rng.standard_normal((*kv_batch, num_keys, head_dim)).astype(dtype),
        rng.standard_normal((*kv_batch, num_keys, value_dim)).astype(dtype),
    )


def rules(rng, batch=(2, 3), num_queries=20, num_keys=70, dtype=np.float32):
    """Keyword arguments by name: every rule that all attention functions share, alone, and many together."""

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    def lengths(largest):
        return rng.integers(largest // 3, largest + 1, (*batch[:-1], 1))

    mask = rng.random((num_queries, num_keys)) < 0.6
    holes = np.where(rng.random((num_queries, num_keys)) < 0.4, dtype(-np.inf), normal(num_queries, num_keys))
    offsets = rng.integers(-num_queries // 4, num_keys, batch)
    band = np.where(
        rng.random((num_queries, num_keys // 4 + 3)) < 0.4, dtype(-np.inf), normal(num_queries, num_keys // 4 + 3)
    )
    return {
        "causal": {"is_causal": True},
        "window": {"window_size": (num_keys // 4, 2)},
        "offset": {"query_offset": offsets, "is_causal": True},
        "offset and window": {"query_offset": 5, "window_size": (None, 9)},
        "chunks": {"chunk_size": 9},
        "some chunks": {"chunk_size": 7, "left_chunks": 2, "query_offset": offsets},
        "key_lengths": {"key_lengths": lengths(num_keys)},
        "query_lengths": {"query_lengths": lengths(num_queries), "is_causal": True},
        "mask": {"mask": mask},
        "mask of keys": {"mask": rng.random((*batch, 1, num_keys)) < 0.6},
        "blocks": {
            "block_mask": rng.random((*batch, -(-num_queries // 8), -(-num_keys // 10))) < 0.5,
            "block_size": (8, 10),
        },
        "no key": {"mask": np.zeros(num_keys, dtype=bool)},
        "bias": {"bias": normal(*batch[-1:], num_queries, num_keys)},
        "bias that hides": {"bias": holes},
        "relative bias": {"window_size": (11, 4), "relative_bias": normal(*batch[-1:], 1, 16)},
        "relative bias that hides": {"window_size": (num_keys // 4, 2), "relative_bias": band, "query_offset": offsets},
        "alibi": {"alibi_slopes": np.abs(normal(*batch[-1:]))},
        "scale": {"scale": 0.3},
        "negative scale": {"scale": -1.5},
        "softcap": {"softcap": 0.7},
        "sinks": {"sinks": normal(*batch[-1:])},
        "relu": {"activation": "relu"},
        "sigmoid": {"activation": "sigmoid"},
        "sparsemax": {"activation": "sparsemax"},
        "entmax15 of some keys": {"activation": "entmax15", "mask": mask, "is_causal": True},
        "relu of some keys": {"activation": "relu", "mask": mask, "bias": normal(num_queries, 1), "is_causal": True},
        "together": {
            "is_causal": True,
            "window_size": (num_keys // 2, None),
            "chunk_size": num_keys // 8 + 1,
            "left_chunks": 3,
            "key_lengths": lengths(num_keys),
            "query_lengths": lengths(num_queries),
            "mask": mask,
            "block_mask": rng.random((-(-num_queries // 7), 1)) < 0.9,
            "block_size": (7, 1000),
            "bias": normal(*batch[-1:], num_queries, num_keys),
            "relative_bias": normal(*batch, 1, num_keys // 2 + 1),
            "alibi_slopes": np.abs(normal(*batch[-1:])) / 4,
            "sinks": normal(*batch[-1:]),
            "scale": 0.8,
            "softcap": 3.0,
        },
    }


RULES = tuple(rules(np.random.default_rng(0)))


def misaligned(array):
    """A copy whose items start at odd addresses."""
    buffer = np.zeros(array.nbytes + 1, dtype=np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def spaced(array):
    """A copy with gaps between its items, rows and matrices."""
    buffer = np.zeros(tuple(3 * n + 1 for n in array.shape), dtype=array.dtype)
    view = buffer[tuple(slice(1, None, 3) for _ in array.shape)]
    view[...] = array
    return view


def wide_rows(array):
    """A copy whose rows are 4096 bytes apart, so that they map to the same cache sets."""
    row = max(4096 // array.itemsize, array.shape[-1])
    view = np.zeros((*array.shape[:-1], row), dtype=array.dtype)[..., : array.shape[-1]]
    view[...] = array
    return view


def mapped(array):
    """A read-only copy in a file mapped into memory."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(array.tobytes())
        file.flush()
        return np.memmap(file.name, dtype=array.dtype, mode="r", shape=array.shape)


def layouts(array):
    """Pairs (name, the same numbers in another memory layout)."""
    flip = tuple(slice(None, None, -1) for _ in array.shape)
    yield "transposed", np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    yield "negative strides", np.ascontiguousarray(array[flip])[flip]
    if array.ndim >= 3:
        yield "sequence before heads", np.ascontiguousarray(array.swapaxes(-2, -3)).swapaxes(-2, -3)
        yield "Fortran order", np.asfortranarray(array)
    yield "misaligned", misaligned(array)
    yield "spaced", spaced(array)
    yield "wide rows", wide_rows(array)
    read_only = array.copy()
    read_only.flags.writeable = False
    yield "read-only", read_only
    if array.size:
        yield "memory-mapped", mapped(array)


def bits(array):
    """The bytes of an array in C order: equal if and only if all bits are."""
    return np.ascontiguousarray(array).tobytes()
