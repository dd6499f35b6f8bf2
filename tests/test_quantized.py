"""Keys and values in 8 bits: what quantize_kv stores, how far it is from what it was given, attention over it, and rows
of llama.cpp."""

import importlib.util
import tracemalloc

import numpy as np
import pytest
from problems import bits, layouts, sixteen_bits

import fastattn
from fastattn import QuantizedKV, from_llama_cpp, quantize_kv, reference

SCALE_DTYPES = (np.float32, *sixteen_bits())
EPS = 2.0**-23


def normal(rng, *shape, dtype=np.float32, size=1.0):
    return (size * rng.standard_normal(shape)).astype(dtype)


def wide(a):
    return np.asarray(a).astype(np.float64)


def repeated(scale, channels):
    """A number for each channel."""
    return np.repeat(wide(scale), channels // scale.shape[-1], axis=-1) if channels else wide(scale)[..., :0]


def check_bounds(x, numbers, scale, center=None):
    """Each number within half a scale, and float32's roundings of the number, of its difference from the center, of
    their quotient (of at most 127.5) and in the end of what it means."""
    assert numbers.dtype == np.int8 and (numbers >= -127).all()
    center = 0.0 if center is None else wide(center)
    scales, x = repeated(scale, x.shape[-1]), wide(x)
    error = abs(x - (numbers * scales + center))
    rounding = EPS * (abs(x) + abs(center) + abs(x - center))
    assert (error <= scales * (0.5 + 127.5 * EPS) + rounding).all()


# ------------------------------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("block", [None, 32, 8, 1])
@pytest.mark.parametrize("shape", [(37, 64), (2, 3, 5, 64), (2, 0, 64), (0, 3, 32), (1, 32), (3, 96)])
def test_against_the_reference(rng, shape, block, scale_dtype, dtype):
    """The same scales, and the same numbers but where float64 decides a near tie otherwise."""
    key, value = normal(rng, *shape, dtype=dtype), normal(rng, *shape[:-1], 2 * shape[-1], dtype=dtype, size=3.0)
    found = quantize_kv(key, value, block=block, scale_dtype=scale_dtype)
    expected = QuantizedKV(*reference.quantize_kv(key, value, block=block, scale_dtype=scale_dtype))
    assert isinstance(found, QuantizedKV) and found.key_center is None
    for x, numbers, scale, its_numbers, its_scale in (
        (key, found.key, found.key_scale, expected.key, expected.key_scale),
        (value, found.value, found.value_scale, expected.value, expected.value_scale),
    ):
        assert numbers.shape == x.shape
        assert scale.dtype == scale_dtype and scale.shape == (*x.shape[:-1], x.shape[-1] // (block or x.shape[-1]))
        one = np.finfo(np.float32).eps if scale_dtype == np.float32 else 2.0**-7
        np.testing.assert_allclose(wide(scale), wide(its_scale), rtol=one)
        off = abs(numbers.astype(int) - its_numbers)
        assert not off.size or (off.max() <= 1 and (off != 0).mean() < 0.02)
        check_bounds(x, numbers, scale)


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()])
def test_numbers_are_these(rng, dtype):
    """Bit by bit what float32 gives in NumPy: scale, quotient, half to even."""
    key = normal(rng, 3, 50, 40, dtype=dtype)
    quantized = quantize_kv(key, key[..., :17])
    for x, numbers, scale in ((key, quantized.key, quantized.key_scale), (key[..., :17], *quantized[1::2][:2])):
        a = x.astype(np.float32)
        np.testing.assert_array_equal(scale, abs(a).max(-1, keepdims=True) / np.float32(127))
        np.testing.assert_array_equal(numbers, np.rint(a / scale))


def test_halves_go_to_even():
    key = np.float32([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -2.5]])
    quantized = quantize_kv(key, key)
    assert quantized.key_scale == 1 and quantized.key.tolist() == [[127, 0, 2, 2, 0, -2, 126, -2]]


def test_zeros_are_exact(rng):
    key = normal(rng, 4, 64)
    key[1], key[2, 32:] = 0.0, -0.0
    quantized = quantize_kv(key, key, block=32)
    assert quantized.key_scale[1].tolist() == [0, 0] and quantized.key_scale[2, 1] == 0
    back = quantized.dequantize()[0]
    assert not back[1].any() and not back[2, 32:].any() and back[2, :32].any()


@pytest.mark.parametrize("center", [None, "mean", "array"])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("exponent", [-149, -140, -130, -120, -30, -24, -20, -14, -5, 0, 10, 20, 24, 126])
def test_bounds_hold_for_numbers_of_any_size(rng, exponent, scale_dtype, center):
    """Also where a scale has few digits, or none: denormal numbers, and scales of float16 below its normal range."""
    sizes = np.float64(2.0) ** (exponent + rng.uniform(-2, 1, (200, 1)))
    key = np.float32(np.clip(rng.uniform(-1, 1, (200, 64)) * sizes, -3e38, 3e38))
    middle = {"array": np.float32(0.3 * 2.0**exponent) * np.ones(64, np.float32)}.get(center, center)
    if exponent > 20 and scale_dtype == np.float16:
        with pytest.raises(
            ValueError, match=r"key\[\d+, \d+\] is .*: its scale is larger than scale_dtype=float16 allows"
        ):
            quantize_kv(key, key, scale_dtype=scale_dtype, center=middle)
        return
    for block in (None, 16):
        quantized = quantize_kv(key, key, block=block, scale_dtype=scale_dtype, center=middle)
        check_bounds(key, quantized.key, quantized.key_scale, quantized.key_center)
        check_bounds(key, quantized.value, quantized.value_scale)
        scale = wide(quantized.value_scale)
        assert (np.max(abs(wide(key)).reshape(200, scale.shape[-1], -1), -1) <= 127.5 * (1 + EPS) * scale).all()


def test_every_size_near_the_least_scale_of_float16():
    """127.5 scales reach the largest number: half the spacing of float16's scales is more than that at first."""
    top = np.float32(2.0**-24 * 127 * np.linspace(0.001, 40, 20_000))
    key = np.stack([top, -top, top / 2, top / 3], axis=-1)
    quantized = quantize_kv(key, key, scale_dtype=np.float16)
    assert (quantized.key_scale > 0).all()
    check_bounds(key, quantized.key, quantized.key_scale)


def test_denormal_numbers_do_not_depend_on_the_mode_of_the_thread():
    """Scales are normal, so threads that take denormal numbers for zeros still read them."""
    key = np.float32([[1e-45, 1e-44, -1e-40], [1e-38, 3e-38, -1e-38]])
    scale = quantize_kv(key, key).key_scale
    assert (scale >= np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
def test_centered_keys(rng, dtype):
    offsets = normal(rng, 2, 1, 64, size=5.0)
    key, value = (normal(rng, 2, 100, 64) + offsets).astype(dtype), normal(rng, 2, 100, 64, dtype=dtype)
    quantized, plain = quantize_kv(key, value, center="mean"), quantize_kv(key, value)
    mean = wide(key).mean(-2, keepdims=True)
    assert quantized.key_center.dtype == np.float32 and quantized.key_center.shape == (2, 1, 64)
    np.testing.assert_allclose(quantized.key_center, mean, rtol=2 * EPS, atol=1e-12)
    check_bounds(key, quantized.key, quantized.key_scale, quantized.key_center)
    assert bits(quantized.value) == bits(plain.value) and bits(quantized.value_scale) == bits(plain.value_scale)
    assert quantized.key_scale.max() < plain.key_scale.mean() / 2
    again = quantize_kv(key, value, center=quantized.key_center)
    assert [bits(a) for a in again] == [bits(a) for a in quantized]
    one = quantize_kv(key, value, center=wide(offsets)[0, 0])
    assert one.key_center.shape == (64,) and one.key_center.dtype == np.float32
    check_bounds(key, one.key, one.key_scale, one.key_center)


def test_the_mean_of_long_sequences_is_exact():
    """Summed in double."""
    key = np.full((1 << 17, 2), 0.1, np.float32)
    key[:, 1] = np.where(np.arange(len(key)) % 2, 3e38, -3e38)
    center = quantize_kv(key, key, center="mean").key_center
    assert center[0, 0] == np.float32(0.1) and center[0, 1] == 0


@pytest.mark.parametrize("block", [None, 8])
def test_neither_layout_nor_batch_changes_a_bit(rng, block):
    key, value = normal(rng, 2, 3, 40, 24, size=2.0) + 1, normal(rng, 2, 3, 40, 24)
    expected = quantize_kv(key, value, center="mean", block=block)
    for (name, a), (_, b) in zip(layouts(key), layouts(value), strict=True):
        found = quantize_kv(a, b, center="mean", block=block)
        assert [bits(x) for x in found] == [bits(x) for x in expected], name
    for b in np.ndindex(2, 3):
        one = quantize_kv(key[b], value[b], center="mean", block=block)
        assert [bits(a) for a in one] == [bits(a[b]) for a in expected]
    with np.errstate(all="raise"):
        assert bits(quantize_kv(wide(key), wide(value), center="mean", block=block).key) == bits(expected.key)


def test_what_is_broadcast_is_read_in_place(rng):
    key = normal(rng, 1, 8, 16)
    whole = quantize_kv(np.broadcast_to(key, (3, 8, 16)), np.broadcast_to(key[:, :, :1], (3, 8, 16)), center="mean")
    one = quantize_kv(key, np.repeat(key[:, :, :1], 16, -1), center="mean")
    assert bits(whole.key[2]) == bits(one.key[0]) and bits(whole.value[1]) == bits(one.value[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_memory_is_that_of_the_result(rng, dtype):
    key = normal(rng, 8, 2000, 64, dtype=dtype)
    quantize_kv(key[:1], key[:1])
    tracemalloc.start()
    quantized = quantize_kv(key, key, center="mean")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < quantized.nbytes + 100_000
    assert quantized.nbytes == 2 * 8 * 2000 * (64 + 4) + 8 * 64 * 4


# ------------------------------------------------------------------------------------------- dequantize


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_dequantize_with_every_kind_of_scale(rng, scale_dtype):
    key, value = rng.integers(-128, 128, (2, 2, 3, 9, 32), np.int8)
    shapes = {"token": (2, 3, 9, 1), "channel": (1, 32), "one": (), "channels": (32,), "blocks": (2, 3, 9, 4)}
    for key_scale in [(0.1 + rng.random(shape)).astype(scale_dtype) for shape in shapes.values()]:
        for center in (None, normal(rng, 2, 3, 1, 32), normal(rng, 32)):
            quantized = QuantizedKV(key, value, key_scale, scale_dtype(0.5), center)
            back, values = quantized.dequantize()
            assert back.dtype == values.dtype == np.float32
            expected = reference.dequantized(key, key_scale, center)
            np.testing.assert_allclose(back, expected, rtol=4 * EPS, atol=4 * EPS * (0 if center is None else 128))
            np.testing.assert_array_equal(values, value * 0.5)
    assert quantized.nbytes == key.nbytes + value.nbytes + key_scale.nbytes + np.dtype(scale_dtype).itemsize + 32 * 4


def test_dequantize_names_what_does_not_fit(rng):
    key = np.zeros((2, 9, 32), np.int8)
    for scale in (np.ones((2, 8, 1), np.float32), np.ones((9, 5), np.float32), np.ones(31, np.float32)):
        with pytest.raises(ValueError, match=r"key_scale has shape .*, and key \(2, 9, 32\)"):
            QuantizedKV(key, key, scale, 1.0).dequantize()
        with pytest.raises(ValueError, match=r"value_scale has shape"):
            QuantizedKV(key, key, 1.0, scale).dequantize()
    for center in (np.zeros((2, 9, 32), np.float32), np.zeros(31, np.float32), np.zeros((3, 1, 32)), np.zeros(())):
        with pytest.raises(ValueError, match="key_center has shape"):
            QuantizedKV(key, key, 1.0, 1.0, center).dequantize()


# ---------------------------------------------------------------------------------------------- errors

BAD = np.ones((2, 5, 8), np.float32)


def with_one(number, dtype=np.float32):
    x = np.ones((2, 5, 8), dtype)
    x[1, 3, 6] = number
    return x


ERRORS = {
    "nan": (ValueError, r"^key\[1, 3, 6\] is nan: only finite", (with_one(np.nan), BAD), {}),
    "inf": (ValueError, r"^value\[1, 3, 6\] is -inf: only finite", (BAD, with_one(-np.inf)), {}),
    "nan, block": (ValueError, r"^key\[1, 3, 6\] is nan", (with_one(np.nan), BAD), {"block": 2}),
    "nan, mean": (ValueError, r"^key\[1, 3, 6\] is nan", (with_one(np.nan), BAD), {"center": "mean"}),
    "float64": (ValueError, r"^key\[1, 3, 6\] is 1e\+300: .* float32", (with_one(1e300, float), BAD), {}),
    "float16": (
        ValueError,
        r"^value\[1, 3, 6\] is 10000000.0: its scale .* scale_dtype=float16",
        (BAD, with_one(1e7)),
        {"scale_dtype": np.float16},
    ),
    "less its center": (
        ValueError,
        r"^key\[1, 3, 6\] is 3.*less its center",
        (with_one(3e38), BAD),
        {"center": -BAD[0, 0] * 3e38},
    ),
    "center, inf": (ValueError, r"^center\[2\] is inf", (BAD, BAD), {"center": [0, 0, np.inf, 0, 0, 0, 0, 0]}),
    "center, shape": (ValueError, r"^center has shape \(5, 8\)", (BAD, BAD), {"center": np.ones((5, 8))}),
    "center, batch": (ValueError, r"^center has shape \(3, 1, 8\)", (BAD, BAD), {"center": np.ones((3, 1, 8))}),
    "center, axes": (ValueError, r"^center has shape \(1, 2, 1, 8\)", (BAD, BAD), {"center": np.ones((1, 2, 1, 8))}),
    "center, word": (ValueError, "^center must be 'mean'", (BAD, BAD), {"center": "median"}),
    "center, complex": (TypeError, "^center has dtype complex128", (BAD, BAD), {"center": np.ones(8, complex)}),
    "block": (ValueError, "^block=3 does not divide the channels of key, D=8", (BAD, BAD), {"block": 3}),
    "block of values": (ValueError, "^block=4 .* value, E=2", (BAD, BAD[..., :2]), {"block": 4}),
    "block, 0": (ValueError, "^block must be an integer of at least 1", (BAD, BAD), {"block": 0}),
    "block, float": (TypeError, "^block must be", (BAD, BAD), {"block": 4.0}),
    "tokens": (ValueError, "^value has 4 tokens .* key 5", (BAD, BAD[:, :4]), {}),
    "axes": (ValueError, r"^value has shape \(8,\)", (BAD, BAD[0, 0]), {}),
    "int8": (TypeError, "^key has dtype int8, as what is quantized already", (BAD.astype(np.int8), BAD), {}),
    "uint8": (TypeError, "^value has dtype uint8", (BAD, BAD.astype(np.uint8)), {}),
    "complex": (TypeError, "^key has dtype complex64", (BAD.astype(np.complex64), BAD), {}),
    "masked": (TypeError, "^key is a masked array", (np.ma.masked_array(BAD), BAD), {}),
    "dtype": (TypeError, "^dtype must be numpy.int8, not int16", (BAD, BAD), {"dtype": np.int16}),
    "dtype, word": (TypeError, "^dtype must be numpy.int8: ", (BAD, BAD), {"dtype": "four bits"}),
    "scale_dtype": (
        TypeError,
        "^scale_dtype must be float32, float16 .* not float64",
        (BAD, BAD),
        {"scale_dtype": float},
    ),
    "scale_dtype, word": (TypeError, "^scale_dtype must be .*: ", (BAD, BAD), {"scale_dtype": "half a byte"}),
}


@pytest.mark.parametrize("error, message, arguments, options", ERRORS.values(), ids=ERRORS)
def test_errors(error, message, arguments, options):
    with pytest.raises(error, match=message):
        quantize_kv(*arguments, **options)


@pytest.mark.parametrize("where", range(0, 40))
def test_no_number_escapes_the_check(where):
    """In any place of a row, whatever vectors it is cut into."""
    for bad in (np.nan, np.inf, -np.inf):
        x = np.zeros((3, 40), np.float32)
        x[1, where] = bad
        for block in (None, 5):
            with pytest.raises(ValueError, match=rf"key\[1, {where}\] is"):
                quantize_kv(x, np.zeros((3, 5)), block=block)


def test_integers_are_numbers():
    key = np.arange(40).reshape(5, 8) * 1000
    assert bits(quantize_kv(key, key).key) == bits(quantize_kv(key.astype(np.float32), key.astype(np.float32)).key)
    assert quantize_kv([[True, False]], [[1, 2]]).key.tolist() == [[127, 0]]


# ------------------------------------------------------------------------------------------- llama.cpp


def q8_0(scales, numbers):
    """Bytes of rows, block by block."""
    rows = []
    for scale, part in zip(scales.reshape(-1), numbers.reshape(-1, 32), strict=True):
        rows.append(np.float16(scale).astype("<f2").tobytes() + bytes(int(n) & 255 for n in part))
    return np.frombuffer(b"".join(rows), np.uint8)


def q4_0(scales, numbers):
    rows = []
    for scale, part in zip(scales.reshape(-1), numbers.reshape(-1, 32), strict=True):
        pairs = zip(part[:16], part[16:], strict=True)
        rows.append(
            np.float16(scale).astype("<f2").tobytes() + bytes((int(a) + 8) | (int(b) + 8) << 4 for a, b in pairs)
        )
    return np.frombuffer(b"".join(rows), np.uint8)


@pytest.mark.parametrize("format, made_by, low, high", [("q8_0", q8_0, -128, 127), ("q4_0", q4_0, -8, 7)])
@pytest.mark.parametrize("shape", [(64,), (3, 32), (2, 4, 5, 128), (2, 0, 32), (1, 288)])
def test_rows_of_llama_cpp_byte_by_byte(rng, format, made_by, low, high, shape):
    numbers = rng.integers(low, high + 1, shape, np.int8)
    scales = normal(rng, *shape[:-1], shape[-1] // 32, dtype=np.float16)
    rows = made_by(scales, numbers).reshape(*shape[:-1], shape[-1] // 32 * {"q8_0": 34, "q4_0": 18}[format])
    ways = [(rows, format)] if rows.shape[-1] % 306 == 0 else [(rows, None), (rows, format)]
    for x, said in (*ways, (np.repeat(rows, 2, -1)[..., ::2], format)):
        found, its_scales = from_llama_cpp(x, said)
        assert found.dtype == np.int8 and its_scales.dtype == np.float16
        np.testing.assert_array_equal(found, numbers)
        np.testing.assert_array_equal(its_scales, scales)
        assert found.flags.c_contiguous and found.flags.writeable


def test_every_byte_of_llama_cpp():
    block = np.concatenate([np.float16([-2]).view(np.uint8), np.arange(16, dtype=np.uint8) * 16 + np.arange(16)[::-1]])
    numbers, scales = from_llama_cpp(block.astype(np.uint8))
    assert numbers.tolist() == [*range(7, -9, -1), *range(-8, 8)] and scales.tolist() == [-2]


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_rows_of_llama_cpp_against_gguf(rng, format):
    import gguf

    kind = gguf.GGMLQuantizationType[format.upper()]
    key, value = normal(rng, 2, 3, 7, 64)
    parts = [from_llama_cpp(gguf.quantize(x, kind)) for x in (key, value)]
    (keys, key_scale), (values, value_scale) = parts
    back = QuantizedKV(keys, values, key_scale, value_scale).dequantize()
    for x, found in zip((key, value), back, strict=True):
        np.testing.assert_array_equal(found, gguf.dequantize(gguf.quantize(x, kind), kind))


BAD_ROWS = {
    "no blocks": (
        ValueError,
        r"a row of blocks has 35 bytes, no whole blocks of 34 bytes \(q8_0\) or 18",
        (np.zeros(35, np.uint8),),
    ),
    "both": (
        ValueError,
        "a row of blocks has 306 bytes, whole blocks of both formats: say format=",
        (np.zeros(306, np.uint8),),
    ),
    "none": (ValueError, "a row of blocks has 0 bytes", (np.zeros((3, 0), np.uint8),)),
    "other": (
        ValueError,
        r"a row of blocks has 36 bytes, no whole blocks of 34 \(q8_0\)",
        (np.zeros(36, np.uint8), "q8_0"),
    ),
    "format": (ValueError, "format must be 'q8_0' or 'q4_0', not 'q5_0'", (np.zeros(34, np.uint8), "q5_0")),
    "format, number": (ValueError, "format must be 'q8_0' or 'q4_0', not 8", (np.zeros(34, np.uint8), 8)),
    "dtype": (TypeError, "blocks has dtype int8; it must be uint8", (np.zeros(34, np.int8),)),
    "axes": (ValueError, "blocks has no axes", (np.uint8(3),)),
    "masked": (TypeError, "blocks is a masked array", (np.ma.masked_array(np.zeros(34, np.uint8)),)),
}


@pytest.mark.parametrize("error, message, arguments", BAD_ROWS.values(), ids=BAD_ROWS)
def test_errors_of_llama_cpp(error, message, arguments):
    with pytest.raises(error, match=message):
        from_llama_cpp(*arguments)


def test_public_names():
    for name in ("QuantizedKV", "quantize_kv", "from_llama_cpp"):
        assert name in fastattn.__all__ and getattr(fastattn, name) is getattr(fastattn.quantized, name)
