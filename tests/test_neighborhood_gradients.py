"""neighborhood_attention_vjp: its reference against finite differences and PyTorch, and the function against that."""

import fresh_process
import numpy as np
import pytest
from problems import bits, layouts, sixteen_bits
from test_neighborhood import CASES, RULES, WHERE, dense, images, in_a_row, neighborhoods, possible
from tolerances import accumulation_dtype, assert_within, result_dtype, score_sizes, storage_steps

import fastattn
from fastattn import reference

NAMES = ("query", "key", "value", "relative_bias", "sinks")


def result_shape(query, key, value, kernel_size, enable_gqa=False):
    """The shape of the output."""
    axes = np.size(kernel_size)
    batches = [x.shape[: -axes - 1] for x in (query, key, value)]
    if enable_gqa:
        batches = batches[:1]
    return (*np.broadcast_shapes(*batches), *query.shape[-axes - 1 : -1], value.shape[-1])


def names_of(arguments):
    """Everything that has a gradient."""
    return NAMES[:3] + tuple(name for name in NAMES[3:] if arguments.get(name) is not None)


def summed(x, shape):
    return reference.sum_to(x, shape)


def gradient_bounds(grad_out, query, key, value, kernel_size, *, grad_lse=None, **arguments):
    """How far gradients may be from the reference, by name: eps * (8 * largest size of a row + 16) times the same sums
    over absolute values, and one rounding.

    Under a softcap the derivative ``1 - tanh ** 2`` is wrong by the error of the raw score over the cap, at most. With
    sparsemax and entmax15 an error of a score moves the factor that stands for the weight by as much, whatever it is.
    """
    axes = np.size(kernel_size)
    names = names_of(arguments)
    dtype = result_dtype(query, key, value)
    eps = float(np.finfo(accumulation_dtype(dtype)).eps)
    tiny = float(np.finfo(accumulation_dtype(dtype)).smallest_normal)
    where = {name: x for name, x in arguments.items() if name in WHERE}
    others = {name: x for name, x in arguments.items() if name in ("softcap", "scale", "sinks", "activation")}
    rules = {**dense(query.shape[-axes - 1 : -1], kernel_size, **where), **others}
    activation = arguments.get("activation", "softmax")
    rows = [in_a_row(np.asarray(x, dtype=np.float64), axes) for x in (query, key, value, grad_out)]
    q, k, v, g = rows
    group = 1
    if arguments.get("enable_gqa"):
        group = q.shape[-3] // k.shape[-3]
        k, v = reference.repeat_heads(q, k, v)
    with np.errstate(all="ignore"):
        sinks = arguments.get("sinks")
        _, weights, *lse = reference.dot_product_attention(
            q, k, v, **rules, return_weights=True, return_lse=activation == "softmax"
        )
        seen = np.broadcast_to(rules["mask"], weights.shape) & (rules.get("bias", 0.0) != -np.inf)
        size = score_sizes("dot_product_attention", q, k, eps, **rules)
        size = np.max(np.nan_to_num(np.where(seen, size, 0.0), posinf=0.0), axis=-1, keepdims=True, initial=0.0)
        unit = eps * (8 * size + 16)
        a = np.where(seen, np.abs(g) @ np.abs(v).swapaxes(-1, -2), 0.0)
        b = np.sum(weights * a, axis=-1, keepdims=True)
        of_lse = 0.0 if grad_lse is None else np.abs(grad_lse).reshape(*weights.shape[:-1], 1)
        if activation == "relu":
            scores = (weights > 0) / np.maximum(np.sum(seen, axis=-1, keepdims=True), 1) * a
        elif activation == "sigmoid":
            scores = weights * a
        elif activation in reference.SPARSE:
            part = weights > 0
            b = np.sum(part * a, axis=-1, keepdims=True)
            scores, weights = part * (a + b), np.where(part, 1.0, 0.0)
        else:
            scores = weights * (a + b + of_lse)
        scale = 1 / np.sqrt(max(q.shape[-1], 1)) if arguments.get("scale") is None else abs(arguments["scale"])
        raw = scores
        if arguments.get("softcap") is not None:
            cap = arguments["softcap"]
            steep = 1 - np.tanh(reference.dot_scores(q, k, arguments.get("scale")) / cap) ** 2
            raw = scores * (steep + reference.dot_scores(np.abs(q), np.abs(k), scale) / cap)
        bounds = {
            "query": unit * scale * (raw @ np.abs(k)),
            "key": scale * ((unit * raw).swapaxes(-1, -2) @ np.abs(q)),
            "value": (unit * weights).swapaxes(-1, -2) @ np.abs(g),
        }
        if group > 1:
            for name in ("key", "value"):
                x = bounds[name]
                x = x.reshape(*x.shape[:-3], x.shape[-3] // group, group, *x.shape[-2:])
                bounds[name] = np.sum(x, axis=-3)
        if "sinks" in names:
            share = np.exp(reference.per_row(sinks) - lse[0][..., None])
            bounds["sinks"] = np.sum(unit * share * (b + of_lse), axis=(-1, -2))
        if "relative_bias" in names:
            keys, near, entries = neighborhoods(query.shape[-axes - 1 : -1], kernel_size,
                                                **{n: x for n, x in where.items() if n != "relative_bias"})  # fmt: skip
            table = np.zeros((*scores.shape[:-2], *(2 * np.broadcast_to(kernel_size, axes) - 1)))
            pixels = np.broadcast_to(np.arange(len(keys))[:, None], keys.shape)
            at = (..., *(entry[near] for entry in entries))
            np.add.at(table, at, (unit * scores)[..., pixels[near], keys[near]])
            bounds["relative_bias"] = table
        for i, name in enumerate(names):
            array = np.asarray((query, key, value)[i] if i < 3 else arguments[name])
            x = bounds[name]
            if i < 3:
                x = x.reshape(*x.shape[:-2], *query.shape[-axes - 1 : -1], x.shape[-1])
            bounds[name] = (2 if dtype == np.float64 else 1) * summed(x, array.shape) + tiny
    return bounds


def assert_gradients(query, key, value, kernel_size, *, grad_out=None, functions=fastattn, **arguments):
    """All gradients, within their bounds of the reference's; returns them."""
    rng = np.random.default_rng(100)
    shape = result_shape(query, key, value, kernel_size, arguments.get("enable_gqa", False))
    if grad_out is None:
        grad_out = rng.standard_normal(shape).astype(np.float32)
    names = names_of(arguments)
    call = (grad_out, query, key, value, kernel_size)
    for_reference = {name: x for name, x in arguments.items() if name != "num_threads"}
    expected = reference.neighborhood_attention_vjp(*call, **for_reference, wrt=names)
    bounds = gradient_bounds(*call, **for_reference)
    actual = functions.neighborhood_attention_vjp(*call, **arguments, wrt=names)
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        array = np.asarray({"query": query, "key": key, "value": value, **arguments}[name])
        dtype = np.dtype(np.float64) if array.dtype.kind in "iub" else array.dtype
        assert (ours.shape, ours.dtype) == (array.shape, dtype), name
        storage, step = (x / 2 for x in storage_steps(dtype))
        assert_within(ours, theirs, bounds[name] + storage * np.abs(theirs) + step, name)
    return dict(zip(names, actual, strict=True))


# ------------------------------------------------------------------------------------------------ reference

SMALL = {
    "plain": {},
    "truncated": {"edge": "truncate", "dilation": (1, 2)},
    "strides": {"stride": (2, 1), "is_causal": (False, True)},
    "softcap": {"softcap": 0.7, "scale": -1.3},
    "sinks": {"sinks": np.array([0.3, -1.0]), "relative_bias": np.random.default_rng(0).standard_normal((2, 5, 3))},
    "relu": {"activation": "relu", "relative_bias": np.random.default_rng(1).standard_normal((5, 1))},
    "sigmoid": {"activation": "sigmoid", "relative_bias": np.random.default_rng(2).standard_normal(3)},
    "sparsemax": {"activation": "sparsemax"},
    "entmax15": {"activation": "entmax15", "softcap": 2.0},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shared", ["", "groups", "key", "query"])
def test_the_reference_against_differences(name, shared):
    """Central differences of a loss that uses output and log-sum-exp, along a random direction of each argument."""
    rng = np.random.default_rng(3)
    arguments = dict(SMALL[name])
    batches = {"": ((2,), (2,)), "groups": ((4,), (2,)), "key": ((3, 2), (2,)), "query": ((2,), (3, 2))}[shared]
    arrays = dict(zip(NAMES[:3], images(rng, (4, 5), batches[0], 3, 2, np.float64, batches[1]), strict=True))
    if shared == "groups":
        arguments["enable_gqa"] = True
        arguments.update({n: np.float64(0.4) for n in ("sinks", "relative_bias") if n in arguments})
    names = names_of(arguments)
    arrays.update({n: arguments.pop(n) for n in names[3:]})
    with_lse = arguments.get("activation", "softmax") == "softmax"

    def forward(changed):
        results = reference.neighborhood_attention(**changed, kernel_size=(3, 2), **arguments, return_lse=with_lse)
        return results if with_lse else (results,)

    def loss(changed):
        return sum(np.vdot(a, b) for a, b in zip(gradients, forward(changed), strict=True))

    gradients = [rng.standard_normal(x.shape) for x in forward(arrays)]

    found = reference.neighborhood_attention_vjp(
        gradients[0], **arrays, kernel_size=(3, 2), **arguments, wrt=names, grad_lse=gradients[1] if with_lse else None
    )
    for name, gradient in zip(names, found, strict=True):
        assert gradient.shape == np.shape(arrays[name])
        step = 1e-6 * rng.standard_normal(np.shape(arrays[name]))
        ahead, behind = (loss({**arrays, name: arrays[name] + sign * step}) for sign in (1, -1))
        np.testing.assert_allclose(np.vdot(gradient, step), (ahead - behind) / 2, rtol=2e-6, atol=1e-13, err_msg=name)


def test_autograd_of_torch():
    torch = pytest.importorskip("torch", reason="PyTorch's gradients as a witness")
    rng = np.random.default_rng(4)
    arrays = images(rng, (6, 7), (2,), 4, 3, np.float64)
    table = rng.standard_normal((2, 5, 5))
    grad_out, grad_lse = rng.standard_normal((2, 6, 7, 3)), rng.standard_normal((2, 6, 7))
    keys, _, entries = neighborhoods((6, 7), (3, 3))
    tensors = [torch.tensor(x, requires_grad=True) for x in (*(in_a_row(x, 2) for x in arrays), table)]
    query, key, value, bias = tensors
    scores = torch.einsum("hpd,hpkd->hpk", query, key[:, keys]) / 2
    scores = 0.8 * torch.tanh(scores / 0.8) + bias[:, entries[0], entries[1]]
    out = torch.einsum("hpk,hpke->hpe", scores.softmax(-1), value[:, keys])
    loss = (out * torch.tensor(in_a_row(grad_out, 2))).sum()
    loss = loss + (scores.logsumexp(-1) * torch.tensor(grad_lse.reshape(2, 42))).sum()
    expected = torch.autograd.grad(loss, tensors)
    for functions in (reference, fastattn):
        found = functions.neighborhood_attention_vjp(
            grad_out, *arrays, (3, 3), relative_bias=table, softcap=0.8, grad_lse=grad_lse, wrt=NAMES[:4]
        )
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy().reshape(ours.shape), atol=1e-12)


# ------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("edge", ["clamp", "truncate"])
@pytest.mark.parametrize("size", [1, 2, 5, 17, 40])
def test_one_dimension(size, edge):
    rng = np.random.default_rng(size)
    for kernel_size in (1, 2, 3, 7, 16):
        for dilation in (1, 2, 3):
            for stride in sorted({1, 2, kernel_size}):
                for is_causal in (False, True):
                    where = {"dilation": dilation, "stride": stride, "is_causal": is_causal, "edge": edge}
                    if possible((size,), kernel_size, **where):
                        assert_gradients(*images(rng, (size,), (1,)), kernel_size, **where)


@pytest.mark.parametrize("edge", ["clamp", "truncate"])
@pytest.mark.parametrize(
    ("space", "kernel_size"),
    [((9, 10), (3, 3)), ((7, 20), (7, 5)), ((20, 7), (4, 7)), ((3, 33), (2, 3)), ((5, 5), (3, 1)), ((8, 8), (4, 4))],
)
def test_two_dimensions(space, kernel_size, edge):
    rng = np.random.default_rng(1)
    for dilation in (1, 2, (2, 1), (1, 3)):
        for stride in (1, 2, kernel_size):
            for is_causal in (False, (True, False)):
                where = {"dilation": dilation, "stride": stride, "is_causal": is_causal, "edge": edge}
                if possible(space, kernel_size, **where):
                    table = rng.standard_normal(2 * np.array(kernel_size) - 1)
                    assert_gradients(*images(rng, space, (1,)), kernel_size, **where, relative_bias=table)


@pytest.mark.parametrize("edge", ["clamp", "truncate"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, (1, 1, 2)])
def test_three_dimensions(dilation, stride, edge):
    for space in ((6, 7, 8), (8, 4, 6)):
        where = {"dilation": dilation, "stride": stride, "is_causal": (True, False, False), "edge": edge}
        table = np.random.default_rng(2).standard_normal((5, 3, 5))
        assert_gradients(*images(np.random.default_rng(2), space, (1,)), (3, 2, 3), **where, relative_bias=table)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rules(name, dtype):
    rng = np.random.default_rng(6)
    grad_lse = {}
    if RULES[name].get("activation", "softmax") == "softmax":
        grad_lse = {"grad_lse": rng.standard_normal((2, 9, 18))}
    for head_dim, value_dim in ((16, 16), (33, 17)):
        arrays = images(rng, (9, 18), (2,), head_dim, value_dim, dtype)
        assert_gradients(*arrays, (3, 5), **RULES[name], **grad_lse)


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid", "sparsemax", "entmax15"])
def test_a_bias_of_minus_infinity_hides(activation):
    rng = np.random.default_rng(7)
    table = rng.standard_normal((2, 5, 5))
    table[0, 2, 3] = table[1, :, 1] = -np.inf
    arrays = images(rng, (6, 7))
    found = assert_gradients(*arrays, (3, 3), relative_bias=table, activation=activation)
    assert (found["relative_bias"][table == -np.inf] == 0).all()
    table[0] = -np.inf
    found = assert_gradients(*arrays, (3, 3), relative_bias=table, activation=activation)
    for name in NAMES[:4]:
        assert (found[name][0] == 0).all()


@pytest.mark.parametrize("head_dim", [0, 1, 2, 15, 16, 31, 65])
@pytest.mark.parametrize("value_dim", [0, 1, 4, 9, 32])
def test_channels(head_dim, value_dim):
    arrays = images(np.random.default_rng(8), (4, 19), (1,), head_dim, value_dim)
    assert_gradients(*arrays, (3, 3), sinks=np.float32(0.1))


@pytest.mark.parametrize("kernel_size", [(17, 3), (3, 17), (9, 21)])
def test_large_kernels(kernel_size):
    table = np.random.default_rng(9).standard_normal(2 * np.array(kernel_size) - 1)
    for edge in ("clamp", "truncate"):
        arrays = images(np.random.default_rng(9), (18, 22), (1,))
        assert_gradients(*arrays, kernel_size, edge=edge, relative_bias=table)


def test_kernels_beyond_the_image():
    """Entries of the table for pixels that there are not have gradient 0."""
    arrays = images(np.random.default_rng(10), (5, 6), (1,))
    grad_out = np.ones((1, 5, 6, 6), np.float32)
    small = fastattn.neighborhood_attention_vjp(
        grad_out, *arrays, (5, 6), edge="truncate", stride=1, relative_bias=np.zeros((9, 11)), wrt=NAMES[:4]
    )
    assert np.isfinite(small[3]).all()
    full, table = assert_gradients(*arrays, (11, 12), edge="truncate"), np.zeros((21, 23))
    for size in (10**6, 2**62, 10**30):
        found = fastattn.neighborhood_attention_vjp(
            full["query"][..., :1] * 0 + np.random.default_rng(100).standard_normal((1, 5, 6, 6)).astype(np.float32),
            *arrays, (size, size), edge="truncate", relative_bias=np.zeros((1, 1)), wrt=NAMES[:4],
        )  # fmt: skip
        for name, x in zip(NAMES[:3], found, strict=False):
            np.testing.assert_allclose(x, full[name], atol=1e-5)
    padded = fastattn.neighborhood_attention_vjp(
        grad_out, *arrays, (11, 12), edge="truncate", relative_bias=table, wrt="relative_bias"
    )
    assert (padded[0] == 0).all() and (padded[:, 0] == 0).all() and (padded[10] != 0).any()


def test_long_rows_and_few_columns():
    rng = np.random.default_rng(10)
    assert_gradients(*images(rng, (300,), (1,)), 5)
    assert_gradients(*images(rng, (300,), (1,)), 201, edge="truncate")
    assert_gradients(*images(rng, (120, 3), (1,)), (9, 3))
    assert_gradients(*images(rng, (3, 120), (1,)), (3, 9), dilation=(1, 8), relative_bias=np.zeros(17))


def test_storage_of_16_bits():
    rng = np.random.default_rng(11)
    for dtype in sixteen_bits():
        arrays = images(rng, (6, 20), (2,), 17, 33, dtype)
        assert_gradients(*arrays, (3, 3), relative_bias=rng.standard_normal((2, 5, 5)).astype(dtype))
        grad_out = np.ones((2, 6, 20, 33), dtype)
        targets = tuple(np.empty(x.shape, np.float32) for x in arrays)
        fastattn.neighborhood_attention_vjp(grad_out, *arrays, (3, 3), out=targets)
        for rounded, exact in zip(fastattn.neighborhood_attention_vjp(grad_out, *arrays, (3, 3)), targets, strict=True):
            assert bits(rounded) == bits(exact.astype(dtype))
    query, key, value = images(rng, (6, 20))
    assert_gradients(query.astype(np.float16), key, value.astype(np.float64), (3, 3))
    found = fastattn.neighborhood_attention_vjp(np.ones((4, 1), int), *(np.ones((4, 1), int),) * 3, 3)
    assert all(x.dtype == np.float64 for x in found)


def test_grouped_heads_and_broadcast_batches():
    rng = np.random.default_rng(12)
    for dtype in (np.float32, np.float16):
        arrays = images(rng, (5, 17), (2, 6), 5, 6, dtype, key_batch=(2, 3))
        biases = {"relative_bias": rng.standard_normal((6, 5, 5)), "sinks": rng.standard_normal((2, 1))}
        assert_gradients(*arrays, (3, 3), enable_gqa=True, **biases)
        query, key, value = images(rng, (5, 17), (6,), dtype=dtype, key_batch=(1,))
        assert_gradients(query, key, value, (3, 3), relative_bias=biases["relative_bias"])
        assert_gradients(query[0], key, np.concatenate([value, value]), (3, 3))
        assert_gradients(query[None], np.broadcast_to(key, query.shape), value[0], (3, 3))
        query, key, value = images(rng, (5, 17), (1, 2), dtype=dtype, key_batch=(3, 1))
        assert_gradients(query, key, np.repeat(value, 2, axis=1), (3, 3), relative_bias=np.zeros((3, 1, 5, 1)))


def test_no_pixels_no_batch():
    for shape in ((2, 0, 5, 4), (0, 3, 5, 4), (2, 3, 0, 4)):
        x = np.ones(shape, np.float32)
        found = fastattn.neighborhood_attention_vjp(
            x, x, x, x, (2, 2), edge="truncate", relative_bias=np.ones((3, 3)), sinks=1.0, wrt=NAMES
        )
        assert [a.shape for a in found] == [shape, shape, shape, (3, 3), ()]
        assert (found[3] == 0).all() and found[4] == 0
    query, key = np.ones((0, 3, 3, 4)), np.ones((1, 3, 3, 4))
    d_key = fastattn.neighborhood_attention_vjp(query, query, key, key, (3, 3), wrt="key")
    assert d_key.shape == key.shape and (d_key == 0).all()


# -------------------------------------------------------------------------------------------------- same bits


def call(arrays, **arguments):
    given = {"wrt": NAMES[:3], **arguments}
    return fastattn.neighborhood_attention_vjp(*arrays, **given)


def problem(space, batch=(2,), dtype=np.float32, seed=19):
    rng = np.random.default_rng(seed)
    query, key, value = images(rng, space, batch, 16, 16, dtype)
    return [rng.standard_normal(value.shape).astype(dtype), query, key, value]


@pytest.mark.parametrize(("space", "arguments"), CASES)
def test_threads_batch_and_names_change_no_bit(space, arguments):
    arrays = problem(space, (3, 2))
    table = np.random.default_rng(20).standard_normal((2, *(1 for _ in space)))
    both = {**arguments, "relative_bias": table, "sinks": np.float32([0.5, -0.5])}
    expected = call(arrays, **both, wrt=NAMES, num_threads=1)
    for num_threads in (2, 3, 7):
        for a, b in zip(expected, call(arrays, **both, wrt=NAMES, num_threads=num_threads), strict=True):
            assert bits(a) == bits(b)
    for i, name in enumerate(NAMES):
        assert bits(call(arrays, **both, wrt=name, num_threads=2)) == bits(expected[i]), name
    out, lse = fastattn.neighborhood_attention(*arrays[1:], **both, return_lse=True)
    for a, b in zip(expected, call(arrays, **both, wrt=NAMES, output=out, lse=lse), strict=True):
        assert bits(a) == bits(b)
    expected = call(arrays, **arguments)
    for a, b in zip(expected, call([x[1, 1] for x in arrays], **arguments), strict=True):
        assert bits(a[1, 1]) == bits(b)


@pytest.mark.parametrize(("space", "arguments"), CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layouts_change_no_bit(space, arguments, dtype):
    arrays = problem(space, dtype=dtype)
    expected = call(arrays, **arguments)
    for i in range(4):
        for name, same in layouts(arrays[i]):
            changed = [same if j == i else x for j, x in enumerate(arrays)]
            for a, b in zip(expected, call(changed, **arguments), strict=True):
                assert bits(a) == bits(b), name
    behind = [np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -2)), -2, 0) for x in arrays]
    for (_, first), (_, second) in zip(*(layouts(np.zeros_like(expected[0])) for _ in range(2)), strict=True):
        if first.flags.writeable:
            found = call(behind, **arguments, out=(first, None, second))
            assert found[0] is first and found[2] is second
            for a, b in zip(expected, found, strict=True):
                assert bits(a) == bits(b)


def test_broadcast_gradients():
    """The gradient of a sum has strides of 0."""
    arrays = problem((9, 18))
    ones = np.broadcast_to(np.float32(1), arrays[0].shape)
    found, expected = (call([x, *arrays[1:]], kernel_size=(3, 3)) for x in (ones, ones.copy()))
    for a, b in zip(expected, found, strict=True):
        assert bits(a) == bits(b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("space", "arguments"), CASES)
def test_what_is_not_seen_does_not_matter(space, arguments, bad):
    """NaN or infinity at a pixel of any array reaches those that it concerns, and changes no bit of the others."""
    arrays = problem(space, (1,), seed=21)
    where = {name: x for name, x in arguments.items() if name != "kernel_size"}
    keys, seen, _ = neighborhoods(space, arguments["kernel_size"], **where)
    sees = np.zeros((len(keys), len(keys)), bool)
    sees[np.broadcast_to(np.arange(len(keys))[:, None], keys.shape)[seen], keys[seen]] = True
    before = [x.reshape(len(keys), -1) for x in call(arrays, **arguments)]
    for pixel in (0, len(keys) // 2 + 3, len(keys) - 1):
        for which, name in enumerate(("grad_out", "query", "key", "value")):
            changed = [x.copy() for x in arrays]
            changed[which].reshape(len(keys), -1)[pixel] = bad
            after = [x.reshape(len(keys), -1) for x in call(changed, **arguments)]
            queries = np.arange(len(keys)) == pixel if which < 2 else sees[:, pixel]
            reached = sees[queries].any(axis=0)
            for a, b, free in zip(before, after, (~queries, ~reached, ~reached), strict=True):
                assert bits(a[free]) == bits(b[free]), name
            if np.isnan(bad):
                assert np.isnan(after[0][queries]).all(), name
                assert np.isnan(after[1][reached]).all() or which == 3, name


def test_rows_that_see_nothing_give_nothing():
    """All scores are -inf: exactly 0, whatever comes in; with a sink, its gradient is that of the log-sum-exp."""
    grad_out, query, key, value = problem((5, 20), (1,))
    query[0, 2, 3] = 1
    key[...] = np.where(np.arange(16) == 0, -np.inf, key)
    query[...] = np.abs(query)
    grad_out[...] = np.nan
    lse = np.full((1, 5, 20), np.nan, np.float32)
    found = call([grad_out, query, key, value], kernel_size=(3, 3), grad_lse=lse, relative_bias=np.zeros((5, 5)),
                 wrt=NAMES[:4])  # fmt: skip
    assert all((x == 0).all() for x in found)
    lse = np.arange(100.0).reshape(1, 5, 20)
    found = call([grad_out, query, key, value], kernel_size=(3, 3), grad_lse=lse, sinks=0.25, wrt=NAMES[:3] + NAMES[4:])
    assert all((x == 0).all() for x in found[:3])
    assert found[3] == lse.sum()
    for activation in ("relu", "sigmoid", "sparsemax", "entmax15"):
        found = call([grad_out, query, key, value], kernel_size=(3, 3), activation=activation)
        assert all((x == 0).all() for x in found), activation


# ----------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("shift", [-1e9, -1e30, 1e9, -200.0])
def test_log_sum_exps_of_any_size(shift):
    """A bias for all changes nothing but the log-sum-exp, where float32 cannot hold the logarithm of a number beside
    it."""
    arrays = problem((6, 20))
    zero = [x * 0 if i == 1 else x for i, x in enumerate(arrays)]  # equal scores, so that nothing is rounded away
    expected = call(zero, kernel_size=(3, 3))
    found = call(zero, kernel_size=(3, 3), relative_bias=np.full((1, 1), shift))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert (expected[0] != 0).any()


@pytest.mark.parametrize(("factor", "scale"), [(1e20, 1e-40), (1e-20, 1e40), (1e-10, 1e20), (1e10, 1e-20)])
def test_scales_far_from_one(factor, scale):
    grad_out, query, key, value = problem((5, 20))
    expected = reference.neighborhood_attention_vjp(grad_out, query, key, value, (3, 3), scale=0.25)
    found = call(
        [grad_out, query * np.float32(factor), key * np.float32(factor), value], kernel_size=(3, 3), scale=scale / 4
    )
    for a, b, unit in zip(expected, found, (factor, factor, 1), strict=True):
        np.testing.assert_allclose(np.float64(b) * unit, a, atol=2e-5)


def test_sums_of_many_pixels_are_exact():
    """A bias for all and a sink have gradients over 250,000 pixels; equal terms would show an error that grows."""
    x = np.ones((1, 500, 500, 1), np.float32)
    value = np.where(np.arange(500)[:, None] % 2, np.float32(0.3), np.float32(0.1)) * x
    for name, more in (("sinks", {"sinks": np.zeros(1)}), ("value", {})):
        found = call([x, x, x, value], kernel_size=(3, 3), edge="truncate", wrt=name, **more, num_threads=2)
        if name == "value":
            np.testing.assert_allclose(found.sum(dtype=np.float64), x.size, rtol=1e-6)
        else:
            out, lse = fastattn.neighborhood_attention(
                *(a.astype(np.float64) for a in (x, x, value)), (3, 3), edge="truncate", return_lse=True, **more
            )
            expected = -np.sum(np.exp(-lse) * out[..., 0])
            np.testing.assert_allclose(found, expected, rtol=5e-7)


def test_nothing_outside_the_arrays_is_touched():
    fresh_process.run("""
        import faulthandler; faulthandler.enable()
        import numpy as np
        from test_guard_pages import guarded
        import fastattn
        rng = np.random.default_rng(0)
        for at_end in (True, False):
            def normal(*shape):
                return guarded(rng.standard_normal(shape).astype(np.float32), at_end)
            for space, kernel in (((5,), 3), ((40,), 7), ((3, 17), (3, 3)), ((17, 3), (3, 2)), ((9, 33), (5, 5)),
                                  ((3, 4, 18), (2, 2, 3))):
                for channels in (1, 8, 16, 33):
                    for more in ({}, {"dilation": 1, "stride": 2, "edge": "truncate"},
                                 {"dilation": 2, "edge": "truncate", "is_causal": True}):
                        table = normal(2, *(2 * np.atleast_1d(kernel) - 1))
                        found = fastattn.neighborhood_attention_vjp(
                            *(normal(2, *space, channels) for _ in range(4)), kernel, **more, relative_bias=table,
                            sinks=normal(2), grad_lse=normal(2, *space),
                            wrt=("query", "key", "value", "relative_bias", "sinks"),
                            out=(*(normal(2, *space, channels) for _ in range(3)), normal(*table.shape), normal(2)))
                        assert all(np.isfinite(x).all() for x in found)
    """)


def test_memory_grows_with_the_pixels():
    """Nothing of pixels x kernel: 250 MB for this kernel and both weights and their gradients."""
    fresh_process.run("""
        import resource
        import numpy as np
        import fastattn
        x = np.ones((1, 360, 360, 16), np.float32)
        small = x[:, :40, :40]
        call = fastattn.neighborhood_attention_vjp
        call(small, small, small, small, (15, 15), relative_bias=np.zeros((29, 29)), num_threads=2,
             wrt=("query", "key", "value", "relative_bias"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call(x, x, x, x, (15, 15), relative_bias=np.zeros((29, 29)), num_threads=2,
             wrt=("query", "key", "value", "relative_bias"))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 4 * x.nbytes / 1024 + 8192, grown
    """)


# -------------------------------------------------------------------------------------------------- arguments


def refuse(error, message, **arguments):
    x = np.ones((2, 6, 7, 4), np.float32)
    good = {"grad_out": x, "query": x, "key": x, "value": x, "kernel_size": (3, 3)}
    out = tuple(np.full(x.shape, 12345.0, np.float32) for _ in range(3))
    with pytest.raises(error, match=f"(?s){message}"):
        fastattn.neighborhood_attention_vjp(**{**good, "out": out, **arguments})
    assert all((o == 12345.0).all() for o in out)


def test_arguments_of_the_function_itself():
    refuse(ValueError, "kernel_size", kernel_size=(7, 3))
    refuse(ValueError, "edge.*clamp", edge="wrap")
    refuse(ValueError, "stride.*kernel_size", stride=4)
    refuse(TypeError, "query", query=np.ones((2, 6, 7, 4), complex))
    refuse(ValueError, "sinks", sinks=np.ones(3))
    refuse(ValueError, "sinks.*softmax", sinks=1.0, activation="relu")


def test_gradients_that_come_in():
    x = np.ones((2, 6, 7, 4), np.float32)
    refuse(ValueError, r"grad_out.*\(2, 6, 7, 3\).*\(2, 6, 7, 4\)", grad_out=x[..., :3])
    refuse((TypeError, ValueError), "grad_out", grad_out=x.astype(complex))
    refuse(ValueError, "grad_lse", grad_lse=x)
    refuse(ValueError, "output.*lse.*lse is missing", output=x)
    refuse(ValueError, "output is missing", lse=x[..., 0])
    refuse(ValueError, "lse", output=x, lse=x)
    for name in ("output", "grad_lse"):
        more = {"output": x, "lse": x[..., 0]} if name == "output" else {name: x[..., 0]}
        refuse(ValueError, f"{name}.*softmax", activation="sigmoid", **more)


def test_names_and_out():
    x = np.ones((2, 6, 7, 4), np.float32)
    refuse(ValueError, "'scale'.*'query', 'key', 'value'", wrt=("query", "key", "scale"))
    refuse(ValueError, "'sinks', which was not given", wrt=("query", "key", "sinks"))
    refuse(ValueError, "'query' twice", wrt=("query", "key", "query"))
    refuse(TypeError, "wrt", wrt=3)
    refuse(ValueError, r"out\[1\].*shape", out=(None, x[0], None))
    refuse(TypeError, r"out\[0\].*float64", out=(x.astype(np.float64), None, None))
    refuse(ValueError, "out has 2 arrays", out=(None, None))
    refuse(ValueError, r"out\[2\] overlaps query", query=x, out=(None, None, x))
    refuse(ValueError, r"out overlaps grad_out", grad_out=x, wrt="key", out=x)
    own = np.empty_like(x)
    refuse(ValueError, r"out\[1\] overlaps out\[0\]", out=(own, own, None))
    assert fastattn.neighborhood_attention_vjp(x, x, x, x, (3, 3), wrt="key", out=own) is own
    assert fastattn.neighborhood_attention_vjp(x, x, x, x, (3, 3), wrt=("key",))[0].shape == x.shape


def test_no_memory():
    x = np.broadcast_to(np.float32(1), (2**28, 2**28, 1))
    with pytest.raises(MemoryError):
        fastattn.neighborhood_attention_vjp(x, x, x, x, (3, 3))
