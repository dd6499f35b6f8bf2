"""Encodings of positions: against the reference, against published values, and what must not change the bits."""

import math
import threading

import fresh_process
import numpy as np
import pytest
from problems import AWKWARD, DTYPES, HEAD_DIMS, bits, layouts, sixteen_bits
from published_frequencies import LONG, PUBLISHED, SHORT

import fastattn
from fastattn import reference
from fastattn.positions import (
    alibi_slopes,
    apply_rotary,
    relative_position_buckets,
    rotary_frequencies,
    sinusoidal_encoding,
)

ALL_DTYPES = (*DTYPES, *sixteen_bits())


def eps_of(dtype):
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[np.dtype(dtype).name]


def assert_rotary(x, result=None, *, offset=0, rotary_dim=None, reference=reference, **options):
    """Check each number within its rounding errors.

    The angle has the roundings of the speed (two, with a power function other than ours) and of the product, times its
    size; cosine, sine, the two products and the sum are rounded once each in the arithmetic's dtype, and the result in
    its own.
    """
    x = np.asarray(x)
    if result is None:
        result = apply_rotary(x, offset=offset, rotary_dim=rotary_dim, **options)
    expected = reference.apply_rotary(x, offset=offset, rotary_dim=rotary_dim, **options)
    storage = x.dtype if x.dtype.kind == "f" or x.dtype.name == "bfloat16" else np.dtype(np.float64)
    assert result.dtype == storage
    assert result.shape == x.shape
    if x.size == 0:
        return
    real = np.float64 if storage == np.float64 else np.float32
    if options.get("positions") is None:
        farthest = np.max(np.abs(np.asarray(offset, dtype=np.float64))) + x.shape[-2]
    else:
        farthest = np.max(np.abs(np.asarray(options["positions"], dtype=np.float64))) + 1
    if options.get("frequencies") is not None:
        farthest = farthest * np.max(np.abs(options["frequencies"]), initial=1)
    angle_error = 4 * eps_of(np.float64) * farthest
    dim = x.shape[-1] if rotary_dim is None else rotary_dim
    size = np.abs(x.astype(np.float64))
    first, second = (
        (slice(0, dim, 2), slice(1, dim, 2)) if options.get("interleaved") else (slice(dim // 2), slice(dim // 2, dim))
    )
    pair = size[..., first] + size[..., second]
    allowed = np.zeros(x.shape)
    allowed[..., first] = allowed[..., second] = pair * (3 * eps_of(real) + angle_error)
    allowed *= options.get("attention_factor", 1)
    if storage.itemsize == 2:
        smallest = 2**-25 if storage == np.float16 else 0
        allowed[..., :dim] += np.abs(expected[..., :dim]) * eps_of(storage) + smallest
    error = np.abs(result.astype(np.float64) - expected)
    assert (error <= allowed).all(), (np.max(error), np.max(error - allowed))


# Sinusoidal encoding


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (1, 1), (5, 2), (5, 7), (200, 64), (33, 513)])
def test_sinusoidal_against_reference(shape, layout):
    for offset in (0, 3, -50, 10**6):
        ours = sinusoidal_encoding(*shape, layout=layout, offset=offset)
        theirs = reference.sinusoidal_encoding(*shape, layout=layout, offset=offset)
        assert ours.shape == shape
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-52 * (abs(offset) + shape[0] + 2))


def test_sinusoidal_values():
    """The table printed in tutorials for 4 positions and base 100, and the paper's formula written out."""
    expected = [
        [0.0, 1.0, 0.0, 1.0],
        [0.84147098, 0.54030231, 0.09983342, 0.99500417],
        [0.90929743, -0.41614684, 0.19866933, 0.98006658],
        [0.14112001, -0.9899925, 0.29552021, 0.95533649],
    ]
    np.testing.assert_allclose(sinusoidal_encoding(4, 4, base=100), expected, atol=6e-9)
    table = sinusoidal_encoding(60, 512)
    for position, i in [(1, 0), (1, 255), (59, 3), (17, 100)]:
        angle = position / 10000 ** (2 * i / 512)
        assert abs(table[position, 2 * i] - math.sin(angle)) < 1e-13
        assert abs(table[position, 2 * i + 1] - math.cos(angle)) < 1e-13


@pytest.mark.parametrize("dim", [1, 2, 6, 7, 64, 65])
def test_sinusoidal_layouts_hold_the_same_numbers(dim):
    turns, split = sinusoidal_encoding(9, dim), sinusoidal_encoding(9, dim, layout="split")
    sines = (dim + 1) // 2
    np.testing.assert_array_equal(split[:, :sines], turns[:, 0::2])
    np.testing.assert_array_equal(split[:, sines:], turns[:, 1::2])
    # The speeds of an odd dim differ from those of an even table with one channel more.
    if dim % 2:
        angle = np.arange(9)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
        np.testing.assert_allclose(turns[:, 0::2], np.sin(angle), atol=1e-14)


def test_sinusoidal_offset_is_a_later_part():
    whole = sinusoidal_encoding(40, 10)
    np.testing.assert_array_equal(sinusoidal_encoding(5, 10, offset=20), whole[20:25])
    np.testing.assert_array_equal(sinusoidal_encoding(3, 10, offset=-1)[1:], whole[:2])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_sinusoidal_dtypes(dtype):
    table = sinusoidal_encoding(30, 20, dtype=dtype)
    assert table.dtype == dtype
    np.testing.assert_array_equal(table, sinusoidal_encoding(30, 20).astype(dtype))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"length": -1}, ValueError, "length"),
        ({"length": 2.0}, TypeError, "length"),
        ({"length": True}, TypeError, "length"),
        ({"dim": -2}, ValueError, "dim"),
        ({"dim": "4"}, TypeError, "dim"),
        ({"base": 0}, ValueError, "base"),
        ({"base": -10.0}, ValueError, "base"),
        ({"base": math.nan}, ValueError, "base"),
        ({"base": math.inf}, ValueError, "base"),
        ({"base": 10**400}, ValueError, "base"),
        ({"base": "10000"}, TypeError, "base"),
        ({"base": 1j}, TypeError, "base"),
        ({"layout": "both"}, ValueError, "interleaved.*split"),
        ({"layout": None}, ValueError, "layout"),
        ({"offset": 0.5}, TypeError, "offset"),
        ({"offset": 2**53 + 1}, ValueError, "offset"),
        ({"dtype": np.int64}, TypeError, "dtype"),
        ({"dtype": np.dtype(">f4") if np.little_endian else np.dtype("<f4")}, TypeError, "dtype"),
        ({"dtype": complex}, TypeError, "dtype"),
        ({"length": 2**50, "dim": 2**50}, MemoryError, "memory"),
    ],
)
def test_sinusoidal_errors(options, error, words):
    with pytest.raises(error, match=words):
        sinusoidal_encoding(**{"length": 3, "dim": 4, **options})


# Rotary encoding


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("channels", HEAD_DIMS)
def test_rotary_channels(rng, channels, interleaved, dtype):
    x = (3 * rng.standard_normal((2, 5, channels))).astype(dtype)
    even = channels // 2 * 2
    for rotary_dim in {0, even, even // 4 * 2}:
        assert_rotary(x, rotary_dim=rotary_dim, interleaved=interleaved, offset=7)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("length", [*AWKWARD, 300])
def test_rotary_lengths(rng, length, dtype):
    x = rng.standard_normal((2, 3, length, 24)).astype(dtype)
    for offset in (0, 11, -length, -(10**6)):
        assert_rotary(x, offset=offset)


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (2, 1, 3), (2, 0), (1, 1, 1, 5), (2, 1, 2, 1, 2)])
def test_rotary_batches_and_offsets(rng, batch):
    x = rng.standard_normal((*batch, 7, 12)).astype(np.float32)
    assert_rotary(x)
    for keep in range(2 ** len(batch)):
        shape = tuple(n if keep >> axis & 1 else 1 for axis, n in enumerate(batch))
        offset = rng.integers(-1000, 1000, shape)
        assert_rotary(x, offset=offset)
        assert_rotary(x, offset=offset.astype(np.int16, order="F"))
        if 0 not in shape:
            assert_rotary(x, offset=offset.tolist())


def test_rotary_offsets_of_all_integer_types():
    x = np.ones((2, 3, 4))
    expected = apply_rotary(x, offset=5)
    for dtype in (np.int8, np.uint8, np.int32, np.uint64):
        np.testing.assert_array_equal(apply_rotary(x, offset=dtype(5)), expected)
        np.testing.assert_array_equal(apply_rotary(x, offset=np.full(2, 5, dtype)), expected)


def test_rotary_values():
    """One radian per position for the first pair; a hundredth for the second of two."""
    c, s = math.cos(1), math.sin(1)
    np.testing.assert_allclose(apply_rotary([[1.0, 0.0]], offset=1), [[c, s]], rtol=1e-15)
    np.testing.assert_allclose(apply_rotary([[0.0, 1.0]], offset=1), [[-s, c]], rtol=1e-15)
    slow_c, slow_s = math.cos(0.01), math.sin(0.01)
    x = [[1.0, 2.0, 3.0, 4.0]]
    half = [[c - 3 * s, 2 * slow_c - 4 * slow_s, 3 * c + s, 4 * slow_c + 2 * slow_s]]
    pairs = [[c - 2 * s, 2 * c + s, 3 * slow_c - 4 * slow_s, 4 * slow_c + 3 * slow_s]]
    np.testing.assert_allclose(apply_rotary(x, offset=1), half, rtol=1e-14)
    np.testing.assert_allclose(apply_rotary(x, offset=1, interleaved=True), pairs, rtol=1e-14)
    np.testing.assert_array_equal(apply_rotary([[1, 2, 3, 4]]), x)


def rotate_half(x, offset, base=10000.0):
    """As Hugging Face writes it: x * cos + rotate_half(x) * sin, with each angle twice."""
    half = x.shape[-1] // 2
    angle = (offset + np.arange(x.shape[-2]))[:, None] / base ** (np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = np.concatenate([angle, angle], axis=-1)
    return x * np.cos(angle) + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * np.sin(angle)


def as_complex(x, offset, base=10000.0):
    """As LLaMA was published: pairs as complex numbers, times exp(1j * angle)."""
    angle = (offset + np.arange(x.shape[-2]))[:, None] / base ** (np.arange(0, x.shape[-1], 2) / x.shape[-1])
    return (x.view(np.complex128) * np.exp(1j * angle)).view(np.float64)


@pytest.mark.parametrize("base", [10000.0, 500000, 2.5, 1.0])
def test_rotary_as_others_write_it(rng, base):
    x = rng.standard_normal((2, 3, 50, 64))
    np.testing.assert_allclose(apply_rotary(x, offset=9, base=base), rotate_half(x, 9, base), atol=1e-12)
    np.testing.assert_allclose(
        apply_rotary(x, offset=9, base=base, interleaved=True), as_complex(x, 9, base), atol=1e-12
    )


@pytest.mark.parametrize("channels", [2, 6, 32, 70, 128])
def test_the_layouts_are_permutations_of_each_other(rng, channels):
    x = rng.standard_normal((20, channels))
    to_pairs = np.arange(channels).reshape(2, -1).T.ravel()
    expected = apply_rotary(x)[:, to_pairs]
    np.testing.assert_allclose(apply_rotary(x[:, to_pairs], interleaved=True), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("interleaved", [False, True])
def test_only_distances_count(rng, interleaved):
    query, key = rng.standard_normal((2, 1, 64))
    for distance in (0, 1, 17, -5):
        scores = [
            (
                apply_rotary(query, offset=at + distance, interleaved=interleaved)
                @ apply_rotary(key, offset=at, interleaved=interleaved).T
            ).item()
            for at in (0, 1, 100, -3, 12345)
        ]
        np.testing.assert_allclose(scores, scores[0], atol=1e-10)


def test_lengths_stay(rng):
    x = rng.standard_normal((30, 40))
    np.testing.assert_allclose(np.linalg.norm(apply_rotary(x, offset=99), axis=-1), np.linalg.norm(x, axis=-1))
    back = apply_rotary(apply_rotary(x, offset=5)[:1], offset=-5)
    np.testing.assert_allclose(back, x[:1], atol=1e-14)


ROTATIONS = {
    "plain": {},
    "interleaved": {"interleaved": True},
    "some channels": {"rotary_dim": 26, "offset": 7},
    "offsets": {"offset": [[3], [1000]], "interleaved": True},
    "positions": {"positions": [5, 0, 3, 3, 10**9, 2, -4]},
    "frequencies and factor": {"frequencies": np.linspace(-1, 2, 23), "attention_factor": 1.7},
}


@pytest.mark.parametrize("options", ROTATIONS.values(), ids=list(ROTATIONS))
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_the_inverse_rotates_back(rng, options, dtype):
    """The reference, the bits of the opposite positions, and, but for the factor squared, where it came from."""
    x = rng.standard_normal((2, 3, 7, 46)).astype(dtype)
    back = apply_rotary(x, inverse=True, **options)
    assert_rotary(x, back, inverse=True, **options)
    places = options.get("positions", np.asarray(options.get("offset", 0))[..., None] + np.arange(7))
    others = {name: value for name, value in options.items() if name not in ("offset", "positions")}
    assert bits(apply_rotary(x, positions=-np.asarray(places), **others)) == bits(back)
    y = x.copy()
    assert apply_rotary(y, out=y, inverse=True, **options) is y
    assert bits(y) == bits(back)
    for layout, other in layouts(x):
        assert bits(apply_rotary(other, inverse=True, num_threads=2, **options)) == bits(back), layout
    if dtype == np.float64:
        dim = options.get("rotary_dim", 46)
        again = apply_rotary(apply_rotary(x, **options), inverse=True, **options)
        again[..., :dim] /= options.get("attention_factor", 1) ** 2
        np.testing.assert_allclose(again, x, atol=1e-13)


@pytest.mark.parametrize("options", ROTATIONS.values(), ids=list(ROTATIONS))
def test_the_inverse_takes_gradients_back(rng, options):
    """It is the transpose, factor included: sum(g * rotate(x)) == sum(inverse(g) * x)."""
    x, grad = rng.standard_normal((2, 2, 3, 7, 46))
    for functions in (fastattn, reference):
        forward = np.sum(grad * functions.apply_rotary(x, **options))
        back = functions.apply_rotary(grad, inverse=True, **options)
        assert abs(np.sum(back * x) - forward) < 1e-11
    unit = np.zeros_like(x)
    unit[1, 2, 3, 4] = 1
    slope = np.sum(grad * (apply_rotary(x + unit, **options) - apply_rotary(x - unit, **options))) / 2
    assert abs(apply_rotary(grad, inverse=True, **options)[1, 2, 3, 4] - slope) < 1e-12


@pytest.mark.parametrize("bad", [1, 0, None, "yes", np.ones(1, bool)])
def test_inverse_is_true_or_false(bad):
    with pytest.raises(TypeError, match="inverse"):
        apply_rotary(np.ones((3, 4)), inverse=bad)


def test_rotary_partial_is_a_smaller_rotary_and_a_copy(rng):
    x = rng.standard_normal((2, 9, 40)).astype(np.float32)
    for interleaved in (False, True):
        result = apply_rotary(x, rotary_dim=14, interleaved=interleaved)
        np.testing.assert_array_equal(result[..., 14:], x[..., 14:])
        alone = apply_rotary(np.ascontiguousarray(x[..., :14]), interleaved=interleaved)
        np.testing.assert_array_equal(result[..., :14], alone)


def test_far_positions_are_right():
    """Float32 angles are off by a tenth of a turn at position one million; these are exact to float32."""
    x = np.array([[1.0, 0.0]], dtype=np.float32)
    for offset in (10**6, -(10**6), 10**9, 2**31, 2**53 - 1):
        result = apply_rotary(x, offset=offset)
        np.testing.assert_allclose(result, [[math.cos(offset), math.sin(offset)]], rtol=0, atol=2**-24)
    assert_rotary(np.ones((3, 20, 64), np.float32), offset=10**9)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int64])
def test_rotary_integers_become_float64(rng, dtype):
    assert_rotary(rng.integers(0, 2, (3, 5, 8)).astype(dtype), offset=3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rotary_layouts(rng, dtype, interleaved):
    x = rng.standard_normal((3, 4, 19, 46)).astype(dtype)
    options = {"interleaved": interleaved, "rotary_dim": 42, "offset": rng.integers(0, 99, (3, 1))}
    expected = bits(apply_rotary(x, **options))
    assert_rotary(x, **options)
    for layout, other in layouts(x):
        assert bits(apply_rotary(other, **options)) == expected, layout
    for layout, out in layouts(np.zeros_like(x)):
        if out.flags.writeable:
            assert apply_rotary(x, out=out, **options) is out
            assert bits(out) == expected, layout
    for layout, both in layouts(x):
        if both.flags.writeable:
            assert apply_rotary(both, out=both, **options) is both
            assert bits(both) == expected, f"in place, {layout}"


def test_rotary_of_a_broadcast_view(rng):
    x = np.broadcast_to(rng.standard_normal((1, 6, 10)), (5, 6, 10))
    assert_rotary(x, offset=np.arange(5))


def test_rotary_leaves_its_input_alone(rng):
    x = rng.standard_normal((2, 9, 16)).astype(np.float32)
    offset = np.array([3, 5])
    before = x.copy(), offset.copy()
    apply_rotary(x, offset=offset)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(offset, before[1])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_bits_of_a_row_depend_on_itself_and_its_position(rng, interleaved, dtype):
    """Not on threads, the rest of the batch, the other rows, or how its position is given."""
    x = rng.standard_normal((3, 8, 300, 70)).astype(dtype)
    whole = apply_rotary(x, offset=40, interleaved=interleaved, num_threads=1)
    for num_threads in (2, 3, 7):
        assert bits(apply_rotary(x, offset=40, interleaved=interleaved, num_threads=num_threads)) == bits(whole)
    one = apply_rotary(x[1, 2, 123:124], offset=163, interleaved=interleaved)
    assert bits(one) == bits(whole[1, 2, 123:124])
    offsets = np.full((3, 8), 40)
    offsets[1, 2] = -7
    mixed = apply_rotary(x, offset=offsets, interleaved=interleaved)
    assert bits(mixed[0]) == bits(whole[0])
    assert bits(mixed[1, 3:]) == bits(whole[1, 3:])
    assert bits(mixed[1, 2]) == bits(apply_rotary(x[1, 2], offset=-7, interleaved=interleaved))


def test_kept_tables_change_no_bit(rng):
    """Calls in any order, with tables found whole, in part, or not at all."""
    x = rng.standard_normal((4, 50, 32)).astype(np.float32)
    calls = [
        {"offset": offset, "base": base, "rotary_dim": dim}
        for offset in (0, 10, 35, np.array([0, 10, 35, 0]), np.array([0, 10, 35, 1]))
        for base in (10000.0, 9999.0)
        for dim in (32, 16)
    ]
    first = [bits(apply_rotary(x, **options)) for options in calls]
    assert len(set(first)) == len(first)
    for i in rng.integers(0, len(calls), 200):
        length = rng.integers(1, 51)
        expected = np.frombuffer(first[i], np.float32).reshape(x.shape)[:, :length]
        assert bits(apply_rotary(x[:, :length], **calls[i])) == bits(expected)
    # The other precision needs another table.
    assert_rotary(x.astype(np.float64), offset=10)
    assert_rotary(x, offset=10)


def test_tables_too_long_to_keep(rng):
    """Each run of rows computes its part of the table: the same bits as from a cached table."""
    x = rng.standard_normal((2, 17000, 130)).astype(np.float32)
    long = apply_rotary(x, num_threads=2)
    assert bits(long) == bits(apply_rotary(x, num_threads=1))
    assert bits(apply_rotary(x[:, 16000:], offset=16000)) == bits(long[:, 16000:])
    assert_rotary(x[:, 16900:], long[:, 16900:], offset=16900)


def test_memory_stays_flat():
    code = """
    import resource
    import numpy as np
    from fastattn.positions import apply_rotary
    x = np.ones((2000, 64), np.float32)
    for warm in (20, 400):
        for i in range(warm):
            apply_rotary(x, offset=i * 5000)
            apply_rotary(x[None, :7], offset=[i], base=2.0 + i)
            apply_rotary(x, positions=(np.arange(2000) * (i + 7)) % 10007, frequencies=np.full(32, i))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    before, after = map(int, fresh_process.run(code).split())
    assert after - before < 8192, "kilobytes"


def test_concurrent_calls(rng):
    x = rng.standard_normal((4, 200, 64)).astype(np.float32)
    calls = [{"offset": 37 * i} for i in range(4)]
    calls += [{"positions": rng.integers(0, 10 ** (i + 2), 200)} for i in range(4)]
    expected = [bits(apply_rotary(x, **call, num_threads=1)) for call in calls]
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, 8, 60):
            if bits(apply_rotary(x, **calls[i])) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_nan_and_infinity_stay_in_their_pair(rng, interleaved, dtype):
    x = rng.standard_normal((3, 9, 44)).astype(dtype)
    clean = apply_rotary(x, offset=2, rotary_dim=40, interleaved=interleaved)
    bad = x.copy()
    bad[0, 3, 4], bad[1, 8, 39], bad[2, 0, 42] = np.nan, np.inf, np.nan
    result = apply_rotary(bad, offset=2, rotary_dim=40, interleaved=interleaved)
    touched = np.zeros(x.shape, bool)
    for index, channel in (((0, 3), 4), ((1, 8), 39)):
        partner = channel ^ 1 if interleaved else (channel + 20) % 40
        touched[index][[channel, partner]] = True
    assert not np.isfinite(result[touched].astype(np.float32)).any()
    touched[2, 0, 42] = True
    assert np.isnan(result[2, 0, 42])
    np.testing.assert_array_equal(result[~touched], clean[~touched])


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_and_smallest_numbers(dtype):
    info = np.finfo(dtype)
    for number in (info.max, info.tiny, info.smallest_subnormal):
        x = np.array([[number, 0.0], [0.0, number]], dtype=dtype)
        np.testing.assert_array_equal(apply_rotary(x)[0], x[0])
        assert np.isfinite(apply_rotary(x)).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 3, 8), (0, 4, 8), (2, 3, 0, 8)])
def test_rotary_empty(shape):
    for offset in (0, 10**9):
        assert apply_rotary(np.empty(shape, np.float32), offset=offset).shape == shape
    x = np.empty(shape, np.float32)
    assert apply_rotary(x, out=x) is x


def test_rotary_of_no_channels_copies(rng):
    x = rng.standard_normal((5, 7, 9)).astype(np.float32)
    np.testing.assert_array_equal(apply_rotary(x, rotary_dim=0), x)
    assert apply_rotary(x, rotary_dim=0) is not x


def masked():
    return np.ma.masked_array(np.ones((3, 4)), mask=True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"x": np.ones(4)}, ValueError, r"x.*\(4,\).*two axes"),
        ({"x": 1.0}, ValueError, "x"),
        ({"x": np.ones((3, 5))}, ValueError, "odd.*5.*rotary_dim"),
        ({"x": np.ones((3, 4), complex)}, TypeError, "x.*complex"),
        ({"x": np.ones((3, 4), np.longdouble)}, TypeError, "x"),
        ({"x": np.ones((3, 4), ">f4" if np.little_endian else "<f4")}, TypeError, "x.*byte order"),
        ({"x": [["a", "b"]]}, TypeError, "x"),
        ({"x": masked()}, TypeError, "x.*masked"),
        ({"x": [[1.0, 2.0], [3.0]]}, TypeError, "x"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim.*even"),
        ({"rotary_dim": 6}, ValueError, "rotary_dim.*4.*6"),
        ({"rotary_dim": -2}, ValueError, "rotary_dim"),
        ({"rotary_dim": 2.0}, TypeError, "rotary_dim"),
        ({"rotary_dim": True}, TypeError, "rotary_dim"),
        ({"base": 0.0}, ValueError, "base"),
        ({"base": -1}, ValueError, "base"),
        ({"base": math.nan}, ValueError, "base"),
        ({"base": None}, TypeError, "base"),
        ({"interleaved": 1}, TypeError, "interleaved"),
        ({"interleaved": None}, TypeError, "interleaved"),
        ({"offset": 1.0}, TypeError, "offset"),
        ({"offset": True}, TypeError, "offset"),
        ({"offset": None}, TypeError, "offset"),
        ({"offset": 2**53 + 1}, ValueError, "offset.*9007199254740992"),
        ({"offset": -(2**70)}, ValueError, "offset"),
        ({"offset": [1, 2]}, ValueError, "offset"),
        ({"offset": np.zeros((2, 3)), "x": np.ones((2, 3, 5, 4))}, TypeError, "offset"),
        ({"offset": np.zeros(2, int), "x": np.ones((2, 3, 5, 4))}, ValueError, r"offset\[:, None\]"),
        ({"offset": np.zeros((2, 2), int), "x": np.ones((2, 3, 5, 4))}, ValueError, r"\(2, 3\)"),
        ({"offset": [2**60], "x": np.ones((1, 5, 4))}, ValueError, "offset"),
        ({"num_threads": 0}, ValueError, "num_threads"),
        ({"num_threads": 1.5}, TypeError, "num_threads"),
        ({"out": np.zeros((4, 3))}, ValueError, "out"),
        ({"out": np.zeros((3, 4), np.float32)}, TypeError, "out"),
        ({"out": [[0.0]]}, TypeError, "out"),
        ({"out": np.broadcast_to(np.zeros(4), (3, 4))}, ValueError, "read-only"),
        ({"out": np.lib.stride_tricks.as_strided(np.zeros(6), (3, 4), (8, 8))}, ValueError, "overlaps itself"),
    ],
)
def test_rotary_errors(options, error, words):
    with pytest.raises(error, match=words):
        apply_rotary(options.pop("x", np.ones((3, 4))), **options)


def test_rotary_out_must_not_overlap(rng):
    memory = rng.standard_normal(200)
    before = memory.copy()
    x = memory[:80].reshape(10, 8)
    for out in (memory[8:88].reshape(10, 8), memory[4:84].reshape(10, 8), x[::-1], x[:, ::-1]):
        with pytest.raises(ValueError, match="out overlaps x"):
            apply_rotary(x, out=out)
    whole = np.zeros((10, 2), np.int64)
    with pytest.raises(ValueError, match="out overlaps x"):
        apply_rotary(whole, out=whole.view(np.float64))
    offset = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="out overlaps offset"):
        apply_rotary(np.ones((1, 1, 2), np.float32), offset=offset, out=offset.view(np.float32).reshape(1, 1, 2))
    np.testing.assert_array_equal(memory, before)
    assert apply_rotary(x, out=memory[80:160].reshape(10, 8)).base is not None
    assert bits(apply_rotary(x, out=x[:])) == bits(memory[80:160])


def test_rotary_of_a_memory_map_in_place(rng, tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(5, 8))
    x[...] = rng.standard_normal(x.shape)
    expected = apply_rotary(x, offset=4)
    assert apply_rotary(x, offset=4, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_nothing_outside_is_written(rng):
    for shape in ((7, 30), (1, 2), (5, 34), (3, 126)):
        for dtype in ALL_DTYPES:
            frame = np.full((shape[0] + 2, shape[1] + 8), 7, dtype)
            inner = frame[1:-1, 4:-4]
            for interleaved in (False, True):
                apply_rotary(rng.standard_normal(shape).astype(dtype), out=inner, interleaved=interleaved)
            inner[...] = 7
            assert (frame == 7).all()


def test_rotary_and_attention_of_a_decoding_step(rng):
    """A query that is rotated on its own, at its position, attends as it does within the whole sequence."""
    query, key, value = rng.standard_normal((3, 2, 4, 12, 16))
    whole = fastattn.dot_product_attention(apply_rotary(query), apply_rotary(key), value, is_causal=True)
    last = apply_rotary(query[..., 11:, :], offset=np.full((2, 1), 11))
    step = fastattn.dot_product_attention(last, apply_rotary(key), value, is_causal=True)
    np.testing.assert_allclose(step, whole[..., 11:, :], rtol=0, atol=1e-13)


def test_the_check_can_fail(rng):
    class Swapped:
        @staticmethod
        def apply_rotary(x, offset=0, **options):
            return reference.apply_rotary(x, offset=-np.asarray(offset), **options)

    class Slow:
        @staticmethod
        def apply_rotary(x, base=10000.0, **options):
            return reference.apply_rotary(x, base=base * (1 + 1e-4), **options)

    x = rng.standard_normal((4, 30, 16)).astype(np.float32)
    for wrong in (Swapped, Slow):
        with pytest.raises(AssertionError):
            assert_rotary(x, offset=3, reference=wrong)


# Positions, frequencies, attention factor


def scattered(rng, shape):
    return rng.integers(-(10**6), 10**6, shape)


POSITIONS = {
    "in order": lambda rng, length: np.arange(length) + 5,
    "packed": lambda rng, length: np.arange(length) % 7,
    "backwards": lambda rng, length: np.arange(length)[::-1],
    "shuffled": lambda rng, length: rng.permutation(length) - 3,
    "all equal": lambda rng, length: np.full(length, 11),
    "scattered": lambda rng, length: scattered(rng, length),
    "a number": lambda rng, length: 4,
    "one for all rows": lambda rng, length: np.array([4]),
    "by sequence": lambda rng, length: (np.arange(length) + np.array([0, 40, -7])[:, None])[:, None],
    "by sequence, scattered": lambda rng, length: scattered(rng, (3, 1, length)),
    "by head": lambda rng, length: np.arange(length) + 2 * np.arange(2)[:, None],
    "one a head": lambda rng, length: np.array([[3], [9]]),
    "by all": lambda rng, length: rng.integers(0, 50, (3, 2, length)),
    "the same for all": lambda rng, length: np.broadcast_to(np.arange(length), (3, 2, length)),
}


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("how", POSITIONS)
def test_positions_against_reference(rng, how, dtype):
    for length in (1, 2, 19, 70):
        x = rng.standard_normal((3, 2, length, 26)).astype(dtype)
        positions = POSITIONS[how](rng, length)
        for interleaved in (False, True):
            assert_rotary(x, positions=positions, interleaved=interleaved, rotary_dim=22)


@pytest.mark.parametrize("how", POSITIONS)
def test_a_position_gives_the_bits_of_the_same_offset(rng, how):
    """However it is given, whichever rows are beside it, and whichever tables are cached."""
    x = rng.standard_normal((3, 2, 40, 32)).astype(np.float32)
    positions = POSITIONS[how](rng, 40)
    expected = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        at = int(np.broadcast_to(positions, x.shape[:-1])[index])
        expected[index] = apply_rotary(x[index][None], offset=at)[0]
    for before in (None, {"offset": -100}, {"positions": np.arange(40)[::-1] - 20}, {"positions": positions}):
        if before is not None:
            apply_rotary(np.ones((3, 2, 200 if "offset" in before else 40, 32), np.float32), **before)
        for num_threads in (1, 3):
            assert bits(apply_rotary(x, positions=positions, num_threads=num_threads)) == bits(expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_positions_of_any_integer_dtype(rng, dtype):
    x = rng.standard_normal((2, 9, 8))
    expected = bits(apply_rotary(x, offset=3))
    positions = np.arange(3, 12, dtype=dtype)
    assert bits(apply_rotary(x, positions=positions)) == expected
    assert bits(apply_rotary(x, positions=positions.tolist())) == expected
    for layout, other in layouts(np.arange(3, 12, dtype=dtype)[:, None]):
        assert bits(apply_rotary(x, positions=other[:, 0])) == expected, layout


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_positions_whatever_the_layout_and_in_place(rng, dtype):
    x = rng.standard_normal((3, 2, 19, 26)).astype(dtype)
    for positions in (rng.integers(0, 30, (3, 1, 19)), scattered(rng, (2, 19))):
        options = {"positions": positions, "attention_factor": 1.25, "frequencies": rng.standard_normal(11)}
        options["rotary_dim"] = 22
        expected = bits(apply_rotary(x, **options))
        assert_rotary(x, **options)
        for layout, other in layouts(x):
            assert bits(apply_rotary(other, **options)) == expected, layout
            if other.flags.writeable:
                assert apply_rotary(other, out=other, **options) is other
                assert bits(other) == expected, f"in place, {layout}"


def test_positions_in_tables_too_long_to_keep(rng):
    x = rng.standard_normal((2, 17000, 130)).astype(np.float32)
    positions = rng.permutation(17000)
    whole = apply_rotary(x, positions=positions, num_threads=2)
    assert bits(whole) == bits(apply_rotary(x, positions=positions, num_threads=1))
    assert bits(whole) == bits(apply_rotary(x[:, np.argsort(positions)])[:, positions])


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()[:1]])
def test_positions_of_many_rows_in_any_order(rng, dtype):
    """Rows of a cached table are gathered, for many heads and threads."""
    x = rng.standard_normal((2, 9, 1100, 130)).astype(dtype)
    positions = rng.permutation(1100)
    expected = bits(apply_rotary(x[:, :, np.argsort(positions)], offset=5)[:, :, positions])
    for num_threads in (1, 2, 5):
        assert bits(apply_rotary(x, positions=positions + 5, num_threads=num_threads)) == expected
    both = np.stack([positions, positions[::-1]])[:, None]
    by_sequence = apply_rotary(x, positions=both + 5)
    assert bits(by_sequence[0]) == bits(np.frombuffer(expected, dtype).reshape(x.shape)[0])
    assert bits(by_sequence[1]) == bits(apply_rotary(x[1], positions=positions[::-1] + 5))


def test_far_and_near_positions_in_one_call():
    x = np.array([[1.0, 0.0]] * 7)
    positions = np.array([0, -1, 10**6, 1647099, -(2**31), 2**53, -(2**53)])
    result = apply_rotary(x, positions=positions)
    expected = [[math.cos(p), math.sin(p)] for p in positions.tolist()]
    np.testing.assert_allclose(result, expected, rtol=0, atol=2**-52)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_cosines_and_sines_are_right_to_the_last_digit(rng, factor, dtype):
    """Of small and large angles, near multiples of a quarter turn, and where the C library takes over."""
    quarters = np.arange(-40, 41) * (math.pi / 2)
    edge = 1647099.0
    angles = np.concatenate(
        [
            quarters,
            np.nextafter(quarters, 9e9),
            quarters + 1e-9,
            math.pi / 4 * np.arange(1, 60, 2),
            2.0 ** np.arange(-60, 40),
            edge + np.array([-1.0, -0.5, 0.0, 0.5, 1.0]),
            -edge + np.array([-1.0, -0.5, 0.0, 0.5, 1.0]),
            rng.uniform(-edge, edge, 4001),
            rng.uniform(-100, 100, 4001),
        ]
    )
    x = np.concatenate([np.ones((1, len(angles))), np.zeros((1, len(angles)))], axis=1).astype(dtype)
    turned = apply_rotary(x, positions=[1], frequencies=angles, attention_factor=factor)[0]
    exact = np.concatenate([np.cos(angles.astype(np.longdouble)), np.sin(angles.astype(np.longdouble))]) * factor
    # One rounding of the factor's product in double, one of the result.
    assert np.max(np.abs(turned - exact)) <= factor * (2**-52 + 2 * eps_of(dtype))
    assert_rotary(x, frequencies=angles, positions=[3])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_frequencies_and_factor_against_reference(rng, interleaved, dtype):
    x = rng.standard_normal((2, 3, 33, 44)).astype(dtype)
    for pairs in (0, 1, 7, 16, 22):
        frequencies = rng.standard_normal(pairs)
        options = {"frequencies": frequencies, "rotary_dim": 2 * pairs, "interleaved": interleaved}
        for more in ({}, {"attention_factor": 0.7}, {"attention_factor": 1.2, "offset": -9}, {"offset": [[1] * 3] * 2}):
            assert_rotary(x, **options, **more)
            rest = apply_rotary(x, **options, **more)[..., 2 * pairs :]
            np.testing.assert_array_equal(rest, x[..., 2 * pairs :])


def test_frequencies_of_a_base_are_that_base(rng):
    x = rng.standard_normal((2, 9, 64)).astype(np.float32)
    for base in (10000.0, 77.0):
        frequencies = [base ** (-i / 32) for i in range(32)]
        expected = bits(apply_rotary(x, base=base, offset=4))
        assert bits(apply_rotary(x, frequencies=frequencies, offset=4)) == expected
        assert bits(apply_rotary(x, frequencies=rotary_frequencies(64, base=base)[0], offset=4)) == expected


def test_kept_tables_know_frequencies_and_factor(rng):
    x = rng.standard_normal((50, 32)).astype(np.float32)
    one, other = rng.standard_normal((2, 16))
    calls = [
        {"offset": offset} | speeds | factor
        for offset in (0, 10)
        for speeds in ({}, {"base": 9.0}, {"frequencies": one}, {"frequencies": other})
        for factor in ({}, {"attention_factor": 1.5})
    ]
    first = [bits(apply_rotary(x, **options)) for options in calls]
    assert len(set(first)) == len(first)
    for i in rng.integers(0, len(calls), 100):
        assert bits(apply_rotary(x, **calls[i])) == first[i]
    changed = one.copy()
    before = bits(apply_rotary(x, frequencies=changed))
    changed[3] += 1
    assert bits(apply_rotary(x, frequencies=changed)) != before


@pytest.mark.parametrize("dtype", [np.float32, np.int64, *sixteen_bits()])
def test_frequencies_of_other_dtypes(rng, dtype):
    x = rng.standard_normal((4, 6))
    frequencies = np.array([3, 1, 0]).astype(dtype)
    expected = bits(apply_rotary(x, frequencies=[3.0, 1.0, 0.0]))
    assert bits(apply_rotary(x, frequencies=frequencies)) == expected
    assert bits(apply_rotary(x, frequencies=frequencies[::-1].copy()[::-1])) == expected


def test_sections_of_pairs_by_several_calls(rng):
    """M-RoPE: pairs are rotated by time, height and width. A frequency of 0 leaves a pair unchanged, bit for bit."""
    x = rng.standard_normal((2, 4, 30, 32)).astype(np.float32)
    positions = rng.integers(0, 40, (3, 2, 1, 30))
    frequencies = rotary_frequencies(32)[0]
    section = np.repeat([0, 1, 2], [4, 6, 6])
    turned = x.copy()
    for which in range(3):
        of_this = np.where(section == which, frequencies, 0.0)
        before = turned.copy()
        apply_rotary(turned, positions=positions[which], frequencies=of_this, out=turned)
        others = np.tile(section != which, 2)
        assert bits(turned[..., others]) == bits(before[..., others])
    angle = positions[section].transpose(1, 2, 3, 0) * frequencies
    first, second = x[..., :16].astype(np.float64), x[..., 16:].astype(np.float64)
    expected = np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
    )
    np.testing.assert_allclose(turned, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 3, 8), (0, 4, 8), (2, 3, 0, 8)])
def test_positions_of_nothing(shape):
    x = np.empty(shape, np.float32)
    assert apply_rotary(x, positions=np.zeros(shape[:-1], int)).shape == shape
    assert apply_rotary(x, positions=7, frequencies=np.ones(shape[-1] // 2)).shape == shape
    if shape[-2] == 0:
        assert apply_rotary(x, positions=[]).shape == shape


def test_positions_and_frequencies_are_left_alone(rng):
    x, positions, frequencies = rng.standard_normal((2, 9, 16)), np.arange(9), rng.standard_normal(8)
    before = positions.copy(), frequencies.copy()
    for array in (positions, frequencies):
        array.flags.writeable = False
    apply_rotary(x, positions=positions, frequencies=frequencies)
    np.testing.assert_array_equal(positions, before[0])
    np.testing.assert_array_equal(frequencies, before[1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"positions": [0, 1, 2], "offset": 1}, ValueError, "offset and positions"),
        ({"positions": [0, 1, 2], "offset": [0, 0]}, ValueError, "offset and positions"),
        ({"positions": [0, 1]}, ValueError, r"positions has shape \(2,\).*\(2, 3\)"),
        ({"positions": np.zeros((1, 2, 3), int)}, ValueError, r"positions has shape \(1, 2, 3\)"),
        ({"positions": np.zeros((2, 3, 1), int)}, ValueError, "positions has shape"),
        ({"positions": np.zeros((3, 5), int), "x": np.ones((3, 2, 5, 4))}, ValueError, r"positions\[:, None\]"),
        ({"positions": [0.0, 1.0, 2.0]}, TypeError, "positions must be integers"),
        ({"positions": [True, False, True]}, TypeError, "positions must be integers"),
        ({"positions": "abc"}, TypeError, "positions must be integers"),
        ({"positions": [[0], [1, 2]]}, TypeError, "positions"),
        ({"positions": np.arange(3, dtype=">i8" if np.little_endian else "<i8")}, TypeError, "positions"),
        ({"positions": np.ma.masked_array([0, 1, 2], mask=True)}, TypeError, "positions.*masked"),
        ({"positions": [0, 1, 2**53 + 1]}, ValueError, "positions.*9007199254740992.*9007199254740993"),
        ({"positions": [0, 1, -(2**53) - 1]}, ValueError, "positions.*-9007199254740993"),
        ({"positions": np.array([0, 1, 2**64 - 5], np.uint64)}, ValueError, "positions.*18446744073709551611"),
        ({"positions": [0, 1, 2**70]}, TypeError, "positions"),
        ({"frequencies": [1.0, 1.0], "base": 500.0}, ValueError, "base=500.0 and frequencies"),
        ({"frequencies": [1.0]}, ValueError, r"frequencies has shape \(1,\).*\(2,\).*rotary_dim"),
        ({"frequencies": [[1.0, 1.0]]}, ValueError, "frequencies has shape"),
        ({"frequencies": 1.0}, ValueError, "frequencies has shape"),
        ({"frequencies": [1.0, 1.0], "rotary_dim": 2}, ValueError, r"frequencies.*\(1,\)"),
        ({"frequencies": [1.0, math.nan]}, ValueError, "frequencies must hold finite.*number 1 is nan"),
        ({"frequencies": [math.inf, 1.0]}, ValueError, "frequencies must hold finite"),
        ({"frequencies": [1e300, 1.0]}, ValueError, "frequencies must hold finite"),
        ({"frequencies": [1j, 1.0]}, TypeError, "frequencies.*complex"),
        ({"frequencies": ["a", "b"]}, TypeError, "frequencies"),
        ({"attention_factor": 0.0}, ValueError, "attention_factor"),
        ({"attention_factor": -1.5}, ValueError, "attention_factor"),
        ({"attention_factor": math.nan}, ValueError, "attention_factor"),
        ({"attention_factor": math.inf}, ValueError, "attention_factor"),
        ({"attention_factor": "1"}, TypeError, "attention_factor"),
        ({"attention_factor": None}, TypeError, "attention_factor"),
        ({"attention_factor": True}, TypeError, "attention_factor"),
    ],
)
def test_position_errors_write_nothing(options, error, words):
    x = options.pop("x", np.ones((2, 3, 4)))
    out = np.full(x.shape, 7.0)
    with pytest.raises(error, match=words):
        apply_rotary(x, out=out, **options)
    assert (out == 7).all()


def test_rotary_out_must_not_overlap_positions_or_frequencies():
    positions = np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="out overlaps positions"):
        apply_rotary(np.ones((2, 4), np.float32), positions=positions[:2], out=positions.view(np.float32).reshape(2, 4))
    frequencies = np.zeros(4)
    with pytest.raises(ValueError, match="out overlaps frequencies"):
        apply_rotary(np.ones((1, 4)), frequencies=frequencies[:2], out=frequencies[None])


# Frequencies of models


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_as_published(name):
    (dim, base, scaling, length, max_positions), count, some, attention_factor = PUBLISHED[name]
    before = repr(scaling)
    frequencies, factor = rotary_frequencies(
        dim, base=base, scaling=scaling, length=length, max_positions=max_positions
    )
    assert repr(scaling) == before
    assert frequencies.dtype == np.float64
    assert frequencies.shape == (count,)
    # Those are float32; for weighted means, weights near 0 and 1 lose some digits.
    np.testing.assert_allclose(frequencies[list(some)], list(some.values()), rtol=4e-6)
    assert type(factor) is float
    assert factor == pytest.approx(attention_factor, rel=1e-14)


@pytest.mark.parametrize("dim", [4, 6, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000])
def test_frequencies_against_reference(rng, dim, base):
    many = {"short_factor": rng.uniform(1, 2, dim // 2), "long_factor": rng.uniform(1, 60, dim // 2).tolist()}
    turns = {"low_freq_factor": 1, "high_freq_factor": 4}
    length_of = {"original_max_position_embeddings": 4096}
    for scaling in (
        None,
        {},
        {"rope_type": "default", "rope_theta": 300.0},
        {"rope_type": "linear", "factor": 3},
        {"rope_type": "linear", "factor": 0.5, "partial_rotary_factor": 1.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0} | length_of,
        {"rope_type": "llama3", "factor": 8.0} | turns | length_of,
        {"rope_type": "llama3", "factor": 8.0} | turns,
        {"rope_type": "yarn", "factor": 8.0} | length_of,
        {"rope_type": "yarn"} | length_of,
        {"rope_type": "yarn", "factor": 0.5, "truncate": False} | length_of,
        {"rope_type": "yarn", "factor": 5, "mscale": 0.7, "mscale_all_dim": 0, "beta_fast": 20, "beta_slow": 3},
        {"rope_type": "yarn", "factor": 5, "mscale": 0.7, "mscale_all_dim": 0.4} | length_of,
        {"rope_type": "longrope"} | many | length_of,
        {"rope_type": "longrope", "factor": 32.0} | many,
        {"rope_type": "longrope", "factor": 0.5} | many | length_of,
    ):
        for length in (1, 4096, 5000, 10**6):
            options = {"base": base, "scaling": scaling, "length": length, "max_positions": 16384}
            ours, theirs = rotary_frequencies(dim, **options), reference.rotary_frequencies(dim, **options)
            np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-13)
            assert ours[1] == pytest.approx(theirs[1], rel=1e-14)


def test_what_the_dict_says_wins():
    plain = rotary_frequencies(16, base=500.0)[0]
    np.testing.assert_array_equal(rotary_frequencies(16, scaling={"rope_theta": 500.0})[0], plain)
    np.testing.assert_array_equal(rotary_frequencies(16, base=9.0, scaling={"rope_theta": 500})[0], plain)
    half = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    np.testing.assert_array_equal(rotary_frequencies(32, scaling=half)[0], plain)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    far = rotary_frequencies(16, scaling=yarn, max_positions=99999)
    np.testing.assert_array_equal(rotary_frequencies(16, scaling=yarn)[0], far[0])


def test_older_names_and_keys_without_a_value():
    linear = {"rope_type": "linear", "factor": 4.0}
    expected = rotary_frequencies(16, scaling=linear)[0]
    for scaling in (
        {"type": "linear", "factor": 4.0},
        {"type": "yarn", "rope_type": "linear", "factor": np.float32(4)},
        linear | {"attention_factor": None, "mystery": None, "rope_theta": None, "partial_rotary_factor": None},
    ):
        np.testing.assert_array_equal(rotary_frequencies(16, scaling=scaling)[0], expected)
    lists = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 4096}
    for length in (None, 5000):
        su, longrope = (
            rotary_frequencies(12, scaling={"type": kind} | lists, length=length, max_positions=131072)
            for kind in ("su", "longrope")
        )
        np.testing.assert_array_equal(su[0], longrope[0])
        assert su[1] == longrope[1]


def test_no_channels_have_no_frequencies():
    assert rotary_frequencies(0)[0].shape == (0,)
    assert apply_rotary(np.ones((3, 4)), rotary_dim=0, frequencies=rotary_frequencies(0)[0]).shape == (3, 4)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 4.0}


def without(scaling, key):
    return {name: x for name, x in scaling.items() if name != key}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dim": 5}, ValueError, "dim must be even, not 5"),
        ({"dim": -2}, ValueError, "dim"),
        ({"dim": 4.0}, TypeError, "dim"),
        ({"dim": True}, TypeError, "dim"),
        ({"base": 0}, ValueError, "base"),
        ({"base": math.inf}, ValueError, "base"),
        ({"base": "1"}, TypeError, "base"),
        ({"length": -1}, ValueError, "length"),
        ({"length": 9.5}, TypeError, "length"),
        ({"max_positions": 1}, ValueError, "max_positions"),
        ({"max_positions": "4096"}, TypeError, "max_positions"),
        ({"scaling": "linear"}, TypeError, "scaling must be the dict.*str"),
        ({"scaling": [("factor", 2.0)]}, TypeError, "scaling must be the dict"),
        ({"scaling": {"rope_type": "ntk-by-parts"}}, ValueError, "'ntk-by-parts'; known are default, linear, dynamic"),
        ({"scaling": {"rope_type": 3}}, ValueError, "rope_type 3; known are"),
        ({"scaling": {"factor": 2.0}}, ValueError, "'factor' and no 'rope_type'"),
        ({"scaling": {"full_attention": {}, "sliding_attention": {}}}, ValueError, "'full_attention', 'sliding"),
        ({"scaling": YARN | {"mrope_section": [2, 2, 2]}}, ValueError, "the key 'mrope_section', which is not known"),
        ({"scaling": {"rope_type": "linear"}}, ValueError, "'linear' lacks 'factor'"),
        ({"scaling": {"rope_type": "linear", "factor": 0}}, ValueError, r"scaling\['factor'\] must be a positive"),
        ({"scaling": {"rope_type": "linear", "factor": "2"}}, TypeError, r"scaling\['factor'\]"),
        ({"scaling": {"rope_type": "linear", "factor": True}}, TypeError, r"scaling\['factor'\]"),
        ({"scaling": {"rope_theta": math.nan}}, ValueError, r"scaling\['rope_theta'\]"),
        ({"scaling": {"rope_theta": 10**400}}, ValueError, r"scaling\['rope_theta'\]"),
        ({"scaling": {"partial_rotary_factor": 1.5}}, ValueError, "partial_rotary_factor"),
        ({"scaling": {"partial_rotary_factor": 0.25}}, ValueError, r"partial_rotary_factor'\]=0.25.*3 of dim=12"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2.0}, "length": 9}, ValueError, "max_position_embeddings"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_positions": 9}, ValueError, "length is needed"),
        (
            {"dim": 2, "scaling": {"rope_type": "dynamic", "factor": 2.0}, "length": 9, "max_positions": 4},
            ValueError,
            "at least 4 channels",
        ),
        (
            {"scaling": {"rope_type": "dynamic", "factor": 1e300}, "length": 2**60, "max_positions": 4},
            ValueError,
            "range of float64",
        ),
        ({"scaling": without(LLAMA3, "factor")}, ValueError, "'llama3' lacks 'factor'"),
        (
            {"scaling": without(without(LLAMA3, "low_freq_factor"), "high_freq_factor")},
            ValueError,
            "lacks 'low_freq_factor' and 'high_freq_factor'",
        ),
        ({"scaling": without(LLAMA3, "original_max_position_embeddings")}, ValueError, "lacks 'original_max"),
        ({"scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ValueError, "high_freq_factor"),
        ({"scaling": LLAMA3 | {"original_max_position_embeddings": 1}}, ValueError, "greater than 1"),
        ({"scaling": without(YARN, "factor")}, ValueError, "'yarn' lacks 'factor', or both"),
        ({"scaling": without(YARN, "original_max_position_embeddings")}, ValueError, "lacks 'original_max"),
        ({"scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, ValueError, "'beta_fast' that is at least"),
        ({"scaling": YARN | {"beta_fast": 0}}, ValueError, "beta_fast"),
        ({"scaling": YARN | {"truncate": 1}}, TypeError, "truncate"),
        ({"scaling": YARN | {"attention_factor": -1.0}}, ValueError, "attention_factor"),
        ({"scaling": YARN | {"mscale": "1"}}, TypeError, "mscale"),
        ({"scaling": YARN, "base": 1.0}, ValueError, "base above 1"),
        ({"scaling": without(LONGROPE, "long_factor"), "max_positions": 9}, ValueError, "lacks 'long_factor'"),
        ({"scaling": LONGROPE | {"short_factor": [1.0]}, "max_positions": 9}, ValueError, "has 1 numbers.* have 6"),
        ({"scaling": LONGROPE | {"short_factor": 1.0}, "max_positions": 9}, TypeError, "list of 6 numbers"),
        (
            {"scaling": LONGROPE | {"long_factor": [1.0] * 5 + [0.0]}, "max_positions": 9},
            ValueError,
            r"scaling\['long_factor'\]\[5\] must be a positive",
        ),
        ({"scaling": LONGROPE}, ValueError, "lacks 'original_max_position_embeddings'"),
        ({"scaling": without(LONGROPE, "factor"), "max_positions": 4096}, ValueError, "lacks 'factor', or both"),
    ],
)
def test_frequency_errors(options, error, words):
    with pytest.raises(error, match=words):
        rotary_frequencies(**{"dim": 12, **options})


# ALiBi slopes


def test_slopes_of_powers_of_two():
    np.testing.assert_array_equal(alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_array_equal(alibi_slopes(1), [1 / 256])
    np.testing.assert_array_equal(alibi_slopes(2), [1 / 16, 1 / 256])
    np.testing.assert_array_equal(alibi_slopes(4), [1 / 4, 1 / 16, 1 / 64, 1 / 256])
    np.testing.assert_allclose(alibi_slopes(16), 2 ** (-np.arange(1, 17) / 2), rtol=2**-52)
    assert alibi_slopes(16)[0] == pytest.approx(1 / math.sqrt(2))


def test_slopes_of_other_numbers():
    """What the authors' code gives for 12 heads: those of 8, and four of those of 16."""
    expected = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    expected += [0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849]
    np.testing.assert_allclose(alibi_slopes(12), expected, rtol=1e-14)
    np.testing.assert_array_equal(alibi_slopes(3), [1 / 16, 1 / 256, 1 / 4])
    np.testing.assert_array_equal(alibi_slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])


def test_slopes_against_reference():
    for num_heads in (*range(1, 140), 1000, 1024, 1025):
        slopes = alibi_slopes(num_heads)
        assert slopes.shape == (num_heads,)
        assert slopes.dtype == np.float64
        assert len(set(slopes)) == num_heads
        np.testing.assert_allclose(slopes, reference.alibi_slopes(num_heads), rtol=1e-11)
    assert (alibi_slopes(np.int32(5)) == alibi_slopes(5)).all()


@pytest.mark.parametrize(
    ("num_heads", "error"), [(0, ValueError), (-8, ValueError), (8.0, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_slopes_errors(num_heads, error):
    with pytest.raises(error, match="num_heads"):
        alibi_slopes(num_heads)


# Relative buckets


def test_buckets_as_published():
    """What Hugging Face's T5 gives for distances around the edges of its buckets."""
    distances = [0, 1, 7, 8, 9, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 1000]
    encoder = [0, 1, 7, 8, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15]
    row = relative_position_buckets(1, 2001, query_offset=1000)[0]
    np.testing.assert_array_equal(row[[1000 - d for d in distances]], encoder)
    np.testing.assert_array_equal(row[[1000 + d for d in distances[1:]]], np.add(encoder[1:], 16))
    decoder = [0, 1, 7, 8, 9, 11, 12, 15, 16, 18, 18, 21, 21, 23, 24, 26, 26, 29, 29, 31, 31, 31]
    row = relative_position_buckets(1, 2001, query_offset=1000, bidirectional=False)[0]
    np.testing.assert_array_equal(row[[1000 - d for d in distances]], decoder)
    assert (row[1000:] == 0).all()


def test_buckets_of_a_small_matrix():
    expected = [[0, 17, 18, 19], [1, 0, 17, 18], [2, 1, 0, 17], [3, 2, 1, 0]]
    np.testing.assert_array_equal(relative_position_buckets(4, 4), expected)
    np.testing.assert_array_equal(relative_position_buckets(2, 4), expected[2:])
    np.testing.assert_array_equal(relative_position_buckets(4, 4, bidirectional=False), np.tril(expected))


@pytest.mark.parametrize(
    ("num_buckets", "max_distance", "bidirectional"),
    [
        (buckets, distance, both)
        for buckets in (4, 7, 16, 32, 33, 64, 320)
        for distance in (128, 165, 256, 800, 1000)
        for both in (True, False)
        if distance > buckets // (4 if both else 2)
    ],
)
def test_buckets_against_reference(num_buckets, max_distance, bidirectional):
    options = {"num_buckets": num_buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    for length, keys, offset in ((1, 2500, 1250), (30, 20, None), (20, 300, -100), (7, 9, 10**6)):
        ours = relative_position_buckets(length, keys, query_offset=offset, **options)
        theirs = reference.relative_position_buckets(length, keys, query_offset=offset, **options)
        assert ours.shape == (length, keys)
        assert ours.dtype == np.int64
        assert ours.flags.writeable
        np.testing.assert_array_equal(ours, theirs)
        assert ours.min() >= 0
        assert ours.max() < num_buckets


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_buckets_empty(shape):
    assert relative_position_buckets(*shape).shape == shape


def test_buckets_in_a_window(rng):
    """The buckets of one query's window are the bias of all, as the docstring says."""
    table = rng.standard_normal((32, 3))
    query, key, value = rng.standard_normal((3, 3, 40, 8))
    for left, right in ((0, 0), (9, 0), (12, 30), (100, 100)):
        bias = np.moveaxis(table[relative_position_buckets(40, 40)], -1, 0)
        narrow = np.moveaxis(table[relative_position_buckets(1, left + right + 1, query_offset=left)], -1, 0)
        window = {"window_size": (left, right)}
        np.testing.assert_allclose(
            fastattn.dot_product_attention(query, key, value, relative_bias=narrow, **window),
            fastattn.dot_product_attention(query, key, value, bias=bias, **window),
            rtol=1e-12,
            atol=1e-14,
        )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query_length": -1}, ValueError, "query_length"),
        ({"key_length": 1.0}, TypeError, "key_length"),
        ({"num_buckets": 3}, ValueError, "num_buckets"),
        ({"num_buckets": 1, "bidirectional": False}, ValueError, "num_buckets"),
        ({"num_buckets": 32.0}, TypeError, "num_buckets"),
        ({"max_distance": 8}, ValueError, "max_distance"),
        ({"max_distance": 16, "bidirectional": False}, ValueError, "max_distance"),
        ({"max_distance": None}, TypeError, "max_distance"),
        ({"bidirectional": 1}, TypeError, "bidirectional"),
        ({"query_offset": 0.0}, TypeError, "query_offset"),
        ({"query_offset": 2**54}, ValueError, "query_offset"),
        ({"query_length": 2**50, "key_length": 2**50}, MemoryError, "memory"),
    ],
)
def test_buckets_errors(options, error, words):
    with pytest.raises(error, match=words):
        relative_position_buckets(**{"query_length": 3, "key_length": 3, **options})


def test_a_learned_table_is_a_plain_array(rng):
    """Learned absolute positions need no function: rows of the table are added."""
    table, x = rng.standard_normal((100, 8)), rng.standard_normal((2, 5, 8))
    np.testing.assert_array_equal((x + table[10:15])[1, 3], x[1, 3] + table[13])
