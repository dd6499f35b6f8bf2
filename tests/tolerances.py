"""How far a result may be from the float64 reference: the accuracy promise, computed from the inputs.

For every row, with eps of the accumulation dtype (float64 for float64 arrays, else float32):

====== =========================================================================================
out    ``eps * (max over seen keys of size + 4) * max over seen keys of |v|`` + storage rounding
lse    ``eps * (4 * max size + 4 + |lse|)``
weight ``eps * (4 * max size + 4)``
====== =========================================================================================

`size` is the sum of the absolute values of all terms of a score, ``scale * sum |q_i k_i| + |bias| + |relative bias| +
|alibi|``: each rounding is at most the fraction eps of it, an error d in a score changes ``exp(score)`` by the fraction
d, and the weights sum to 1. The 4 covers the exponential, the division and the sums.

For other than a plain softmax of a plain sum:

- **softcap** ``c * tanh(s / c)``: an error in s is multiplied by ``1 - tanh^2``, and the capped score is itself
  rounded, so ``size = (1 - tanh^2) * size + |capped|``.
- **sigmoid**: an error d in a score changes a weight by at most the fraction d, as with softmax, but the weights of a
  row sum to W instead of 1: everything is multiplied by W.
- **relu** with n visible keys: an error d in a score changes a weight by d / n, so all n together change the output by
  at most ``max size * max |v|``, plus the rounding of the weights, which sum to W: ``eps * (max size + 4 * W) * max
  |v|``.
- **sparsemax and entmax15**: an error e = eps * size in the scores changes a weight above the threshold by up to 2 e
  (itself, and the threshold, which moves by no more), or 2 e sqrt(weight), so all of them together change the output by
  2 e times their number, or times the sum of sqrt(weight). One more may appear or vanish at the threshold.
- **additive and bilinear scores** have their own sizes, derived by `additive_scores_and_sizes` and
  `bilinear_scores_and_sizes`.

With float64 arrays the reference rounds as much as the library, so the bounds are doubled. With 16-bit arrays the
weights may be rounded to the storage dtype as well.
"""

import numpy as np

import fastattn
from fastattn import reference

# Arguments that determine which keys are visible.
VISIBILITY = ("is_causal", "window_size", "chunk_size", "left_chunks", "query_offset", "key_lengths", "query_lengths",
              "mask", "bias", "relative_bias")  # fmt: skip
# For windows up to this size the band of weights is checked too.
LARGEST_BAND = 500
# Arguments that promote together with query, key and value.
WEIGHTS = ("w_score", "w_query", "w_key")


def accumulation_dtype(dtype):
    """The accumulation dtype, which is also that of lse and weights."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def storage_steps(dtype):
    """Distances from 1 and from 0 to the next number; NumPy's finfo does not know the dtypes of ml_dtypes."""
    if dtype.kind == "f":
        finfo = np.finfo(dtype)
    else:
        import ml_dtypes

        finfo = ml_dtypes.finfo(dtype)
    return float(finfo.eps), float(finfo.smallest_subnormal)


def result_dtype(*arrays):
    """The dtype to which query, key and value promote; integers and bools count as float64."""
    dtypes = [np.asarray(x).dtype for x in arrays]
    return np.result_type(*(np.dtype(np.float64) if d.kind in "iub" else d for d in dtypes))


def assert_within(actual, expected, bound, what):
    """Compare element by element: NaN where expected, infinities where expected, the rest within `bound`."""
    actual = np.asarray(actual, dtype=np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    special = ~np.isfinite(expected)
    np.testing.assert_array_equal(actual[special], expected[special], err_msg=f"{what}: NaN and infinities")
    actual, expected = actual[~special], expected[~special]
    bound = np.broadcast_to(bound, special.shape)[~special]
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(actual - expected)
    good = error <= bound  # false for NaN
    if not good.all():
        worst = np.argmax(np.where(np.isnan(error), np.inf, error / np.maximum(bound, 1e-300)))
        raise AssertionError(
            f"{what}: {np.count_nonzero(~good)} of {good.size} outside the bound; worst: got"
            f" {actual[worst]!r}, expected {expected[worst]!r}, error {error[worst]:.3g},"
            f" bound {bound[worst]:.3g}"
        )


def largest_seen(values, visible):
    """For each row i and channel c the maximum of ``|values[j, c]|`` over the visible keys j: (..., L, E)."""
    values = np.nan_to_num(np.abs(values), nan=0.0, posinf=0.0)
    num_queries, num_keys = visible.shape[-2:]
    if visible.all() or num_keys == 0:
        largest = np.max(values, axis=-2, keepdims=True, initial=0.0)
        return np.broadcast_to(largest, (*values.shape[:-2], num_queries, values.shape[-1]))
    rows = [np.max(values, -2, initial=0.0, where=visible[..., i, :, None]) for i in range(num_queries)]
    return np.stack(rows, axis=-2)


def dot_scores_and_sizes(query, key, eps, *, scale=None):
    """The scaled scores, and for each a size such that its error is at most eps times that; both (..., L, S)."""
    size = reference.dot_scores(np.abs(query), np.abs(key), None if scale is None else abs(float(scale)))
    return reference.dot_scores(query, key, scale), size


def absolute(x, weights=None, bias=None):
    """The sum of the absolute values of all terms in `reference.project`."""
    absolutes = [y if y is None else np.abs(np.asarray(y, dtype=np.float64)) for y in (weights, bias)]
    return reference.project(np.abs(x), *absolutes)


# Roundings of a projected number before tanh, each half an eps of the sum so far: two for the projection (an eps of its
# terms, as for dot products), one for adding b_hidden, one for adding query and key, and one for the logarithms of e^2q
# and e^2k if these are used instead.
ROUNDINGS_INTO_TANH = 5


def additive_scores_and_sizes(query, key, eps, *, w_score, w_query=None, w_key=None, b_hidden=None, scale=None):
    """The same for ``sum_h w_h tanh(x_h)``, with x_h = q_h + k_h of projected queries and keys.

    With ``tanh(x) = 1 - 2 / (1 + e^2x)`` the score is ``sum(w) - sum(2 w_h / (1 + e^2x_h))``. Each term subtracts
    between 0 and 2 w_h from a sum that starts in the middle: no partial sum exceeds sum |w|. Nor does one of ``0 + w_1
    tanh(x_1) + ...``. So an addition costs at most half an eps of sum |w|, all of them hidden / 2 eps.

    Rounding errors within a term are proportional to its own |w_h|; 8 eps of it are enough. A relative error d of p =
    e^2x_h changes ``2 / (1 + p)`` by ``2 d p / (1 + p)^2``, at most d / 2: with d = 8 eps, for two exponentials and
    their product, that is 4. The quotient is at most 2 |w_h|, and half an eps of that for each of three roundings makes
    3; the weight, and its part of sum(w), 1. (Terms may share a division. The products for that add roundings, but
    roundings partly cancel, and there are fewer additions.)

    That is all if q and k are used as given. If they are projected, or b_hidden is added, they have an error of
    ``ROUNDINGS_INTO_TANH / 2`` eps of the absolute values of their terms, which tanh multiplies by ``1 - tanh(x)^2``
    (taken where it is steepest within the error).
    """
    scale = 1.0 if scale is None else float(scale)
    weights = dict(w_score=w_score, w_query=w_query, w_key=w_key, b_hidden=b_hidden)
    scores = reference.additive_scores(query, key, **weights, scale=scale)
    w_score = np.asarray(w_score, dtype=np.float64)
    size = np.full(scores.shape, (w_score.size / 2 + 8) * np.sum(np.abs(w_score)))
    if not (w_query is None and w_key is None and b_hidden is None):
        q, k = reference.project(query, w_query, b_hidden), reference.project(key, w_key)
        q_sizes, k_sizes = absolute(query, w_query, b_hidden), absolute(key, w_key)
        for h, w in enumerate(np.abs(w_score)):
            x = np.abs(q[..., :, None, h] + k[..., None, :, h])
            error = ROUNDINGS_INTO_TANH / 2 * (q_sizes[..., :, None, h] + k_sizes[..., None, :, h])
            # Where tanh is flat, including at infinity, the error vanishes.
            cosh = np.cosh(np.where(np.isinf(x), x, np.maximum(x - eps * error, 0.0)))
            size += np.where(np.isinf(cosh), 0.0, w * error / cosh / cosh)
    return scores, abs(scale) * size


def bilinear_scores_and_sizes(query, key, eps, *, w_query, w_key=None, b_query=None, b_key=None, scale=None):
    """The same for ``(query @ w_query + b_query) . (key @ w_key + b_key)``.

    The sum of the absolute values of all terms, through both projections and their product. A relative error of one
    projection is one of all its products with the other, so absolute values multiply as the numbers do.
    """
    scores = reference.bilinear_scores(query, key, w_query, w_key, b_query=b_query, b_key=b_key, scale=scale)
    if w_key is None:
        w_key, b_key = w_query, b_query if b_key is None else b_key
    query_size, key_size = absolute(query, w_query, b_query), absolute(key, w_key, b_key)
    return scores, reference.dot_scores(query_size, key_size, 1.0 if scale is None else abs(float(scale)))


# For each attention function the matching function above, and the arguments of its score.
SCORES = {
    "dot_product_attention": (dot_scores_and_sizes, ("scale",)),
    "additive_attention": (additive_scores_and_sizes, ("w_score", "w_query", "w_key", "b_hidden", "scale")),
    "bilinear_attention": (bilinear_scores_and_sizes, ("w_query", "w_key", "b_query", "b_key", "scale")),
}


def positions(query, key, **arguments):
    """The position of each query on the key axis, (..., L, 1), whatever else the arguments say."""
    return reference.query_positions(
        query.shape[-2],
        key.shape[-2],
        *(arguments.get(name) for name in ("query_offset", "query_lengths", "key_lengths")),
    )


def sides(**arguments):
    """(left, right) of the window; None for an unbounded side."""
    both = reference.window_sides(arguments.get("window_size"), arguments.get("is_causal", False))
    return None if np.inf in both else both


def score_sizes(name, query, key, eps, *, softcap=None, alibi_slopes=None, bias=None, relative_bias=None, **arguments):
    """`size` of the module's docstring for every pair, (..., L, S); the key heads already repeated."""
    scores_and_sizes, own = SCORES[name]
    scores, size = scores_and_sizes(query, key, eps, **{name: x for name, x in arguments.items() if name in own})
    if softcap is not None:
        # An error this large may move the score to a steeper part of tanh.
        closest = np.maximum(np.abs(scores) - eps * size, 0.0)
        slope = 1 - np.tanh(closest / softcap) ** 2
        size = slope * size + np.abs(softcap * np.tanh(scores / softcap))
    position = positions(query, key, **arguments)
    if alibi_slopes is not None:
        size = size + np.abs(reference.per_row(alibi_slopes) * (position - np.arange(key.shape[-2])))
    if bias is not None:
        size = size + np.abs(np.asarray(bias, dtype=np.float64))
    if relative_bias is not None:
        size = size + np.abs(reference.from_window(relative_bias, position, *sides(**arguments), key.shape[-2]))
    return size


def attention_bounds(name, query, key, value, out, weights, lse, **arguments):
    """The bounds for (out, weights, lse) of the attention function called `name`, given what the reference returned
    (lse None if it has none)."""
    dtype = attention_dtype(query, key, value, **arguments)
    eps = float(np.finfo(accumulation_dtype(dtype)).eps)
    tiny = float(np.finfo(accumulation_dtype(dtype)).smallest_normal)
    activation = arguments.get("activation", "softmax")
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    if arguments.get("enable_gqa"):
        key, value = reference.repeat_heads(query, key, value)

    with np.errstate(all="ignore"):
        visible = reference.visible_keys(
            query.shape[-2],
            key.shape[-2],
            **{rule: x for rule, x in arguments.items() if rule in VISIBILITY},
        )
        visible = np.broadcast_to(visible, weights.shape)
        size = np.where(visible, score_sizes(name, query, key, eps, **arguments), 0.0)
        size = np.max(np.nan_to_num(size), axis=-1, keepdims=True, initial=0.0)
        weight_sum = np.sum(np.nan_to_num(weights), axis=-1, keepdims=True)
        value_max = largest_seen(np.broadcast_to(value, weights.shape[:-2] + value.shape[-2:]), visible)

        if activation == "relu":
            count = np.maximum(np.count_nonzero(visible, axis=-1, keepdims=True), 1)
            out_bound = eps * (size + 4 * weight_sum) * value_max
            weight_bound = eps * (8 * size + 4) / count
        elif activation == "sigmoid":
            # A weight below the smallest normal number counts as 0.
            out_bound = (eps * (size + 4) * weight_sum + tiny * key.shape[-2]) * value_max
            weight_bound = eps * (4 * size + 4)
        elif activation in reference.SPARSE:
            moved = np.nan_to_num(weights) ** (1 - 1 / reference.SPARSE[activation]) * (weights > 0)
            out_bound = eps * (2 * size * (np.sum(moved, axis=-1, keepdims=True) + 1) + 4) * value_max
            weight_bound = eps * (4 * size + 4)
        else:
            out_bound = eps * (size + 4) * value_max
            weight_bound = eps * (4 * size + 4)

        # Rounding to the storage dtype; and underflow, once per key.
        storage, step = (x / 2 for x in storage_steps(dtype))
        out_bound = out_bound + storage * np.nan_to_num(np.abs(out), posinf=0.0) + step
        out_bound = out_bound + tiny * eps * key.shape[-2]
        if dtype.itemsize == 2:
            out_bound = out_bound + storage * weight_sum * value_max
        lse_bound = None if lse is None else eps * (4 * size[..., 0] + 4 + np.abs(lse))

    if dtype == np.float64:
        out_bound, weight_bound = 2 * out_bound, 2 * weight_bound
        lse_bound = None if lse is None else 2 * lse_bound
    return out_bound, np.broadcast_to(weight_bound + tiny, weights.shape), lse_bound


def attention_dtype(query, key, value, **arguments):
    """The dtype of the output, to which query, key, value and weight matrices promote."""
    weights = [arguments[name] for name in WEIGHTS if arguments.get(name) is not None]
    return result_dtype(query, key, value, *weights)


def assert_attention(query, key, value, *, name="dot_product_attention", function=None, **arguments):
    """Call the attention function `name` with and without its extra results; compare everything with the reference.

    `function` replaces the library's, so that a test can show that a wrong one is detected. Returns the output.
    """
    function = function or getattr(fastattn, name)
    with_lse = arguments.get("activation", "softmax") == "softmax"
    theory = {argument: x for argument, x in arguments.items() if argument not in ("out", "num_threads")}
    expected = getattr(reference, name)(query, key, value, **theory, return_weights=True, return_lse=with_lse)
    expected_out, expected_weights = expected[:2]
    expected_lse = expected[2] if with_lse else None
    bounds = attention_bounds(name, query, key, value, expected_out, expected_weights, expected_lse, **theory)
    dtype = attention_dtype(query, key, value, **arguments)

    # The plain call and the one that returns weights may take different paths.
    plain = function(query, key, value, **arguments)
    assert isinstance(plain, np.ndarray)
    assert plain.dtype == dtype
    assert_within(plain, expected_out, bounds[0], "output")

    results = function(query, key, value, **arguments, return_weights=True, return_lse=with_lse)
    assert isinstance(results, tuple)
    assert len(results) == 2 + with_lse
    assert results[0].dtype == dtype
    assert_within(results[0], expected_out, bounds[0], "output beside weights")
    assert results[1].dtype == accumulation_dtype(dtype)
    assert_within(results[1], expected_weights, bounds[1], "weights")
    if with_lse:
        assert results[2].dtype == accumulation_dtype(dtype)
        assert_within(results[2], expected_lse, bounds[2], "lse")
        only_lse = function(query, key, value, **arguments, return_lse=True)
        assert len(only_lse) == 2
        assert_within(only_lse[0], expected_out, bounds[0], "output beside lse")
        assert_within(only_lse[1], expected_lse, bounds[2], "lse without weights")

    window = sides(**arguments)
    if window is not None and sum(window) <= LARGEST_BAND:
        position = positions(query, key, **arguments)
        beside, band = function(query, key, value, **arguments, return_weights="band")
        assert_within(beside, expected_out, bounds[0], "output beside band")
        assert band.dtype == accumulation_dtype(dtype)
        assert_within(band, *(reference.to_window(x, position, *window) for x in (expected_weights, bounds[1])), "band")
    return plain


def linear_bounds(query, key, value, state, out, *, feature_map="elu+1", normalize=None, scale=None, beta=None,
                  calls=1, eps=1e-6, **arguments):  # fmt: skip
    """The bounds for (out, state) of linear attention, given what the reference returned: eps times the number of
    additions that a number goes through, times the same formula with absolute values everywhere.

    Beside the F products of a query's row there are S additions to each number of the state. Each is wrong by half an
    eps at most, but mostly to either side: S / 64 of them count, and 16 for the features and decays. state: that at the
    beginning, or None; calls: those that made it.

    The delta rule feeds errors back, and keys of any size make them grow. There the recurrence itself, in the
    accumulation dtype, shows how far: the bound is 4 times its error, and 8 eps of the largest number.
    """
    dtype = result_dtype(query, key, value)
    real = accumulation_dtype(dtype)
    unit = float(np.finfo(real).eps)
    storage, step = (x / 2 for x in storage_steps(dtype))
    rounding = storage * np.abs(out[0]) + step
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    rules = {**arguments, "feature_map": feature_map, "normalize": normalize, "scale": scale, "beta": beta, "eps": eps}
    if beta is not None:
        plain = recurrence_in(real, query, key, value, state, **rules)
        limits = [4 * np.max(np.abs(a - b), initial=0.0) + 8 * unit * np.max(np.abs(b), initial=0.0)
                  for a, b in zip(plain, out, strict=True)]  # fmt: skip
        return limits[0] + rounding, limits[1]
    if normalize is None:
        normalize = feature_map is not None
    with np.errstate(all="ignore"):
        f_query, f_key = (reference.FEATURE_MAPS.get(feature_map, feature_map)(x) for x in (query, key))
        ones = np.ones((*value.shape[:-1], 1))
        raw = None if state is None else np.asarray(state, dtype=np.float64)
        call = {**arguments, "feature_map": None, "scale": 1.0, "return_state": True}
        memory = None if raw is None else np.abs(raw[..., : value.shape[-1]])
        sums, memory = reference.linear_attention(*map(np.abs, (f_query, f_key, value)), state=memory, **call)
        if normalize:
            z = None if raw is None else raw[..., -1:]
            below = reference.linear_attention(f_query, f_key, ones, state=z, **call)[0] + eps
            sizes = None if z is None else np.abs(z)
            size, z = reference.linear_attention(np.abs(f_query), np.abs(f_key), ones, state=sizes, **call)
            # An error of the denominator is one of the quotient.
            sums = np.where(below == 0, 0.0, (sums + size * np.abs(out[0])) / np.abs(below))
            memory = np.concatenate([memory, z], axis=-1)
        else:
            sums = sums * abs(1 / np.sqrt(max(query.shape[-1], 1)) if scale is None else scale)
    count = unit * (f_key.shape[-1] + 16 + key.shape[-2] / 64 + calls)
    tiny = float(np.finfo(real).smallest_normal)
    return count * sums + rounding + tiny, count * memory + tiny


def recurrence_in(real, query, key, value, state, **rules):
    """The reference's recurrence with all numbers of that dtype: (out, state)."""
    original = reference.linear_recurrence

    def narrow(query, key, value, state, offset, log_decay, beta, **scalars):
        arrays = (x if x is None else x.astype(real) for x in (query, key, value, state))
        log_decay, beta = (x if x is None else x.astype(real) for x in (log_decay, beta))
        return original(*arrays, offset, log_decay, beta, **{n: x if x is None else real.type(x)
                                                            for n, x in scalars.items()})  # fmt: skip

    reference.linear_recurrence = narrow
    try:
        return reference.linear_attention(query, key, value, state=state, return_state=True, **rules)
    finally:
        reference.linear_recurrence = original


def linear_gradient_bounds(grad_out, arrays, expected, *, grad_state=None, feature_map="elu+1", normalize=None,
                           scale=None, beta=None, eps=1e-6, state=None, log_decay=None, enable_gqa=False,
                           **arguments):  # fmt: skip
    """The bounds for the gradients of linear attention by name, given those of the reference: eps times the number of
    roundings that a number goes through, times the same gradients with absolute values everywhere. A normaliser is a
    column of ones beside the values, and the gradient of a denominator another channel of grad_out; what errors of a
    denominator do to both is added.

    What log_decay decays goes on from sums over states in steps of a chunk's keys: there the terms of these count, too.

    With beta the recurrence itself in the accumulation dtype shows how far errors grow, as for the output.
    """
    query, key, value = arrays
    real = accumulation_dtype(result_dtype(query, key, value))
    unit = float(np.finfo(real).eps)
    given = {"query": query, "key": key, "value": value, "log_decay": log_decay, "beta": beta, "state": state}
    given = {name: x for name, x in given.items() if x is not None}
    names = tuple(expected)
    if normalize is None:
        normalize = feature_map is not None and beta is None
    rules = {**arguments, "log_decay": log_decay, "enable_gqa": enable_gqa, "state": state}
    with np.errstate(all="ignore"):
        if beta is not None:
            plain = backwards_in(real, grad_out, *arrays, wrt=names, grad_state=grad_state, beta=beta, scale=scale,
                                 feature_map=feature_map, normalize=normalize, eps=eps, **rules)  # fmt: skip
            bounds = {n: 8 * np.max(np.abs(a - expected[n]), initial=0.0) + 32 * unit * np.max(np.abs(expected[n]),
                      initial=0.0) for n, a in zip(names, plain, strict=True)}  # fmt: skip
        else:
            bounds = absolute_gradients(grad_out, arrays, names, grad_state, feature_map, normalize, scale, eps, rules)
            count = unit * (key.shape[-1] + value.shape[-1] + 32 + (key.shape[-2] + query.shape[-2]) / 64)
            bounds = {name: count * x for name, x in bounds.items()}
    tiny = float(np.finfo(real).smallest_normal)
    for name in names:
        storage, step = (x / 2 for x in storage_steps(result_dtype(given[name])))
        rounding = storage * np.nan_to_num(np.abs(expected[name]), posinf=0.0) + step
        bounds[name] = np.nan_to_num(bounds[name], nan=np.inf) + rounding + tiny * 64
    return bounds


def absolute_gradients(grad_out, arrays, names, grad_state, feature_map, normalize, scale, eps, rules):
    """The sums of absolute values of all terms in each gradient."""
    query, key, value = (np.asarray(x, dtype=np.float64) for x in arrays)
    f, slope = reference.FEATURE_MAPS[feature_map], reference.FEATURE_SLOPES[feature_map]
    q, k, v = f(query), f(key), np.abs(value)
    grad = np.abs(np.asarray(grad_out, dtype=np.float64))
    state = rules["state"]
    state = None if state is None else np.abs(np.asarray(state, dtype=np.float64))
    if normalize:
        call = {**rules, "feature_map": None, "scale": 1.0, "normalize": False}
        ones = np.ones((*v.shape[:-1], 1))
        z = None if rules["state"] is None else np.asarray(rules["state"], dtype=np.float64)[..., -1:]
        below = reference.linear_attention(q, k, ones, **{**call, "state": z}) + eps
        sizes = None if z is None else np.abs(z)
        size = reference.linear_attention(np.abs(q), np.abs(k), ones, **{**call, "state": sizes}) + eps
        above = reference.linear_attention(
            np.abs(q), np.abs(k), v, **{**call, "state": None if state is None else state[..., :-1]}
        )
        spread = np.where(below == 0, 0.0, (1 + 2 * size / np.abs(below)) / np.abs(below))
        share = np.sum(grad * above, axis=-1, keepdims=True)
        share = np.where(below == 0, 0.0, share / np.abs(below))
        grad = np.concatenate([np.broadcast_to(grad, (*share.shape[:-1], grad.shape[-1])), share], axis=-1) * spread
        v = np.concatenate([v, ones], axis=-1)
        scale = 1.0
    scale = abs(1 / np.sqrt(max(query.shape[-1], 1)) if scale is None else scale)
    q, k = np.abs(q), np.abs(k)
    end = None if grad_state is None else np.abs(np.asarray(grad_state, dtype=np.float64))
    absolute_rules = {**rules, "state": state, "scale": scale, "feature_map": None, "normalize": False}
    whole = tuple(dict.fromkeys((*names, "query", "key")))
    found = reference.linear_attention_vjp(grad, q, k, v, wrt=whole, grad_state=end, **absolute_rules)
    bounds = dict(zip(whole, found, strict=True))
    if "log_decay" in names:
        # The terms of a chunk's keys: not more than the largest of so many, of all rows that may stand on one key.
        chunk = max(48, q.shape[-1])
        together = q.size // max(1, q.shape[-1] * q.shape[-2])
        most = sum(np.max(x * bounds[name], initial=0.0) for x, name in ((q, "query"), (k, "key")))
        shared = max(1, together * key.shape[-1] * key.shape[-2] // max(1, np.asarray(rules["log_decay"]).size))
        bounds["log_decay"] = bounds["log_decay"] + min(chunk, key.shape[-2]) * shared * most
    bounds["query"], bounds["key"] = bounds["query"] * np.abs(slope(query)), bounds["key"] * np.abs(slope(key))
    if "value" in names and normalize:
        bounds["value"] = bounds["value"][..., :-1]
    return {name: bounds[name] for name in names}


def backwards_in(real, grad_out, query, key, value, **rules):
    """The reference's way back with all numbers of that dtype."""
    original = reference.linear_recurrence_vjp

    def narrow(grad_out, grad_state, query, key, value, state, offset, log_decay, beta, *, slopes, **scalars):
        arrays = (x if x is None else x.astype(real) for x in (grad_out, grad_state, query, key, value, state))
        log_decay, beta = (x if x is None else x.astype(real) for x in (log_decay, beta))
        slopes = [x.astype(real) for x in slopes]
        return original(*arrays, offset, log_decay, beta, slopes=slopes,
                        **{n: x if x is None else real.type(x) for n, x in scalars.items()})  # fmt: skip

    reference.linear_recurrence_vjp = narrow
    try:
        return reference.linear_attention_vjp(grad_out, query, key, value, **rules)
    finally:
        reference.linear_recurrence_vjp = original


def assert_linear(query, key, value, *, state=None, calls=1, **arguments):
    """Linear attention against the reference, with and without its state; returns (out, state)."""
    rules = {name: x for name, x in arguments.items() if name not in ("out", "num_threads")}
    expected = reference.linear_attention(query, key, value, state=state, return_state=True, **rules)
    bounds = linear_bounds(query, key, value, state, expected, calls=calls, **rules)
    out, new_state = fastattn.linear_attention(query, key, value, state=state, return_state=True, **arguments)
    assert out.dtype == result_dtype(query, key, value)
    assert new_state.dtype == accumulation_dtype(out.dtype)
    assert_within(out, expected[0], bounds[0], "output")
    assert_within(new_state, expected[1], bounds[1], "state")
    alone = fastattn.linear_attention(query, key, value, state=state, **arguments)
    assert isinstance(alone, np.ndarray)
    assert_within(alone, expected[0], bounds[0], "output without state")
    return out, new_state


def assert_linear_gradients(grad_out, query, key, value, *, wrt=None, **arguments):
    """All gradients of linear attention against the reference; returns them by name."""
    names = ("query", "key", "value", "log_decay", "beta", "state")
    given = {"query": query, "key": key, "value": value, **arguments}
    names = wrt or tuple(name for name in names if given.get(name) is not None)
    rules = {name: x for name, x in arguments.items() if name not in ("out", "num_threads")}
    expected = reference.linear_attention_vjp(grad_out, query, key, value, wrt=names, **rules)
    expected = dict(zip(names, expected, strict=True))
    bounds = linear_gradient_bounds(grad_out, (query, key, value), expected, **rules)
    found = fastattn.linear_attention_vjp(grad_out, query, key, value, wrt=names, **arguments)
    assert isinstance(found, tuple)
    for name, gradient in zip(names, found, strict=True):
        assert gradient.dtype == result_dtype(given[name])
        assert_within(gradient, expected[name], bounds[name], f"gradient of {name}")
    return dict(zip(names, found, strict=True))


def assert_softmax(x, axis=-1, *, mask=None, functions=fastattn, **arguments):
    """Compare softmax, log_softmax and logsumexp with the reference: the weight bound, also relative to the weight."""
    dtype = result_dtype(x)
    finfo = np.finfo(accumulation_dtype(dtype))
    factor = 2 if dtype == np.float64 else 1
    x64 = np.asarray(x, dtype=np.float64)
    hidden = False if mask is None else ~np.asarray(mask)
    size = np.where(hidden | ~np.isfinite(x64), 0.0, np.abs(x64))
    size = np.max(size, axis=axis, keepdims=True, initial=0.0)
    lse = reference.logsumexp(x, axis, mask=mask, keepdims=True)
    lse_size = np.nan_to_num(np.abs(lse), posinf=0.0)
    unit = factor * finfo.eps * (4 * size + 4)
    storage, step = (x / 2 for x in storage_steps(dtype))

    expected = reference.softmax(x, axis, mask=mask)
    with np.errstate(invalid="ignore"):
        relative = factor * finfo.eps * (4 * size + 4 + lse_size) * expected
        bound = np.minimum(unit, relative) + storage * expected + step + float(finfo.smallest_normal)
    actual = functions.softmax(x, axis, mask=mask, **arguments)
    assert actual.dtype == dtype
    assert_within(actual, expected, bound, "softmax")

    expected = reference.log_softmax(x, axis, mask=mask)
    bound = unit + storage * np.nan_to_num(np.abs(expected), posinf=0.0)
    actual = functions.log_softmax(x, axis, mask=mask, **arguments)
    assert actual.dtype == dtype
    assert_within(actual, expected, bound, "log_softmax")

    for keepdims in (False, True):
        expected = reference.logsumexp(x, axis, mask=mask, keepdims=keepdims)
        bound = np.reshape(unit + factor * finfo.eps * lse_size, expected.shape)
        actual = functions.logsumexp(x, axis, mask=mask, keepdims=keepdims, **arguments)
        assert np.asarray(actual).dtype == accumulation_dtype(dtype)
        assert_within(actual, expected, bound, f"logsumexp, keepdims={keepdims}")
