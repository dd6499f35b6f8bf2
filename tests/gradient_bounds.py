"""How far a gradient may be from the float64 reference: the accuracy promise of `f_vjp`, computed from the inputs.

Everything is eps times what the same sums give over absolute values. With eps of the accumulation dtype, P the weights,
and `size_i` the largest size (tolerances.py) among the keys that row i sees:

============== ====================================================================================
a_ij           ``sum_c |grad_out_ic * value_jc|``, and b_i its mean over j by weight
error of row i ``e_i = eps * (8 * size_i + 16)``; in 16 bits two half units more, for weights and their gradients
score          ``e_i * P_ij * (a_ij + b_i + |grad_lse_i|)``
query          its sum over keys, times ``|scale * key|``; key: over queries, times ``|scale * query|``
bias           itself, summed where the bias is broadcast; relative bias the same; slopes times the distance
value          ``sum_i e_i * P_ij * |grad_out_i|``
sinks          ``e_i * weight * (b_i + |grad_lse_i|)``; here the sink's own size counts as well
============== ====================================================================================

and one rounding of the array's own dtype. For other than a plain softmax of dot products:

- **softcap, sigmoid and additive scores** have derivatives that are small differences (``1 - tanh ** 2``, ``w * (1 -
  w)``): they may be wrong by 4 eps as such, besides the fraction e_i.
- **relu**: the derivative, ``1 / count`` or 0, takes the place of P. A score within its error of 0 may be on either
  side.
- **sparsemax and entmax15**: the slope, 1 or sqrt(P), takes the place of P. An error d of the scores changes it by up
  to 2 d (not that of sparsemax), and of a key within its error of the threshold it is not known whether it has a
  weight: in such a row each gradient may be off by as much as a gradient can be.
- **additive**: size_i also has twice the largest argument of a tanh, in absolute values, as its derivative changes by
  that fraction.
- **projections**: 8 eps for each of the two on the way.

With float64 arrays the reference rounds as much as the library, so the bounds are doubled.
"""

import functools

import numpy as np
from tolerances import (
    SCORES,
    VISIBILITY,
    WEIGHTS,
    accumulation_dtype,
    assert_within,
    attention_dtype,
    positions,
    score_sizes,
    sides,
    storage_steps,
)

import fastattn
from fastattn import reference

# The differentiable arguments of each function.
EVERYWHERE = ("query", "key", "value", "bias", "relative_bias", "alibi_slopes", "sinks")
NAMES = {
    "dot_product_attention": EVERYWHERE,
    "truncated_attention": EVERYWHERE,
    "additive_attention": (*EVERYWHERE, "w_score", "w_query", "w_key", "b_hidden"),
    "bilinear_attention": (*EVERYWHERE, "w_query", "w_key", "b_query", "b_key"),
    "varlen_attention": ("query", "key", "value", "alibi_slopes", "sinks"),
}
TOKENS = ("query", "key", "value")
# Arguments that determine which keys are visible.
HIDING = (*VISIBILITY, "block_mask", "block_size")


def named(name, call):
    """The names of all arrays of a call that have a gradient."""
    return tuple(n for n in NAMES[name] if call.get(n) is not None)


def size_of(x):
    """Absolute values in float64; what is not finite has no bound, and must not spoil that of the others."""
    return np.nan_to_num(np.abs(np.asarray(x, dtype=np.float64)), nan=0.0, posinf=0.0)


def slopes_and_errors(activation, weights, logits, visible, part, a, size, eps, relative):
    """For other activations than softmax: the error of the scores' gradient, what it counts as, the error of weights.

    a: the gradient of the weights in absolute values; size, relative: size_i and e_i of the module's docstring.
    """
    if activation == "relu":
        count = np.maximum(np.sum(visible, axis=-1, keepdims=True), 1)
        unsure = part & (np.abs(logits) <= 2 * eps * size)
        slope = (part & (logits > 0) | unsure) / count
        return relative * slope * a + unsure * a / count, slope * a, relative * slope
    if activation == "sigmoid":
        slope = weights * (1 - weights)
        return (relative * slope + 4 * eps * (weights > 0)) * a, slope * a, relative * weights
    power = reference.SPARSE[activation]
    largest = np.max(np.where(part, logits, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    threshold = largest / power - np.max(weights, axis=-1, keepdims=True, initial=0.0) ** (1 / power)
    above = np.where(visible & (logits > -np.inf), logits / power - threshold, -np.inf)
    shift = 4 * eps * (size + 1)
    near = above > -shift
    slope = np.where(weights > 0, weights ** (1 - 1 / power), 0.0)
    total = np.maximum(np.sum(slope, axis=-1, keepdims=True), 1e-300)
    count = a + np.max(a, axis=-1, keepdims=True, where=near, initial=0.0)
    if power == 1:
        unsure = np.any(np.abs(above) <= shift, axis=-1, keepdims=True)
        error = relative * slope * count + 2 * near * unsure * count
        return error, slope * count, relative * weights + 2 * shift * near
    share = np.sum(near * count, axis=-1, keepdims=True) / total
    error = relative * slope * count + shift * near * (count + slope * share)
    return error, (slope + shift) * near * count, relative * weights + (2 * slope + shift) * shift * near


def additive_errors(error, count, eps, part, query, key, w_score, *, w_query=None, w_key=None, b_hidden=None,
                    scale=None):  # fmt: skip
    """`reference.additive_scores_vjp` in absolute values, of the error of the scores' gradient; count: its size."""
    error, count = (x * (1.0 if scale is None else abs(float(scale))) for x in (error, count))
    q, k = reference.project(query, w_query, b_hidden), reference.project(key, w_key)
    d_q, d_k = (np.zeros((*error.shape[:-2], *x.shape[-2:])) for x in (q, k))
    w_score = size_of(w_score)
    for h, w in enumerate(w_score):
        tanh = np.tanh(q[..., :, None, h] + k[..., None, :, h])
        d_sum = np.where(part, np.nan_to_num(1 - tanh**2) * error + 4 * eps * count, 0.0) * w
        d_q[..., h], d_k[..., h] = np.sum(d_sum, axis=-1), np.sum(d_sum, axis=-2)
    bounds = {"w_score": np.full(w_score.shape, np.sum(error)), "b_hidden": d_q}
    for name, d, x, weights in (("query", d_q, query, w_query), ("key", d_k, key, w_key)):
        weights = None if weights is None else size_of(weights)
        bounds[name], bounds[f"w_{name}"] = reference.project_vjp(d, size_of(x), weights)
    return bounds


def largest_argument(part, query, key, *, w_score, w_query=None, w_key=None, b_hidden=None, scale=None):
    """Of the tanh in additive scores: the largest sum of absolute values in each row, (..., L, 1)."""
    weights = [None if x is None else size_of(x) for x in (w_query, w_key, b_hidden)]
    q = reference.project(size_of(query), weights[0], weights[2])
    k = reference.project(size_of(key), weights[1])
    units = (q[..., :, None, h] + k[..., None, :, h] for h in range(q.shape[-1]))
    shape = part.shape
    largest = functools.reduce(np.maximum, units, np.zeros(shape))
    return np.max(largest, axis=-1, keepdims=True, initial=0.0, where=part)


def gradient_bounds(name, grad_out, query, key, value, *, dtype, grad_lse=None, **call):
    """The bounds of all gradients of a call by name, but for the rounding to the dtypes of their arrays. dtype: of the
    call."""
    call = {n: x for n, x in call.items() if x is not None}
    if name == "truncated_attention":
        name, window = "dot_product_attention", (call.pop("left"), call.pop("right", 0))
        call["window_size"] = window
    elif name == "varlen_attention":
        return varlen_bounds(grad_out, query, key, value, dtype=dtype, grad_lse=grad_lse, **call)
    real = np.finfo(accumulation_dtype(dtype))
    eps, tiny = float(real.eps), float(real.smallest_normal)
    storage, step = storage_steps(dtype) if dtype.itemsize == 2 else (0.0, 0.0)
    activation, softcap = call.get("activation", "softmax"), call.get("softcap")
    given = {"query": query, "key": key, "value": value, **call}
    _, weights = getattr(reference, name)(**given, return_weights=True)
    weights = size_of(weights)
    grad_out = size_of(grad_out)
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    if call.get("enable_gqa"):
        key, value = reference.repeat_heads(query, key, value)
    num_queries, num_keys = weights.shape[-2:]
    scores_and_sizes, own = SCORES[name]
    own = {n: call[n] for n in own if n in call}

    with np.errstate(all="ignore"):
        scores, score_size = scores_and_sizes(query, key, eps, **own)
        position = positions(query, key, **call)
        both = sides(**call)
        logits = reference.finish_scores(
            np.broadcast_to(scores, weights.shape),
            position,
            **{n: call[n] for n in ("softcap", "alibi_slopes", "bias") if n in call},
        )
        if "relative_bias" in call:
            logits = logits + reference.from_window(call["relative_bias"], position, *both, num_keys)
        visible = reference.visible_keys(num_queries, num_keys, **{n: call[n] for n in HIDING if n in call})
        visible = np.broadcast_to(visible, weights.shape)
        part = visible & (logits != -np.inf)
        size = np.where(visible, size_of(score_sizes(name, query, key, eps, **call)), 0.0)
        size = np.max(size, axis=-1, keepdims=True, initial=0.0)
        if name == "additive_attention":
            size = size + 2 * largest_argument(part, query, key, **own)
        relative = eps * (8 * size + 16) + storage
        a = np.where(part, grad_out @ size_of(value).swapaxes(-1, -2), 0.0)
        d_lse = np.zeros(weights.shape[:-1]) if grad_lse is None else size_of(grad_lse)
        if activation == "softmax":
            mean = np.sum(weights * a, axis=-1, keepdims=True)
            largest = a + mean + d_lse[..., None]
            error, count, weight_error = relative * weights * largest, weights * largest, relative * weights
        else:
            error, count, weight_error = slopes_and_errors(
                activation, weights, np.nan_to_num(logits, neginf=-np.inf), visible, part, a, size, eps, relative
            )
            largest = a + np.max(a, axis=-1, keepdims=True, initial=0.0)
        # Numbers below the least normal one.
        error = np.where(part, error + (tiny + step) * (largest + 1), 0.0)
        weight_error = np.where(part, weight_error + tiny + step, 0.0)

        bounds = {"value": weight_error.swapaxes(-1, -2) @ grad_out, "bias": error}
        if "relative_bias" in call:
            bounds["relative_bias"] = reference.to_window(error, position, *both)
        if "alibi_slopes" in call:
            bounds["alibi_slopes"] = np.sum(error * np.abs(position - np.arange(num_keys)), axis=(-2, -1))
        if "sinks" in call:
            sink = np.broadcast_to(reference.per_row(call["sinks"]), (*weights.shape[:-1], 1))
            every = np.concatenate([np.where(visible, logits, -np.inf), sink], axis=-1)
            weight = size_of(reference.normalise(every, True)[0])[..., -1]
            own_error = (eps * (8 * np.maximum(size, size_of(sink)) + 16) + storage)[..., 0]
            bounds["sinks"] = np.sum((own_error * weight + tiny) * (mean[..., 0] + d_lse), axis=-1)
        if softcap is not None:
            slope, steepest = (
                1 - np.tanh(np.maximum(np.abs(scores) - e * score_size, 0.0) / softcap) ** 2 for e in (0.0, 2 * eps)
            )
            error = np.where(part, size_of(steepest) * error + size_of(steepest - slope + 4 * eps) * count, 0.0)
            count = np.where(part, size_of(slope) * count, 0.0)

        if name == "dot_product_attention":
            scale = None if own.get("scale") is None else abs(float(own["scale"]))
            bounds |= reference.dot_scores_vjp(error, part, size_of(query), size_of(key), scale)
        elif name == "bilinear_attention":
            own = {n: abs(float(x)) if n == "scale" else size_of(x) for n, x in own.items()}
            error = error + 16 * eps * count
            bounds |= reference.bilinear_scores_vjp(error, part, size_of(query), size_of(key), **own)
        else:
            bounds |= additive_errors(error + 16 * eps * count, count, eps, part, query, key, **own)

    if call.get("enable_gqa"):
        for n in ("key", "value"):
            bounds[n] = reference.sum_heads(bounds[n], np.shape(given[n])[-3])
    factor = 2 if dtype == np.float64 else 1
    return {n: factor * reference.sum_to(bounds[n], np.shape(given[n])) + tiny for n in named(name, given)}


def varlen_bounds(grad_out, query, key, value, cu_seqlens_q, cu_seqlens_k=None, *, grad_lse, **call):
    """The same, of each sequence by itself."""
    starts_q = [int(n) for n in cu_seqlens_q]
    starts_k = starts_q if cu_seqlens_k is None else [int(n) for n in cu_seqlens_k]
    bounds = {n: np.zeros(np.shape(x)) for n, x in {"query": query, "key": key, "value": value, **call}.items()}
    for q0, q1, k0, k1 in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        rows, keys = (..., slice(q0, q1), slice(None)), (..., slice(k0, k1), slice(None))
        own_lse = None if grad_lse is None else grad_lse[..., q0:q1]
        parts = gradient_bounds(
            "dot_product_attention", grad_out[rows], query[rows], key[keys], value[keys], grad_lse=own_lse, **call
        )
        for n, part in parts.items():
            bounds[n][{"query": rows, "key": keys, "value": keys}.get(n, ...)] += part
    return bounds


def gradient_dtype(array):
    """The dtype of the gradient of an array: its own, float64 for integers and bools."""
    dtype = np.asarray(array).dtype
    return np.dtype(np.float64) if dtype.kind in "iub" else dtype


def random_gradients(name, call, seed=3):
    """(grad_out, grad_lse or None) for a call: standard normal, in its dtype."""
    rng = np.random.default_rng(seed)
    out = getattr(reference, name)(**call)
    dtype = attention_dtype(**{n: call[n] for n in (*TOKENS, *WEIGHTS) if n in call})
    with_lse = call.get("activation", "softmax") == "softmax"
    grad_lse = rng.standard_normal(out.shape[:-1]).astype(accumulation_dtype(dtype)) if with_lse else None
    return rng.standard_normal(out.shape).astype(dtype), grad_lse


def assert_gradients(name, call, *, grad_out=None, grad_lse=None, wrt=None, function=None):
    """Compare the gradients of a call (arguments by name) with the reference; returns them by name.

    grad_out, grad_lse: random if grad_out is None. wrt: all names if None. `function` replaces the library's, so that a
    test can show that a wrong one is detected.
    """
    function = function or getattr(fastattn, f"{name}_vjp")
    theory = {n: x for n, x in call.items() if n != "num_threads"}
    if grad_out is None:
        grad_out, grad_lse = random_gradients(name, theory)
    names = named(name, call) if wrt is None else wrt
    more = {} if grad_lse is None else {"grad_lse": grad_lse}
    actual = function(grad_out, **call, **more, wrt=names)
    assert isinstance(actual, tuple)
    assert len(actual) == len(names)
    expected = getattr(reference, f"{name}_vjp")(grad_out, **theory, **more, wrt=names)
    dtype = attention_dtype(**{n: theory[n] for n in (*TOKENS, *WEIGHTS) if n in theory})
    bounds = gradient_bounds(name, grad_out, **theory, **more, dtype=dtype)
    for n, ours, theirs in zip(names, actual, expected, strict=True):
        own = gradient_dtype(call[n])
        assert isinstance(ours, np.ndarray), n
        assert ours.dtype == own, n
        storage, step = (x / 2 for x in storage_steps(own))
        assert_within(ours, theirs, bounds[n] + storage * size_of(theirs) + step, f"gradient of {n}")
    return dict(zip(names, actual, strict=True))
