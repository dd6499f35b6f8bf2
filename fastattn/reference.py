"""What every function of fastattn means, in plain float64 NumPy.

These functions have the names, arguments and rules of the compiled ones, but compute and return float64 whatever the
input. They are slow and hold a whole ``(L, S)`` matrix in memory: they are meant to be read, and to test the compiled
library against, which never calls them.

Attention has three steps, and so has this file:

1. which keys a query sees, and how well they match it   ``visible_keys``, ``finish_scores``, and one of
                                                         ``dot_scores``, ``additive_scores``, ``bilinear_scores``
2. scores become weights                                 ``normalise`` (softmax), ``normalise_sparsely``, ``activate``
3. the values are added up by weight                     ``add_up``

A function `f_vjp` goes the same steps backwards, in ``attend_vjp``: from the gradient of a loss for what f returned to
that for what f was given.

Shapes: ``query (..., L, D)``, ``key (..., S, D)``, ``value (..., S, E)``, scores and weights ``(..., L, S)``. Query
rows are i, keys are j. Arguments are checked only as far as the result requires.
"""

import functools
import inspect
import math

import numpy as np

__all__ = [
    "Linear",
    "MultiHeadAttention",
    "additive_attention",
    "additive_attention_vjp",
    "alibi_slopes",
    "apply_rotary",
    "bilinear_attention",
    "bilinear_attention_vjp",
    "dot_product_attention",
    "dot_product_attention_vjp",
    "entmax15",
    "entmax15_vjp",
    "graph_attention",
    "graph_attention_vjp",
    "layer_norm",
    "linear_attention",
    "linear_attention_vjp",
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "logsumexp_vjp",
    "merge_attention",
    "merge_attention_vjp",
    "neighborhood_attention",
    "neighborhood_attention_vjp",
    "pack",
    "quantize_kv",
    "relative_position_buckets",
    "rms_norm",
    "rotary_frequencies",
    "self_attention",
    "self_attention_vjp",
    "sinusoidal_encoding",
    "softmax",
    "softmax_vjp",
    "sparsemax",
    "sparsemax_vjp",
    "truncated_attention",
    "truncated_attention_vjp",
    "unpack",
    "varlen_attention",
    "varlen_attention_vjp",
]


# ---------------------------------------------------------------------------------------------------------
# 1. Which keys a query sees, and how well they match it
# ---------------------------------------------------------------------------------------------------------


def per_row(number_per_batch):
    """Append two axes to a number or an array over the batch axes, to broadcast along ``(L, S)``."""
    return np.asarray(number_per_batch, dtype=np.float64)[..., None, None]


def query_positions(num_queries, num_keys, query_offset, query_lengths, key_lengths):
    """The position of each query on the key axis, ``(..., L, 1)``.

    By default the last query is at the last valid key. Positions are float64, which represents every integer that
    matters here and does not overflow.
    """
    if query_offset is None:
        last_key = per_row(num_keys if key_lengths is None else key_lengths)
        last_query = per_row(num_queries if query_lengths is None else query_lengths)
        offset = last_key - last_query
    else:
        offset = per_row(query_offset)
    return offset + np.arange(num_queries)[:, None]


def window_sides(window_size, is_causal=False):
    """``(left, right)`` of a window: infinite if unbounded; a causal window ends at the query."""
    left, right = window_size if np.ndim(window_size) else (window_size, window_size)
    left, right = (np.inf if side is None or side == -1 else float(side) for side in (left, right))
    return left, 0.0 if is_causal else right


def take_inside(x, index):
    """``x[..., index]`` along the last axis, with indices for each row; 0 where an index is out of range."""
    inside = (index >= 0) & (index < x.shape[-1])
    rows = np.broadcast_shapes(x.shape[:-1], index.shape[:-1])
    # An additional column holds the 0.
    x = np.concatenate([np.broadcast_to(x, (*rows, x.shape[-1])), np.zeros((*rows, 1))], axis=-1)
    index = np.where(inside, index, x.shape[-1] - 1).astype(np.int64)
    return np.take_along_axis(x, np.broadcast_to(index, (*rows, index.shape[-1])), axis=-1)


def from_window(band, position, left, right, num_keys):
    """From window to key axis: entry w of row i goes to the key ``position - left + w``, all others get 0.

    `band` broadcasts to ``(..., L, left + right + 1)``; returns ``(..., L, S)``.
    """
    band = np.asarray(band, dtype=np.float64)
    band = np.broadcast_to(band, np.broadcast_shapes(band.shape, (1, int(left + right) + 1)))
    return take_inside(band, np.arange(num_keys) - (position - left))


def to_window(matrix, position, left, right):
    """The inverse, from ``(..., L, S)`` to ``(..., L, left + right + 1)``; 0 where the window extends beyond the key
    axis."""
    return take_inside(matrix, position - left + np.arange(int(left + right) + 1))


def near_chunks(position, key_position, chunk_size, left_chunks):
    """Whether a key is in the chunk of a position, or in one of the `left_chunks` before it."""
    chunks_before = position // float(chunk_size) - key_position // float(chunk_size)
    most = np.inf if left_chunks is None or left_chunks == -1 else float(left_chunks)
    return (chunks_before >= 0) & (chunks_before <= most)


def visible_keys(
    num_queries,
    num_keys,
    *,
    is_causal=False,
    window_size=None,
    chunk_size=None,
    left_chunks=None,
    query_offset=None,
    key_lengths=None,
    query_lengths=None,
    mask=None,
    block_mask=None,
    block_size=64,
    bias=None,
    relative_bias=None,
):
    """The boolean matrix, broadcastable to ``(..., L, S)``: does query i see key j? Every rule must agree."""
    position = query_positions(num_queries, num_keys, query_offset, query_lengths, key_lengths)
    i = np.arange(num_queries)[:, None]
    j = np.arange(num_keys)

    visible = np.ones((num_queries, num_keys), dtype=bool)
    if key_lengths is not None:
        visible = visible & (j < per_row(key_lengths))
    if query_lengths is not None:
        visible = visible & (i < per_row(query_lengths))
    if is_causal:
        visible = visible & (j <= position)
    if window_size is not None:
        left, right = window_sides(window_size, is_causal)
        visible = visible & (j >= position - left) & (j <= position + right)
    if chunk_size is not None:
        visible = visible & near_chunks(position, j, chunk_size, left_chunks)
    if mask is not None:
        visible = visible & np.asarray(mask)
    if block_mask is not None:
        rows, columns = block_size if np.ndim(block_size) else (block_size, block_size)
        blocks = np.asarray(block_mask)
        shape = (-(-num_queries // rows), -(-num_keys // columns))
        blocks = np.broadcast_to(blocks, np.broadcast_shapes(blocks.shape, shape))
        visible = visible & blocks[..., i // rows, j // columns]
    if bias is not None:
        visible = visible & (np.asarray(bias, dtype=np.float64) != -np.inf)
    if relative_bias is not None:
        sides = window_sides(window_size, is_causal)
        visible = visible & (from_window(relative_bias, position, *sides, num_keys) != -np.inf)
    return visible


def dot_scores(query, key, scale=None):
    """Scaled dot products, ``(..., L, S)`` (Vaswani et al. 2017). With no channels all scores are 0."""
    if scale is None:
        scale = 1 / np.sqrt(max(query.shape[-1], 1))
    return query @ key.swapaxes(-1, -2) * float(scale)


def dequantized(numbers, scale, center=0.0):
    """What int8 numbers mean: ``numbers * scale + center``. The scale broadcasts along tokens and channels, ``(..., S,
    D)``, or has a column for each of n blocks of channels."""
    numbers, scale = np.asarray(numbers, dtype=np.float64), np.asarray(scale, dtype=np.float64)
    if scale.ndim > 1 and scale.shape[-1] > 1:
        scale = np.repeat(scale, numbers.shape[-1] // scale.shape[-1], axis=-1)
    return numbers * scale + np.asarray(0.0 if center is None else center, dtype=np.float64)


def project(x, weights, bias=None):
    """``x @ weights + bias``: from ``(..., D)`` to ``(..., hidden)``. Either may be None."""
    if weights is not None:
        x = x @ np.asarray(weights, dtype=np.float64)
    return x if bias is None else x + np.asarray(bias, dtype=np.float64)


def additive_scores(query, key, w_score, *, w_query=None, w_key=None, b_hidden=None, scale=None):
    """``w_score . tanh(query @ w_query + key @ w_key + b_hidden)``, ``(..., L, S)``.

    A network with one hidden layer scores how well a query and a key match: Bahdanau, Cho and Bengio 2015, "Neural
    machine translation by jointly learning to align and translate", appendix A.1.2. Hidden units are added one by one,
    so that no array has all three axes (L, S, hidden). With no unit all scores are 0.
    """
    query, key = project(query, w_query, b_hidden), project(key, w_key)
    batch_shape = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    scores = np.zeros((*batch_shape, query.shape[-2], key.shape[-2]))
    units = zip(np.asarray(w_score, dtype=np.float64), np.moveaxis(query, -1, 0), np.moveaxis(key, -1, 0), strict=True)
    for w, query_unit, key_unit in units:
        scores += w * np.tanh(query_unit[..., :, None] + key_unit[..., None, :])
    return scores if scale is None else scores * float(scale)


def bilinear_scores(query, key, w_query, w_key=None, *, b_query=None, b_key=None, scale=None):
    """``(query @ w_query + b_query) . (key @ w_key + b_key)``, ``(..., L, S)``; without `w_key` both share `w_query`.

    Luong, Pham and Manning 2015, "Effective approaches to attention-based neural machine translation", call it the
    "general" score, ``query @ w @ key.T``: w is `w_query`, and `w_key` the identity.
    """
    if w_key is None:
        w_key = w_query
        b_key = b_query if b_key is None else b_key
    return dot_scores(project(query, w_query, b_query), project(key, w_key, b_key), 1.0 if scale is None else scale)


def finish_scores(scores, position, *, softcap=None, alibi_slopes=None, bias=None):
    """From scaled score to logit: cap it (Gemma 2), then add distance (ALiBi, Press 2022) and bias."""
    if softcap is not None:
        scores = float(softcap) * np.tanh(scores / float(softcap))
    if alibi_slopes is not None:
        scores = scores - per_row(alibi_slopes) * abs(position - np.arange(scores.shape[-1]))
    if bias is not None:
        scores = scores + np.asarray(bias, dtype=np.float64)
    return scores


# ---------------------------------------------------------------------------------------------------------
# 2. Scores become weights
# ---------------------------------------------------------------------------------------------------------


def normalise(scores, visible, axis=-1, sink=-np.inf):
    """Softmax of the visible scores along `axis`; returns the weights and the log-sum-exp (with the axis kept).

    The largest score is subtracted first, so that nothing overflows. If nothing is visible, or only scores of ``-inf``,
    the weights are 0 and the log-sum-exp is ``-inf``. A `sink` (Xiao 2023) is one more logit in the sum, whose weight
    is discarded.
    """
    scores = np.where(visible, scores, -np.inf)
    largest = np.maximum(np.max(scores, axis=axis, keepdims=True, initial=-np.inf), sink)
    shift = np.where(np.isinf(largest), 0.0, largest)
    terms = np.exp(scores - shift)
    total = np.sum(terms, axis=axis, keepdims=True) + np.exp(sink - shift)
    weights = terms / np.where(total == 0, 1.0, total)
    return np.where(visible, weights, 0.0), shift + np.log(total)


# Those whose weights are exactly 0 but for the largest scores, and the power of a score's distance to the threshold.
SPARSE = {"sparsemax": 1, "entmax15": 2}


def normalise_sparsely(scores, visible, power, axis=-1):
    """Weights ``max(z - t, 0) ** power`` that sum to 1 along `axis`, where z is ``scores / power``.

    Sparsemax (Martins and Astudillo 2016, algorithm 1) and 1.5-entmax (Peters, Niculae and Martins 2019, algorithm 2).
    For the k largest z alone there is a t for which they sum to 1: ``(sum - 1) / k``, or, of squares,
    ``mean - sqrt((1 - sum of squared deviations) / k)``. The right k is the largest whose t is below all k of them.
    """
    if scores.shape[axis] == 0:
        return np.zeros(scores.shape)
    z = np.moveaxis(np.where(visible, scores, -np.inf), axis, -1)
    largest = np.max(z, axis=-1, keepdims=True)
    z = (z - np.where(largest == -np.inf, 0.0, largest)) / power
    descending = -np.sort(-z, axis=-1)
    k = np.arange(1, z.shape[-1] + 1)
    mean = np.cumsum(descending, axis=-1) / k
    if power == 1:
        t = mean - 1 / k
    else:
        t = mean - np.sqrt(1 / k - (np.cumsum(descending**2, axis=-1) / k - mean**2))
    count = np.sum(descending > t, axis=-1, keepdims=True)
    t = np.take_along_axis(t, np.maximum(count, 1) - 1, axis=-1)
    weights = np.where(z == -np.inf, 0.0, np.maximum(z - t, 0.0) ** power)
    weights = np.where(np.isnan(largest), np.nan, weights)
    return np.where(visible, np.moveaxis(weights, -1, axis), 0.0)


def activate(scores, visible, activation):
    """Weights without a softmax over the row: ReLU (Wortsman 2023) or sigmoid (Ramapuram 2024)."""
    if activation == "relu":
        count = np.sum(visible, axis=-1, keepdims=True)
        weights = np.maximum(scores, 0.0) / np.maximum(count, 1)
    elif activation == "sigmoid":
        weights = 1 / (1 + np.exp(-scores))
    else:
        known = "'softmax', 'relu', 'sigmoid', 'sparsemax' or 'entmax15'"
        raise ValueError(f"activation must be {known}, got {activation!r}")
    return np.where(visible, weights, 0.0)


# ---------------------------------------------------------------------------------------------------------
# 3. The values are added up by weight
# ---------------------------------------------------------------------------------------------------------


def add_up(weights, visible, value, is_mean):
    """``weights @ value`` over the visible keys only: 0 * NaN is NaN, so a hidden NaN must be left out.

    The values are halved, and the sum is doubled: rounding may carry a mean of the largest floats slightly above them,
    where it is clipped.
    """
    finite = np.isfinite(value)
    known = np.where(finite, value, 0.0)
    half = weights @ (known / 2)
    if is_mean:
        half = np.clip(half, -np.finfo(np.float64).max / 2, np.finfo(np.float64).max / 2)
    out = 2 * half
    other_axes = (*range(value.ndim - 2), value.ndim - 1)
    for j in np.flatnonzero(~finite.all(axis=other_axes)):
        bad_value = np.where(finite[..., j, None, :], 0.0, value[..., j, None, :])
        out = out + np.where(visible[..., :, j, None], weights[..., :, j, None] * bad_value, 0.0)
    return out


def attend(scores, value, visible, *, sinks=None, activation="softmax", return_weights, return_lse, out):
    """Steps 2 and 3, for finished scores of any kind; shared by all attention functions."""
    if activation != "softmax" and (sinks is not None or return_lse):
        raise ValueError(f"sinks and return_lse need activation='softmax', got {activation!r}")
    batch_shape = np.broadcast_shapes(scores.shape[:-2], value.shape[:-2])
    matrix_shape = batch_shape + scores.shape[-2:]
    visible = np.broadcast_to(visible, matrix_shape)
    scores = np.broadcast_to(np.where(scores == np.inf, np.nan, scores), matrix_shape)

    if activation == "softmax":
        weights, lse = normalise(scores, visible, sink=-np.inf if sinks is None else per_row(sinks))
        weights = np.where(scores == -np.inf, 0.0, weights)  # even in a row of NaN
    elif activation in SPARSE:
        weights, lse = normalise_sparsely(scores, visible, SPARSE[activation]), None
        weights = np.where(scores == -np.inf, 0.0, weights)
        visible = visible & (weights != 0)  # a value of weight 0 does not count, whatever it is
    else:
        weights, lse = activate(scores, visible, activation), None
    result = add_up(weights, visible, value, activation == "softmax" or activation in SPARSE)

    if out is not None:
        out[...] = result
        result = out
    extras = [weights] if return_weights else []
    if return_lse:
        extras.append(lse[..., 0])
    return (result, *extras) if extras else result


# ---------------------------------------------------------------------------------------------------------
# The way back: from the gradient of a result to those of what it was made from
# ---------------------------------------------------------------------------------------------------------


def sum_to(gradient, shape):
    """The way back from broadcasting: sum over the axes that an array of this shape lacks, or in which its size is
    1."""
    added = gradient.ndim - len(shape)
    axes = (*range(added), *(added + a for a, size in enumerate(shape) if size == 1))
    return np.sum(gradient, axis=axes, keepdims=True).reshape(shape)


def sum_heads(gradient, heads, axis=-3):
    """The way back from `repeat_heads`: sum over the query heads that share a key head."""
    axis %= gradient.ndim
    before, count, after = gradient.shape[:axis], gradient.shape[axis], gradient.shape[axis + 1 :]
    return gradient.reshape(*before, heads, count // max(heads, 1), *after).sum(axis=axis + 1)


def as_named(gradients, given, wrt, out):
    """What a `f_vjp` returns: of these gradients those that `wrt` names, each of the shape of the array given, and
    written to `out` if there is one."""
    names, outs = ((wrt,), (out,)) if isinstance(wrt, str) else (wrt, out or [None] * len(wrt))
    results = [
        _into(one, sum_to(gradients[name], np.shape(given[name]))) for name, one in zip(names, outs, strict=True)
    ]
    return results[0] if isinstance(wrt, str) else tuple(results)


def dot_scores_vjp(d_scores, part, query, key, scale=None):
    """A score is ``scale * sum(query_i * key_j)``, and its gradient goes to both factors.

    A function of this kind takes the gradient of the scores and the arguments of the score, and returns gradients by
    name, before they are summed over broadcast axes. `part`: the pairs (i, j) that count; a NaN beyond is left out.
    """
    d_scores = d_scores * (1 / np.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale))
    return {
        "query": add_up(d_scores, part, key, False),
        "key": add_up(d_scores.swapaxes(-1, -2), part.swapaxes(-1, -2), query, False),
    }


def project_vjp(d_projected, x, weights=None):
    """Gradients of x and of the weights of ``x @ weights + bias``; that of the bias is `d_projected` itself."""
    d_x = d_projected if weights is None else d_projected @ np.asarray(weights, dtype=np.float64).T
    return d_x, x.swapaxes(-1, -2) @ d_projected


def additive_scores_vjp(d_scores, part, query, key, w_score, *, w_query=None, w_key=None, b_hidden=None, scale=None):
    """One hidden unit after the other, as in `additive_scores`; the derivative of tanh is ``1 - tanh ** 2``."""
    w_score = np.asarray(w_score, dtype=np.float64)
    d_scores = d_scores if scale is None else d_scores * float(scale)
    q, k = project(query, w_query, b_hidden), project(key, w_key)
    d_w_score = np.zeros(w_score.shape)
    d_q, d_k = (np.zeros((*d_scores.shape[:-2], *x.shape[-2:])) for x in (q, k))
    for h, w in enumerate(w_score):
        tanh = np.tanh(q[..., :, None, h] + k[..., None, :, h])
        d_w_score[h] = np.sum(np.where(part, d_scores * tanh, 0.0))
        d_sum = np.where(part, d_scores * w * (1 - tanh**2), 0.0)
        d_q[..., h] = np.sum(d_sum, axis=-1)
        d_k[..., h] = np.sum(d_sum, axis=-2)
    d_query, d_w_query = project_vjp(d_q, query, w_query)
    d_key, d_w_key = project_vjp(d_k, key, w_key)
    return {"query": d_query, "key": d_key, "w_score": d_w_score, "w_query": d_w_query, "w_key": d_w_key,
            "b_hidden": d_q}  # fmt: skip


def bilinear_scores_vjp(d_scores, part, query, key, w_query, w_key=None, *, b_query=None, b_key=None, scale=None):
    """As for dot products, and back through both projections. What both of them use has two gradients: they are
    added."""
    shares_weights, shares_bias = w_key is None, w_key is None and b_key is None
    if shares_weights:
        w_key, b_key = w_query, b_query if b_key is None else b_key
    projected = project(query, w_query, b_query), project(key, w_key, b_key)
    d_q, d_k = dot_scores_vjp(d_scores, part, *projected, 1.0 if scale is None else scale).values()
    d_query, d_w_query = project_vjp(d_q, query, w_query)
    d_key, d_w_key = project_vjp(d_k, key, w_key)
    d_b_query, d_b_key = (np.sum(x, axis=-2, keepdims=True) for x in (d_q, d_k))
    return {"query": d_query, "key": d_key,
            "w_query": d_w_query + d_w_key if shares_weights else d_w_query, "w_key": d_w_key,
            "b_query": d_b_query + d_b_key if shares_bias else d_b_query, "b_key": d_b_key}  # fmt: skip


def weights_vjp(d_weights, part, weights, logits, visible, activation, grad_lse=0.0):
    """From the gradient of the weights to that of the finished scores.

    A softmax's weight w_j changes with its own score by w_j, and with the score of each key k by ``-w_j * w_k``, so
    that the gradient is ``w_j * (d_w_j - sum_k w_k d_w_k)``. The log-sum-exp changes by w_j.
    """
    if activation == "softmax":
        mean = np.sum(weights * d_weights, axis=-1, keepdims=True)
        d_logits = weights * (d_weights - mean + grad_lse)
    elif activation in SPARSE:
        # A weight that is not 0 changes by this slope times its own score's change less that of the threshold, which
        # is such that all weights still sum to 1. (For sparsemax the slope is 1, but in a row of NaN it is NaN.)
        slope = np.where(part, weights / weights ** (1 / SPARSE[activation]), 0.0)
        d_logits = around_mean(d_weights, slope, -1)
    elif activation == "relu":
        count = np.sum(visible, axis=-1, keepdims=True)
        d_logits = d_weights * np.where(np.isnan(logits), np.nan, logits > 0) / np.maximum(count, 1)
    else:  # sigmoid; 1 - weight would cancel
        d_logits = d_weights * weights / (1 + np.exp(logits))
    return np.where(part, d_logits, 0.0)


def sinks_vjp(d_weights, weights, logits, visible, sinks, grad_lse):
    """What each row gives to its sink, which is one more key, without a value: the gradient of its score."""
    sink = np.broadcast_to(per_row(sinks), (*logits.shape[:-1], 1))
    logits_and_sink = np.concatenate([np.where(visible, logits, -np.inf), sink], axis=-1)
    weight = normalise(logits_and_sink, True)[0][..., -1]
    return np.where(sink[..., 0] == -np.inf, 0.0, weight * (grad_lse - np.sum(weights * d_weights, axis=-1)))


def attend_vjp(
    score,
    score_vjp,
    own,
    grad_out,
    query,
    key,
    value,
    *,
    wrt=("query", "key", "value"),
    output=None,
    lse=None,
    grad_lse=None,
    bias=None,
    relative_bias=None,
    alibi_slopes=None,
    softcap=None,
    sinks=None,
    activation="softmax",
    enable_gqa=False,
    out=None,
    num_threads=None,
    **visibility,
):
    """The gradients that `wrt` names: all steps of `attend_by`, then the same backwards by the chain rule.

    score, score_vjp: such as `dot_scores` and `dot_scores_vjp`. own: their arguments other than query and key, by name.
    A pair (i, j) takes part if query i sees key j with a score above ``-inf`` (and, if weights are sparse, a weight
    that is not 0). Nothing flows through another pair, whatever is stored in its row or column.
    """
    if activation != "softmax" and not (output is None and lse is None and grad_lse is None):
        raise ValueError(f"output, lse and grad_lse need activation='softmax', got {activation!r}")
    given = {"query": query, "key": key, "value": value, "bias": bias, "relative_bias": relative_bias,
             "alibi_slopes": alibi_slopes, "sinks": sinks, **own}  # fmt: skip
    grad_out, query, key, value = (np.asarray(x, dtype=np.float64) for x in (grad_out, query, key, value))
    if enable_gqa:
        key, value = repeat_heads(query, key, value)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    sides = window_sides(visibility.get("window_size"), visibility.get("is_causal", False))
    with np.errstate(all="ignore"):
        # The way there.
        position = query_positions(
            num_queries, num_keys, *(visibility.get(n) for n in ("query_offset", "query_lengths", "key_lengths"))
        )
        scores = np.broadcast_to(score(query, key, **own), (*grad_out.shape[:-1], num_keys))
        logits = finish_scores(scores, position, softcap=softcap, alibi_slopes=alibi_slopes, bias=bias)
        if relative_bias is not None:
            logits = logits + from_window(relative_bias, position, *sides, num_keys)
        logits = np.where(logits == np.inf, np.nan, logits)
        visible = visible_keys(num_queries, num_keys, bias=bias, relative_bias=relative_bias, **visibility)
        visible = np.broadcast_to(visible, logits.shape)
        _, weights = attend(
            logits, value, visible, sinks=sinks, activation=activation, return_weights=True, return_lse=False, out=None
        )

        # The way back, out = weights @ value. What takes no part is 0 from here on, so that it is no NaN in any sum.
        part = visible & (logits != -np.inf)
        if activation in SPARSE:
            part = part & (weights != 0)
        back = part.swapaxes(-1, -2)
        gradients = {"value": add_up(weights.swapaxes(-1, -2), back, grad_out, False)}
        d_weights = np.where(part, grad_out @ value.swapaxes(-1, -2), 0.0)

        # weights = activation(logits)
        d_lse = np.zeros(logits.shape[:-1]) if grad_lse is None else np.asarray(grad_lse, dtype=np.float64)
        d_logits = weights_vjp(d_weights, part, weights, logits, visible, activation, d_lse[..., None])
        if sinks is not None:
            d_sinks = sinks_vjp(d_weights, weights, logits, visible, sinks, d_lse)
            gradients["sinks"] = np.sum(d_sinks, axis=-1)

        # logits = scores - slopes * distance + bias
        gradients["bias"] = d_logits
        if relative_bias is not None:
            gradients["relative_bias"] = to_window(d_logits, position, *sides)
        if alibi_slopes is not None:
            gradients["alibi_slopes"] = -np.sum(d_logits * abs(position - np.arange(num_keys)), axis=(-2, -1))
        if softcap is not None:
            d_logits = np.where(part, d_logits * (1 - np.tanh(scores / float(softcap)) ** 2), 0.0)

        # scores = score(query, key)
        query = np.where(part.any(axis=-1)[..., None], query, 0.0)
        key = np.where(back.any(axis=-1)[..., None], key, 0.0)
        gradients |= score_vjp(d_logits, part, query, key, **own)
        if enable_gqa:
            for name in ("key", "value"):
                gradients[name] = sum_heads(gradients[name], np.shape(given[name])[-3])

    return as_named(gradients, given, wrt, out)


# ---------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------


def softmax(x, axis=-1, *, mask=None, out=None, num_threads=None):
    """``exp(x) / sum(exp(x))`` along `axis`.

    Parameters
    ----------
    x : array_like
    axis : int, tuple of int or None, default: -1
        The axes to sum over; None: all.
    mask : array_like of bool, optional
        Broadcasts to the shape of `x`; False hides an entry.
    out : ndarray, optional
        Receives the result and is returned.
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    ndarray
        The shape of `x`; hidden entries are 0, and so are all entries of a fully hidden row.
    """
    x, visible = _array_and_mask(x, mask)
    with np.errstate(all="ignore"):
        weights, _ = normalise(np.where(x == np.inf, np.nan, x), visible, axis)
    return _into(out, weights)


def softmax_vjp(grad_out, output, axis=-1, *, mask=None, out=None, num_threads=None):
    """The gradient of `softmax`, from what it returned: ``output * (grad_out - sum(output * grad_out))``.

    Parameters
    ----------
    grad_out : array_like
        The gradient of a loss for the output, of the same shape.
    output : array_like
        What `softmax` returned.
    axis, mask, out, num_threads
        As in `softmax`.

    Returns
    -------
    ndarray
        The gradient for `x`. Entries of weight 0 do not count: their gradient is 0, whatever `grad_out` is there.
    """
    weights, visible = _array_and_mask(output, mask)
    return _into(out, around_mean(grad_out, np.where(visible, weights, 0.0), axis, total=1.0))


def around_mean(grad_out, weights, axis, total=None):
    """``weights * (grad_out - mean)`` where there are weights, with the mean by weight along `axis`.

    total: of the weights, if that is known.
    """
    counts = weights != 0
    with np.errstate(all="ignore"):
        grad = np.where(counts, np.asarray(grad_out, dtype=np.float64), 0.0)
        total = np.sum(weights, axis=axis, keepdims=True) if total is None else total
        mean = np.sum(np.where(counts, weights * grad, 0.0), axis=axis, keepdims=True) / total
        return np.where(counts, weights * (grad - mean), 0.0)


def log_softmax(x, axis=-1, *, mask=None, out=None, num_threads=None):
    """``x - logsumexp(x)`` along `axis`: the logarithm of `softmax`, accurate even where that underflows.

    Parameters
    ----------
    x, axis, mask, out, num_threads
        As in `softmax`.

    Returns
    -------
    ndarray
        The shape of `x`; hidden entries are ``-inf``.
    """
    x, visible = _array_and_mask(x, mask)
    with np.errstate(all="ignore"):
        _, lse = normalise(x, visible, axis)
        return _into(out, np.where(visible & (x != -np.inf), x - lse, -np.inf))


def log_softmax_vjp(grad_out, output, axis=-1, *, mask=None, out=None, num_threads=None):
    """The gradient of `log_softmax`, from what it returned: ``grad_out - exp(output) * sum(grad_out)``.

    Parameters
    ----------
    grad_out, output, axis, mask, out, num_threads
        As in `softmax_vjp`; here an output of ``-inf`` does not count.

    Returns
    -------
    ndarray
        The gradient for `x`.
    """
    output, visible = _array_and_mask(output, mask)
    counts = visible & (output != -np.inf)
    with np.errstate(all="ignore"):
        grad = np.where(counts, np.asarray(grad_out, dtype=np.float64), 0.0)
        result = grad - np.exp(output) * np.sum(grad, axis=axis, keepdims=True)
        return _into(out, np.where(counts, result, 0.0))


def logsumexp(x, axis=-1, *, keepdims=False, mask=None, out=None, num_threads=None):
    """``log(sum(exp(x)))`` along `axis`, without overflow.

    Parameters
    ----------
    x, axis, mask, num_threads
        As in `softmax`.
    keepdims : bool, default: False
        Keep the summed axes, with size 1.
    out : ndarray, optional
        Receives the result and is returned.

    Returns
    -------
    ndarray
        The shape of `x` without `axis`; ``-inf`` where nothing is summed.
    """
    x, visible = _array_and_mask(x, mask)
    with np.errstate(all="ignore"):
        _, lse = normalise(x, visible, axis)
    if not keepdims:
        lse = np.squeeze(lse, axis=axis if axis is not None else tuple(range(lse.ndim)))
    return _into(out, lse)


def logsumexp_vjp(grad_out, x, axis=-1, *, keepdims=False, mask=None, out=None, num_threads=None):
    """The gradient of `logsumexp`: ``grad_out * softmax(x)``.

    Parameters
    ----------
    grad_out : array_like
        The gradient of a loss for what `logsumexp` returned, of its shape.
    x, axis, keepdims, mask, num_threads
        As in `logsumexp`. Hidden entries and those of ``-inf`` do not count.
    out : ndarray, optional
        Receives the result and is returned.

    Returns
    -------
    ndarray
        The gradient for `x`.
    """
    x, visible = _array_and_mask(x, mask)
    grad = np.asarray(grad_out, dtype=np.float64)
    if not keepdims and x.ndim:
        grad = np.expand_dims(grad, tuple(range(x.ndim)) if axis is None else axis)
    with np.errstate(all="ignore"):
        return _into(out, np.where(visible & (x != -np.inf), grad * softmax(x, axis, mask=mask), 0.0))


def sparsemax(x, axis=-1, *, mask=None, out=None, num_threads=None):
    """``max(x - t, 0)`` along `axis`, with the t for which that sums to 1 (Martins and Astudillo 2016).

    Parameters
    ----------
    x, axis, mask, out, num_threads
        As in `softmax`.

    Returns
    -------
    ndarray
        The shape of `x`; hidden entries are 0.
    """
    return _sparse(x, axis, mask, out, "sparsemax")


def sparsemax_vjp(grad_out, output, axis=-1, *, mask=None, out=None, num_threads=None):
    """The gradient of `sparsemax`, from what it returned: grad_out minus its mean over the entries that are not 0.

    Parameters
    ----------
    grad_out, output, axis, mask, out, num_threads
        As in `softmax_vjp`.

    Returns
    -------
    ndarray
        The gradient for `x`.
    """
    weights, visible = _array_and_mask(output, mask)
    support = np.where(visible & (weights != 0), np.where(np.isnan(weights), np.nan, 1.0), 0.0)
    return _into(out, around_mean(grad_out, support, axis))


def entmax15(x, axis=-1, *, mask=None, out=None, num_threads=None):
    """``max(x / 2 - t, 0) ** 2`` along `axis`, with the t for which that sums to 1 (Peters et al. 2019).

    Parameters
    ----------
    x, axis, mask, out, num_threads
        As in `softmax`.

    Returns
    -------
    ndarray
        The shape of `x`; hidden entries are 0.
    """
    return _sparse(x, axis, mask, out, "entmax15")


def entmax15_vjp(grad_out, output, axis=-1, *, mask=None, out=None, num_threads=None):
    """The gradient of `entmax15`, from what it returned: that of `sparsemax`, with entries and mean weighted by
    ``sqrt(output)`` (Peters et al. 2019, section 3).

    Parameters
    ----------
    grad_out, output, axis, mask, out, num_threads
        As in `softmax_vjp`.

    Returns
    -------
    ndarray
        The gradient for `x`.
    """
    weights, visible = _array_and_mask(output, mask)
    return _into(out, around_mean(grad_out, np.sqrt(np.where(visible, weights, 0.0)), axis))


def _sparse(x, axis, mask, out, activation):
    x, visible = _array_and_mask(x, mask)
    axes = range(x.ndim) if axis is None else [a % max(x.ndim, 1) for a in np.atleast_1d(axis)]
    others = [a for a in range(x.ndim) if a not in axes]
    # The axes of a row become one, the last.
    order = [*others, *sorted(axes)] if x.ndim else []
    shape = [x.shape[a] for a in order]
    rows = (*shape[: len(others)], int(np.prod(shape[len(others) :])))
    x, visible = (y.transpose(order).reshape(rows) for y in (x, visible))
    with np.errstate(all="ignore"):
        weights = normalise_sparsely(np.where(x == np.inf, np.nan, x), visible, SPARSE[activation])
    return _into(out, weights.reshape(shape).transpose(np.argsort(order)))


def _array_and_mask(x, mask):
    x = np.asarray(x, dtype=np.float64)
    return x, np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)


def _into(out, result):
    if out is None:
        return result
    out[...] = result
    return out


def attend_by(
    score,
    query,
    key,
    value,
    *,
    is_causal=False,
    window_size=None,
    chunk_size=None,
    left_chunks=None,
    query_offset=None,
    key_lengths=None,
    query_lengths=None,
    mask=None,
    block_mask=None,
    block_size=64,
    bias=None,
    relative_bias=None,
    alibi_slopes=None,
    softcap=None,
    sinks=None,
    activation="softmax",
    enable_gqa=False,
    return_weights=False,
    return_lse=False,
    out=None,
    num_threads=None,
):
    """All three steps for any kind of score: ``score(query, key)`` returns the scaled scores, ``(..., L, S)``.

    Its keywords are those of all attention functions except `scale`; they pass them on as ``**rules``.
    """
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    if enable_gqa:
        key, value = repeat_heads(query, key, value)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    with np.errstate(all="ignore"):
        position = query_positions(num_queries, num_keys, query_offset, query_lengths, key_lengths)
        scores = score(query, key)
        # Lengths, slopes, masks and so on have the batch axes of the output, which may be more than those of the
        # scores.
        batch_shape = np.broadcast_shapes(scores.shape[:-2], value.shape[:-2])
        scores = np.broadcast_to(scores, (*batch_shape, num_queries, num_keys))
        scores = finish_scores(scores, position, softcap=softcap, alibi_slopes=alibi_slopes, bias=bias)
        if relative_bias is not None:
            sides = window_sides(window_size, is_causal)
            scores = scores + from_window(relative_bias, position, *sides, num_keys)
        visible = visible_keys(
            num_queries,
            num_keys,
            is_causal=is_causal,
            window_size=window_size,
            chunk_size=chunk_size,
            left_chunks=left_chunks,
            query_offset=query_offset,
            key_lengths=key_lengths,
            query_lengths=query_lengths,
            mask=mask,
            block_mask=block_mask,
            block_size=block_size,
            bias=bias,
            relative_bias=relative_bias,
        )
        results = attend(
            scores,
            value,
            visible,
            sinks=sinks,
            activation=activation,
            return_weights=bool(return_weights),
            return_lse=return_lse,
            out=out,
        )
    if return_weights == "band":
        out, weights, *lse = results
        results = (out, to_window(weights, position, *window_sides(window_size, is_causal)), *lse)
    return results


def repeat_heads(query, key, value):
    """Grouped queries: repeat every key and value head for each query head that reads it."""
    group = query.shape[-3] // max(key.shape[-3], 1)
    return np.repeat(key, group, axis=-3), np.repeat(value, group, axis=-3)


class Held:
    """The default of rules that a layer may hold."""

    def __repr__(self):
        return "<held>"


HELD = Held()
SCALES = ("key_scale", "value_scale", "key_center")
HELD_RULES = ("is_causal", "window_size", "relative_bias", "alibi_slopes", "scale", "softcap", "sinks")


def shows_rules(function, without=(), of=attend_by, held=()):
    """In the signature of a function, for help(), replace its ``**keywords`` by those of another, `of`; held: those
    whose default is what a layer holds."""
    own = inspect.signature(function).parameters
    rules = inspect.signature(of).parameters
    added = [p for p in rules.values() if p.kind is p.KEYWORD_ONLY and p.name not in (*own, *without)]
    added = [p.replace(default=HELD) if p.name in held else p for p in added]
    own = [p for p in own.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = inspect.Signature([*own, *added])
    return function


shows_rules(attend_vjp, without=("return_weights", "return_lse"))
shows_gradients = functools.partial(shows_rules, of=attend_vjp)


@shows_rules
def dot_product_attention(
    query,
    key,
    value,
    *,
    scale=None,
    key_scale=None,
    value_scale=None,
    key_center=None,
    **rules,
):
    """Scaled dot-product attention, ``softmax(query @ key.T * scale) @ value`` (Vaswani et al. 2017).

    A score goes through ``* scale``, the soft cap, ``+ alibi + bias + relative bias``, the visibility rules, the
    activation, and the weighted sum, in that order.

    Parameters
    ----------
    query : array_like, shape (..., L, D)
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
        The leading axes are batch axes and broadcast; axis -3 is the head axis.
    is_causal : bool, default: False
        See only keys at or before the query's position.
    window_size : int or (left, right), optional
        See only keys from ``position - left`` to ``position + right``; None or -1 is unbounded.
    chunk_size, left_chunks : int, optional
        With the key axis split into chunks, see only the one that the position is in and the `left_chunks` before it;
        None or -1 is unbounded.
    query_offset : int or array of int, optional
        Position of query 0 on the key axis. Default: the last valid query is at the last valid key.
    key_lengths, query_lengths : int or array of int over the batch axes, optional
        Keys past the length are hidden, queries past it see nothing.
    mask : array_like of bool, optional
        Broadcasts to ``(..., L, S)``; True means attend.
    bias : array_like of float, optional
        Broadcasts to ``(..., L, S)``; added to the score. ``-inf`` hides a key.
    relative_bias : array_like of float, optional
        Broadcasts to ``(..., L, left + right + 1)``, with the sides of `window_size`, or 0 on the right if causal;
        entry w is added to the score of the key at ``position - left + w``. ``-inf`` hides a key (Shaw 2018, T5).
    alibi_slopes : array_like, optional
        Over the batch axes; adds ``-slope * abs(query position - key position)`` (Press et al. 2022).
    scale : float, optional
        Default ``1 / sqrt(D)``.
    softcap : float, optional
        ``softcap * tanh(score / softcap)``.
    sinks : array_like, optional
        Over the batch axes; one more logit in the softmax's sum, with no value (Xiao et al. 2023).
    activation : {"softmax", "relu", "sigmoid", "sparsemax", "entmax15"}
        relu gives ``max(score, 0) / number of visible keys``. With sparsemax and entmax15 a value of weight 0 does not
        count, be it NaN.
    enable_gqa : bool, default: False
        Query head h reads key head ``h // g``, with g query heads per key head (Ainslie et al. 2023).
    key_scale, value_scale, key_center : array_like or float, optional
        Keys and values are int8 then: ``key * key_scale + key_center`` and ``value * value_scale`` are meant, with a
        scale for each token, channel, block of channels of a token, or one for all.
    return_weights : bool or "band", default: False
        Return the weights ``(..., L, S)`` too; "band": ``(..., L, left + right + 1)``, placed as in `relative_bias`.
    return_lse : bool, default: False
        Return the log-sum-exp ``(..., L)`` too, after the weights.
    out : ndarray, optional
        Receives the output and is returned.
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    ndarray (..., L, E), or a tuple (out[, weights][, lse])
        A row that sees nothing has output 0, weights 0 and log-sum-exp ``-inf`` (with a sink: the sink).
    """
    if key_scale is not None:
        key, value = dequantized(key, key_scale, key_center), dequantized(value, value_scale)
    return attend_by(
        lambda query, key: dot_scores(query, key, scale),
        query,
        key,
        value,
        **rules,
    )


def quantize_kv(key, value, *, center=None, block=None, dtype=np.int8, scale_dtype=np.float32):
    """Keys and values in 8 bits, with a scale for each token, or for each block of its channels.

    Parameters
    ----------
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
    center : "mean" or array_like, shape (..., 1, D), optional
        Taken off the keys first; the mean is that over the tokens.
    block : int, optional
        Channels that share a scale; default all.
    dtype, scale_dtype : dtype_like
        Of the numbers, int8, and of the scales.

    Returns
    -------
    key, value, key_scale, value_scale, key_center
        As `dot_product_attention` takes them.
    """
    key, value = (np.asarray(x, dtype=np.float64) for x in (key, value))
    if isinstance(center, str):
        center = (
            np.mean(key, axis=-2, keepdims=True) if key.shape[-2] else np.zeros((*key.shape[:-2], 1, key.shape[-1]))
        )
    if center is not None:
        center = np.asarray(center, dtype=np.float32)
        key = key - center
    (key, key_scale), (value, value_scale) = (quantized(x, block, scale_dtype) for x in (key, value))
    return key.astype(dtype), value.astype(dtype), key_scale, value_scale, center


def quantized(x, block, scale_dtype):
    """Integers from -127 to 127, half to even, and their scales: the largest magnitude of a block is 127 of them.

    The scale is rounded to its dtype before it divides, and up where half a scale would not reach that magnitude any
    more, as where float16 has few digits. It is no smaller than the smallest of its dtype, in float32 and bfloat16 than
    the smallest normal one. A block of zeros has the scale 0.
    """
    count = x.shape[-1] // block if block else 1
    blocks = x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
    top = np.max(np.abs(blocks), axis=-1, initial=0.0)
    scale_dtype = np.dtype(scale_dtype).type
    smallest = 2.0**-24 if scale_dtype == np.float16 else 2.0**-126
    with np.errstate(all="ignore"):
        scale = np.maximum(top / 127, smallest).astype(scale_dtype)
        up = np.nextafter(scale, scale_dtype(np.inf)) if scale_dtype == np.float16 else scale
        scale = np.where(127.5 * scale.astype(np.float64) < top, up, scale)
        scale = np.where(top == 0, scale_dtype(0), scale)
        share = blocks / np.where(top == 0, 1.0, scale.astype(np.float64))[..., None]
    return np.clip(np.rint(share), -127, 127).reshape(x.shape), scale


@shows_gradients
def dot_product_attention_vjp(
    grad_out,
    query,
    key,
    value,
    *,
    scale=None,
    **rules,
):
    """The gradients of a loss for arrays given to `dot_product_attention`, from its gradient for what that returned.

    vjp is short for vector-Jacobian product. The functions `f_vjp` for other attention differ in their arrays only.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient of the loss for the output.
    query, key, value
        As in `dot_product_attention`.
    wrt : str or tuple of str, default: ("query", "key", "value")
        Names of arguments that were given, also of bias, relative_bias, alibi_slopes and sinks.
    output, lse : array_like, optional
        What the call of `dot_product_attention` returned. Accepted and ignored here.
    grad_lse : array_like, shape (..., L), optional
        Gradient of the loss for the log-sum-exp.
    scale, **rules
        As in `dot_product_attention`.
    out : ndarray, or tuple of ndarray or None, optional
        Receives the gradients.

    Returns
    -------
    tuple of ndarray, or ndarray if `wrt` is one name
        Each of the shape of its array: where that was broadcast, the sum. Exactly 0 where a query sees no key, or a key
        is not seen; so is, for one pair of them, the gradient of a score of ``-inf``.
    """
    return attend_vjp(
        dot_scores,
        dot_scores_vjp,
        {"scale": scale},
        grad_out,
        query,
        key,
        value,
        **rules,
    )


@shows_rules
def additive_attention(
    query,
    key,
    value,
    w_score,
    *,
    w_query=None,
    w_key=None,
    b_hidden=None,
    scale=None,
    **rules,
):
    """Additive attention, ``score = w_score . tanh(query @ w_query + key @ w_key + b_hidden)`` (Bahdanau et al. 2015).

    Everything but the score is as in `dot_product_attention`.

    Parameters
    ----------
    query : array_like, shape (..., L, D_query)
    key : array_like, shape (..., S, D_key)
    value : array_like, shape (..., S, E)
        The leading axes are batch axes and broadcast; axis -3 is the head axis.
    w_score : array_like, shape (hidden,)
        The weight of each hidden unit.
    w_query : array_like, shape (D_query, hidden), optional
    w_key : array_like, shape (D_key, hidden), optional
        The projections. One that is omitted is the identity (Keras' form); D_query or D_key is then `hidden`.
    b_hidden : array_like, shape (hidden,), optional
        Added to each sum of a projected query and a projected key.
    scale : float, optional
        Default 1.
    **rules
        As in `dot_product_attention`.

    Returns
    -------
    ndarray (..., L, E), or a tuple (out[, weights][, lse])
    """

    def scores(query, key):
        return additive_scores(query, key, w_score, w_query=w_query, w_key=w_key, b_hidden=b_hidden, scale=scale)

    return attend_by(
        scores,
        query,
        key,
        value,
        **rules,
    )


@shows_gradients
def additive_attention_vjp(
    grad_out,
    query,
    key,
    value,
    w_score,
    *,
    w_query=None,
    w_key=None,
    b_hidden=None,
    scale=None,
    **rules,
):
    """The gradients for `additive_attention`, also those of w_score, w_query, w_key and b_hidden.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient of the loss for the output.
    query, key, value, w_score, w_query, w_key, b_hidden, scale
        As in `additive_attention`.
    **rules
        As in `dot_product_attention_vjp`.

    Returns
    -------
    tuple of ndarray, or ndarray if `wrt` is one name
    """
    own = {"w_score": w_score, "w_query": w_query, "w_key": w_key, "b_hidden": b_hidden, "scale": scale}
    return attend_vjp(
        additive_scores,
        additive_scores_vjp,
        own,
        grad_out,
        query,
        key,
        value,
        **rules,
    )


@shows_rules
def bilinear_attention(
    query,
    key,
    value,
    w_query,
    w_key=None,
    *,
    b_query=None,
    b_key=None,
    scale=None,
    **rules,
):
    """Bilinear attention, ``score = (query @ w_query + b_query) . (key @ w_key + b_key)`` (Luong et al. 2015).

    Everything but the score is as in `dot_product_attention`.

    Parameters
    ----------
    query : array_like, shape (..., L, D_query)
    key : array_like, shape (..., S, D_key)
    value : array_like, shape (..., S, E)
        The leading axes are batch axes and broadcast; axis -3 is the head axis.
    w_query : array_like, shape (D_query, hidden)
    w_key : array_like, shape (D_key, hidden), optional
        The projections. Without `w_key` the key is projected as the query is, by `w_query` and, unless `b_key` is
        given, `b_query`.
    b_query, b_key : array_like, shape (hidden,), optional
        Added to the projections.
    scale : float, optional
        Default 1.
    **rules
        As in `dot_product_attention`.

    Returns
    -------
    ndarray (..., L, E), or a tuple (out[, weights][, lse])
    """

    def scores(query, key):
        return bilinear_scores(query, key, w_query, w_key, b_query=b_query, b_key=b_key, scale=scale)

    return attend_by(
        scores,
        query,
        key,
        value,
        **rules,
    )


@shows_gradients
def bilinear_attention_vjp(
    grad_out,
    query,
    key,
    value,
    w_query,
    w_key=None,
    *,
    b_query=None,
    b_key=None,
    scale=None,
    **rules,
):
    """The gradients for `bilinear_attention`, also those of w_query, w_key, b_query and b_key.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient of the loss for the output.
    query, key, value, w_query, w_key, b_query, b_key, scale
        As in `bilinear_attention`. What is used for the key too has the sum of both gradients.
    **rules
        As in `dot_product_attention_vjp`.

    Returns
    -------
    tuple of ndarray, or ndarray if `wrt` is one name
    """
    own = {"w_query": w_query, "w_key": w_key, "b_query": b_query, "b_key": b_key, "scale": scale}
    return attend_vjp(
        bilinear_scores,
        bilinear_scores_vjp,
        own,
        grad_out,
        query,
        key,
        value,
        **rules,
    )


@functools.partial(shows_rules, without=("window_size", "chunk_size", "left_chunks"), of=dot_product_attention)
def truncated_attention(
    query,
    key,
    value,
    left,
    right=0,
    *,
    scale=None,
    **rules,
):
    """Dot-product attention to `left` keys before a query's position and `right` after it (Povey et al. 2018).

    Parameters
    ----------
    query : array_like, shape (..., L, D)
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
    left, right : int
        The window, besides the key at the position itself; None or -1 is unbounded.
    **rules
        As in `dot_product_attention`.

    Returns
    -------
    ndarray (..., L, E), or a tuple (out[, weights][, lse])
    """
    return dot_product_attention(
        query,
        key,
        value,
        window_size=(left, right),
        scale=scale,
        **rules,
    )


@functools.partial(shows_gradients, without=("window_size", "chunk_size", "left_chunks"))
def truncated_attention_vjp(
    grad_out,
    query,
    key,
    value,
    left,
    right=0,
    *,
    scale=None,
    **rules,
):
    """The gradients for `truncated_attention`.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient of the loss for the output.
    query, key, value, left, right
        As in `truncated_attention`.
    **rules
        As in `dot_product_attention_vjp`.

    Returns
    -------
    tuple of ndarray, or ndarray if `wrt` is one name
    """
    return dot_product_attention_vjp(
        grad_out,
        query,
        key,
        value,
        window_size=(left, right),
        scale=scale,
        **rules,
    )


# Rules that do not apply to packed sequences.
NOT_PACKED = (
    *("chunk_size", "left_chunks", "query_offset", "key_lengths", "query_lengths"),
    *("mask", "block_mask", "block_size", "bias", "relative_bias", "return_weights"),
)


@functools.partial(shows_rules, without=NOT_PACKED)
def varlen_attention(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k=None,
    *,
    scale=None,
    return_lse=False,
    out=None,
    **rules,
):
    """Attention within each of several sequences that are packed one after the other.

    Parameters
    ----------
    query : array_like, shape (..., heads, total_q, D)
    key : array_like, shape (..., heads, total_k, D)
    value : array_like, shape (..., heads, total_k, E)
    cu_seqlens_q : array_like of int, shape (number of sequences + 1,)
        Where the sequences begin and end, ``[0, n1, n1 + n2, ..., total_q]``.
    cu_seqlens_k : array_like of int, optional
        The same for keys; default `cu_seqlens_q`.
    **rules
        As in `dot_product_attention`, except those in `NOT_PACKED`; positions restart in each sequence.

    Returns
    -------
    ndarray (..., heads, total_q, E), or a tuple (out, lse)
    """
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    starts_q = [int(n) for n in cu_seqlens_q]
    starts_k = starts_q if cu_seqlens_k is None else [int(n) for n in cu_seqlens_k]

    outs, lses = [], []
    # The empty sequence at the end gives the result its shape if there is no other.
    for q0, q1, k0, k1 in zip(
        starts_q, [*starts_q[1:], starts_q[-1]], starts_k, [*starts_k[1:], starts_k[-1]], strict=True
    ):
        parts = dot_product_attention(
            query[..., q0:q1, :],
            key[..., k0:k1, :],
            value[..., k0:k1, :],
            scale=scale,
            return_lse=return_lse,
            **rules,
        )
        outs.append(parts[0] if return_lse else parts)
        lses.append(parts[1] if return_lse else None)

    result = _into(out, np.concatenate(outs, axis=-2))
    return (result, np.concatenate(lses, axis=-1)) if return_lse else result


def pack(x, lengths):
    """The first tokens of each sequence of a batch, one after the other.

    Parameters
    ----------
    x : array_like, shape (B, S, ...)
    lengths : array_like of int, shape (B,)

    Returns
    -------
    ndarray (sum(lengths), ...), and where each sequence begins and ends in it, ``[0, n1, n1 + n2, ...]``
    """
    x, lengths = np.asarray(x), [int(n) for n in lengths]
    kept = [x[b, t] for b, n in enumerate(lengths) for t in range(n)]
    packed = np.stack(kept) if kept else np.zeros((0, *x.shape[2:]), x.dtype)
    return packed, np.array([sum(lengths[:b]) for b in range(len(lengths) + 1)])


def unpack(packed, cu_seqlens, length=None):
    """The batch of packed sequences, with zeros behind each.

    Parameters
    ----------
    packed : array_like, shape (total, ...)
    cu_seqlens : array_like of int, shape (B + 1,)
    length : int, optional
        S; default the length of the longest.

    Returns
    -------
    ndarray (B, S, ...)
    """
    packed = np.asarray(packed)
    counts = np.diff(cu_seqlens)
    x = np.zeros((len(counts), max(counts, default=0) if length is None else length, *packed.shape[1:]), packed.dtype)
    for b, n in enumerate(counts):
        for t in range(n):
            x[b, t] = packed[cu_seqlens[b] + t]
    return x


@functools.partial(shows_gradients, without=NOT_PACKED)
def varlen_attention_vjp(
    grad_out,
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k=None,
    *,
    wrt=("query", "key", "value"),
    grad_lse=None,
    scale=None,
    out=None,
    **rules,
):
    """The gradients for `varlen_attention`: those of each sequence by itself; slopes and sinks have their sum.

    Parameters
    ----------
    grad_out : array_like, shape (..., heads, total_q, E)
        Gradient of the loss for the output.
    query, key, value, cu_seqlens_q, cu_seqlens_k
        As in `varlen_attention`.
    wrt : str or tuple of str, default: ("query", "key", "value")
        Also alibi_slopes and sinks.
    grad_lse : array_like, shape (..., heads, total_q), optional
        Gradient of the loss for the log-sum-exp.
    **rules
        As in `dot_product_attention_vjp`, except those in `NOT_PACKED`.

    Returns
    -------
    tuple of ndarray, or ndarray if `wrt` is one name
    """
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    grad_out, query, key, value = (np.asarray(x, dtype=np.float64) for x in (grad_out, query, key, value))
    given = {"query": query, "key": key, "value": value, **rules}
    gradients = {name: np.zeros(np.shape(given[name])) for name in names}
    starts_q = [int(n) for n in cu_seqlens_q]
    starts_k = starts_q if cu_seqlens_k is None else [int(n) for n in cu_seqlens_k]

    for q0, q1, k0, k1 in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        parts = dot_product_attention_vjp(
            grad_out[..., q0:q1, :],
            query[..., q0:q1, :],
            key[..., k0:k1, :],
            value[..., k0:k1, :],
            wrt=names,
            grad_lse=None if grad_lse is None else np.asarray(grad_lse)[..., q0:q1],
            scale=scale,
            **rules,
        )
        rows = {"query": slice(q0, q1), "key": slice(k0, k1), "value": slice(k0, k1)}
        for name, part in zip(names, parts, strict=True):
            gradients[name][(..., rows[name], slice(None)) if name in rows else ...] += part

    outs = (out,) if isinstance(wrt, str) else out or [None] * len(names)
    results = tuple(_into(one, gradients[name]) for name, one in zip(names, outs, strict=True))
    return results[0] if isinstance(wrt, str) else results


def neighbors(i, num_pixels, kernel_size, dilation, stride, is_causal, edge):
    """What pixel i sees along an axis of space: `kernel_size` pixels, whether each is seen, and how far it lies from i.

    Pixels that are a multiple of `dilation` apart form a residue class, and see nothing but each other. Within it,
    `stride` pixels side by side share one kernel, that of their leader: the one in their middle, or the last, if
    causal. The distance counts in steps of the dilation.
    """
    rest, place = i % dilation, i // dilation
    size = len(range(rest, num_pixels, dilation))
    leader = place // stride * stride + (stride - 1 if is_causal else stride // 2)
    leader = min(leader, size - 1)
    if is_causal:
        first = leader - kernel_size + 1
    else:
        first = leader - kernel_size // 2
        if edge == "clamp":
            first = max(0, min(first, size - kernel_size))
    places = first + np.arange(kernel_size)
    seen = (places >= 0) & (places < size)
    if is_causal:
        seen = seen & (places <= place)
    return np.where(seen, places, place) * dilation + rest, seen, places - place


def neighborhoods(space, kernel_size, dilation, stride, is_causal, edge):
    """For each pixel, in a row: its number, the numbers of the keys of its kernel, which of them it sees, and where the
    bias of each stands in a table, for each axis. A neighbourhood is the product over the axes."""
    axes = len(kernel_size)
    settings = [np.broadcast_to(x, axes).tolist() for x in (kernel_size, dilation, stride, is_causal)]
    for i, pixel in enumerate(np.ndindex(*space)):
        along = [neighbors(at, n, *axis, edge) for at, n, *axis in zip(pixel, space, *settings, strict=True)]
        index, seen, distance = (np.meshgrid(*x, indexing="ij") for x in zip(*along, strict=True))
        keys = np.ravel_multi_index([x.ravel() for x in index], space)
        entries = (np.clip(x.ravel() + k - 1, 0, 2 * k - 2) for x, k in zip(distance, kernel_size, strict=True))
        yield i, keys, np.all([x.ravel() for x in seen], axis=0), tuple(entries)


def neighborhood_attention(
    query,
    key,
    value,
    kernel_size,
    *,
    dilation=1,
    stride=1,
    is_causal=False,
    edge="clamp",
    relative_bias=None,
    scale=None,
    softcap=None,
    sinks=None,
    activation="softmax",
    enable_gqa=False,
    return_weights=False,
    return_lse=False,
    out=None,
    num_threads=None,
):
    """Attention of each pixel to the pixels around it (Hassani et al. 2023, "Neighborhood attention transformer").

    Parameters
    ----------
    query, key, value : array_like, shapes (..., *space, D), (..., *space, D), (..., *space, E)
        One, two or three axes of space: as many as `kernel_size` has entries.
    kernel_size, dilation, stride : int or sequence of int
        For all axes of space, or one an axis (kernel_size: an int means one axis). See `neighbors`.
    is_causal : bool or sequence of bool
        The kernel ends at the pixel, along each such axis.
    edge : {'clamp', 'truncate'}
        At an edge the kernel moves inwards, or what is outside is left out.
    relative_bias : array_like, broadcasts to (..., 2 k - 1, ...), optional
        Added to the score: entry (key - query) / dilation + k - 1 along each axis.
    scale, softcap, sinks, activation, enable_gqa, return_weights, return_lse, out
        As in `dot_product_attention`. The weights have shape (..., *space, *kernel_size).
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    ndarray (..., *space, E), or a tuple (out[, weights][, lse])
    """
    kernel_size = np.atleast_1d(kernel_size)
    axes = len(kernel_size)
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    space = query.shape[-axes - 1 : -1]
    # Pixels in a row, as the tokens of a sequence.
    query, key, value = (
        x.reshape(*x.shape[: -axes - 1], int(np.prod(space)), x.shape[-1]) for x in (query, key, value)
    )
    if enable_gqa and query.ndim > 2:
        key, value = repeat_heads(query, key, value)
    batch_shape = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    results = []
    for i, keys, visible, entries in neighborhoods(space, kernel_size, dilation, stride, is_causal, edge):
        with np.errstate(all="ignore"):
            scores = finish_scores(dot_scores(query[..., i, None, :], key[..., keys, :], scale), None, softcap=softcap)
            if relative_bias is not None:
                table = np.asarray(relative_bias, dtype=np.float64)
                table = np.broadcast_to(table, (*table.shape[:-axes], *(2 * kernel_size - 1)))
                bias = table[(..., None, *entries)] if table.ndim > axes else table[entries]
                scores, visible = scores + bias, visible & (bias != -np.inf)
            scores = np.broadcast_to(scores, (*batch_shape, 1, keys.size))
            results.append(
                attend(
                    scores,
                    value[..., keys, :],
                    visible,
                    sinks=sinks,
                    activation=activation,
                    return_weights=True,
                    return_lse=return_lse,
                    out=None,
                )
            )
    trailing = ((value.shape[-1],), tuple(kernel_size), ())
    outs, weights, *lse = (
        np.concatenate(part, axis=len(batch_shape)).reshape(*batch_shape, *space, *shape)
        for part, shape in zip(zip(*results, strict=True), trailing, strict=False)
    )
    result = _into(out, outs)
    extras = [weights] * return_weights + lse
    return (result, *extras) if extras else result


def neighborhood_attention_vjp(
    grad_out,
    query,
    key,
    value,
    kernel_size,
    *,
    dilation=1,
    stride=1,
    is_causal=False,
    edge="clamp",
    relative_bias=None,
    scale=None,
    softcap=None,
    sinks=None,
    activation="softmax",
    enable_gqa=False,
    wrt=("query", "key", "value"),
    output=None,
    lse=None,
    grad_lse=None,
    out=None,
    num_threads=None,
):
    """Gradients of `neighborhood_attention` for the arguments named in `wrt`, from that of a loss for its output.

    Pixel by pixel: its weights, the gradients of these (products of grad_out and values), the gradients of its scores,
    and what they give to each array. A pair that does not take part gives nothing, whatever is stored there.

    Parameters
    ----------
    grad_out : array_like (..., *space, E)
        Gradient of the loss for the output.
    query, key, value, kernel_size, dilation, stride, is_causal, edge, relative_bias
    scale, softcap, sinks, activation, enable_gqa
        As in `neighborhood_attention`.
    wrt : str or tuple of str
        Of 'query', 'key', 'value', 'relative_bias', 'sinks'.
    output, lse, num_threads
        Accepted and ignored here.
    grad_lse : array_like (..., *space), optional
        Gradient of the loss for the log-sum-exp.
    out : ndarray or tuple, optional
        Receives the gradients.

    Returns
    -------
    ndarray, or a tuple in the order of `wrt`, each of the shape of its argument
    """
    given = {"query": query, "key": key, "value": value, "relative_bias": relative_bias, "sinks": sinks}
    kernel_size = np.atleast_1d(kernel_size)
    axes = len(kernel_size)
    query, key, value, grad_out = (np.asarray(x, dtype=np.float64) for x in (query, key, value, grad_out))
    space = query.shape[-axes - 1 : -1]
    pixels = int(np.prod(space))
    query, key, value, grad_out = (
        x.reshape(*x.shape[: -axes - 1], pixels, x.shape[-1]) for x in (query, key, value, grad_out)
    )
    key_heads = key.shape[-3] if enable_gqa and query.ndim > 2 else None
    if key_heads is not None:
        key, value = repeat_heads(query, key, value)
    batch_shape = grad_out.shape[:-2]
    query, key, value = (np.broadcast_to(x, (*batch_shape, *x.shape[-2:])) for x in (query, key, value))
    factor = 1 / np.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    grad_lse = np.zeros((*batch_shape, pixels)) if grad_lse is None else np.asarray(grad_lse, dtype=np.float64)
    grad_lse = grad_lse.reshape(*batch_shape, pixels)
    table = np.zeros(1) if relative_bias is None else np.asarray(relative_bias, dtype=np.float64)
    table = np.broadcast_to(table, (*batch_shape, *(2 * kernel_size - 1)))
    gradients = {
        "query": np.zeros(query.shape),
        "key": np.zeros(key.shape),
        "value": np.zeros(value.shape),
        "relative_bias": np.zeros(table.shape),
        "sinks": np.zeros(batch_shape),
    }
    for i, keys, visible, entries in neighborhoods(space, kernel_size, dilation, stride, is_causal, edge):
        with np.errstate(all="ignore"):
            q, k, v = query[..., i, :], key[..., keys, :], value[..., keys, :]
            raw = finish_scores(dot_scores(q[..., None, :], k, scale), None, softcap=softcap)
            slope = 1.0 if softcap is None else 1 - (raw / softcap) ** 2
            bias = table[(..., None, *entries)]
            visible = np.broadcast_to(visible & (bias != -np.inf), (*batch_shape, 1, keys.size))
            scores = raw + bias
            _, weights = attend(
                scores, v, visible, sinks=sinks, activation=activation, return_weights=True, return_lse=False, out=None
            )
            scores = np.where(scores == np.inf, np.nan, scores)
            part = visible & (scores != -np.inf)
            if activation in SPARSE:
                part = part & (weights != 0)
            d_weights = np.where(part, grad_out[..., i, None, :] @ v.swapaxes(-1, -2), 0.0)
            d_lse = grad_lse[..., i, None]
            d_scores = weights_vjp(d_weights, part, weights, scores, visible, activation, d_lse[..., None])
            if sinks is not None:
                gradients["sinks"] += sinks_vjp(d_weights, weights, scores, visible, sinks, d_lse)[..., 0]
            d_raw = factor * np.where(part, d_scores * slope, 0.0)[..., 0, :, None]
            part = part[..., 0, :, None]
            gradients["query"][..., i, :] = np.sum(np.where(part, d_raw * k, 0.0), axis=-2)
            to_key = np.where(part, d_raw * q[..., None, :], 0.0)
            to_value = np.where(part, weights[..., 0, :, None] * grad_out[..., i, None, :], 0.0)
            for n, j in enumerate(keys):
                gradients["key"][..., j, :] += to_key[..., n, :]
                gradients["value"][..., j, :] += to_value[..., n, :]
                gradients["relative_bias"][(..., *(entry[n] for entry in entries))] += d_scores[..., 0, n]
    for name in ("query", "key", "value"):
        x = gradients[name]
        if key_heads is not None and name != "query":
            x = sum_heads(x, key_heads)
        gradients[name] = x.reshape(*x.shape[:-2], *space, x.shape[-1])
    return as_named(gradients, given, wrt, out)


def merge_attention(outs, lses):
    """Attention over all keys from attention over parts of them, exactly (Milakov and Gimelshein 2018).

    Parameters
    ----------
    outs : sequence of array_like, each (..., L, E)
        Outputs over disjoint parts of the key axis.
    lses : sequence of array_like, each (..., L)
        Their log-sum-exps: parts are weighted in proportion to ``exp(lse)``. One of -inf does not count, nor does one
        of +inf with an output of zeros, which is how FlashAttention marks a part without keys.

    Returns
    -------
    out : ndarray (..., L, E)
    lse : ndarray (..., L)
        The log-sum-exp over all parts.
    """
    outs = np.stack([np.asarray(part, dtype=np.float64) for part in outs])
    lses = np.stack([np.asarray(part, dtype=np.float64) for part in lses])
    lses = np.where((lses == np.inf) & np.all(outs == 0, axis=-1), -np.inf, lses)
    with np.errstate(all="ignore"):
        weights, lse = normalise(lses, lses != -np.inf, axis=0)
        parts = np.where(lses[..., None] == -np.inf, 0.0, weights[..., None] * outs)
        return np.sum(parts, axis=0), lse[0]


def merge_attention_vjp(grad_out, outs, lses, *, grad_lse=None):
    """The gradients of `merge_attention` for its parts.

    With the share ``s = exp(lse_part - lse)`` of a part: ``s * grad_out`` for its output, and ``s * (sum(grad_out *
    (out_part - out)) + grad_lse)`` for its log-sum-exp.

    Parameters
    ----------
    grad_out : array_like, (..., L, E)
        The gradient of a loss for the merged output.
    outs, lses : sequence of array_like
        As in `merge_attention`.
    grad_lse : array_like, (..., L), optional
        The gradient for the merged log-sum-exp.

    Returns
    -------
    grad_outs : list of ndarray (..., L, E)
    grad_lses : list of ndarray (..., L)
        Zeros for a part that does not count, whatever is there.
    """
    outs = np.stack([np.asarray(part, dtype=np.float64) for part in outs])
    lses = np.stack([np.asarray(part, dtype=np.float64) for part in lses])
    counts = (lses != -np.inf) & ~((lses == np.inf) & np.all(outs == 0, axis=-1))
    grad_out = np.asarray(grad_out, dtype=np.float64)
    grad_lse = 0.0 if grad_lse is None else np.asarray(grad_lse, dtype=np.float64)
    with np.errstate(all="ignore"):
        shares, _ = normalise(np.where(lses == np.inf, np.nan, lses), counts, axis=0)
        products = np.where(counts, np.sum(grad_out * outs, axis=-1), 0.0)
        mean = np.sum(np.where(counts, shares * products, 0.0), axis=0)
        grad_outs = np.where(counts[..., None], shares[..., None] * grad_out, 0.0)
        grad_lses = np.where(counts, shares * (products - mean + grad_lse), 0.0)
    return list(grad_outs), list(grad_lses)


FEATURE_MAPS = {
    "elu+1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    None: lambda x: x,
}


def linear_attention(
    query,
    key,
    value,
    *,
    feature_map="elu+1",
    is_causal=False,
    query_offset=None,
    key_lengths=None,
    query_lengths=None,
    log_decay=None,
    beta=None,
    normalize=None,
    scale=None,
    eps=1e-6,
    state=None,
    return_state=False,
    state_out=None,
    enable_gqa=False,
    out=None,
    num_threads=None,
):
    """Attention as a recurrent net: a matrix M remembers which features of keys came with which values.

    Without the softmax the score f(query) . f(key) factors, so that ``sum_j (f(q) . f(k_j)) v_j`` is f(q) times
    ``M = sum_j outer(f(k_j), v_j)``, which grows by one key after the other (Katharopoulos et al. 2020, "Transformers
    are RNNs"). `linear_recurrence` is the net; here it runs over each head.

    Parameters
    ----------
    query, key, value : array_like, (..., L, D), (..., S, D), (..., S, E)
    feature_map : {'elu+1', 'relu', None}, callable, or pair of callables (for query, for key)
        f; a callable gets an array (..., n, D) and returns (..., n, F).
    is_causal, query_offset, key_lengths, query_lengths, enable_gqa
        As in `dot_product_attention`; without is_causal every query sees all keys.
    log_decay, beta : array_like, broadcast to (..., S, F) and (..., S) over key's batch axes
        See `linear_recurrence`.
    normalize : bool, default: where there is a feature_map and no beta
    scale : float, default 1 / sqrt(D)
        Of a result that is not normalised.
    eps : float
        Added to the denominator of one that is.
    state : array_like, (..., F, E), or (..., F, E + 1) if normalised
        M and, as last column, z at the beginning. With grouped heads, over key's heads.
    return_state : bool
        Return (out, state), the state after all keys.
    state_out, out : ndarray, optional
        Receive them.
    num_threads : int, optional
        Ignored.
    """
    heads = LinearHeads(
        query, key, value, feature_map, is_causal, query_offset, key_lengths, query_lengths, log_decay, beta, normalize,
        scale, state, enable_gqa
    )  # fmt: skip
    new_state = np.array(heads.state)
    result = np.zeros((*heads.batch, *np.shape(query)[-2:-1], np.shape(value)[-1]))
    for head, rows, keys, offset in heads.parts():
        result[head][rows], new_state[head] = linear_recurrence(
            heads.query[head][rows],
            heads.key[head][keys],
            heads.value[head][keys],
            new_state[head],
            offset,
            None if log_decay is None else heads.log_decay[head],
            None if beta is None else heads.beta[head],
            scale=heads.scale,
            eps=eps,
        )
    if heads.group > 1:
        new_state = new_state[..., :: heads.group, :, :]
    if state_out is not None:
        state_out[...] = new_state
        new_state = state_out
    return (_into(out, result), new_state) if return_state else _into(out, result)


class LinearHeads:
    """The operands of linear attention, features of query and key, with all batch axes: (..., kv_heads, S, ...) becomes
    (..., heads, S, ...) where heads are grouped."""

    def __init__(self, query, key, value, feature_map, is_causal, query_offset, key_lengths, query_lengths, log_decay,
                 beta, normalize, scale, state, enable_gqa):  # fmt: skip
        query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
        f_query, f_key = feature_map if isinstance(feature_map, tuple | list) else (feature_map, feature_map)
        if normalize is None:
            normalize = feature_map is not None and beta is None
        scale = 1 / np.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
        self.scale = None if normalize else scale
        with np.errstate(all="ignore"):
            query, key = FEATURE_MAPS.get(f_query, f_query)(query), FEATURE_MAPS.get(f_key, f_key)(key)
        num_queries, num_keys, num_features = query.shape[-2], key.shape[-2], key.shape[-1]

        grouped = enable_gqa and query.ndim > 2 and key.ndim > 2
        self.group = query.shape[-3] // max(key.shape[-3], 1) if grouped else 1
        kv_batch = np.broadcast_shapes(key.shape[:-2], value.shape[:-2])
        if self.group == 1:
            kv_batch = np.broadcast_shapes(query.shape[:-2], kv_batch)
        else:
            kv_batch = (*np.broadcast_shapes(query.shape[:-3], kv_batch[:-1]), kv_batch[-1])

        def over_heads(x, *shape):
            x = np.broadcast_to(np.asarray(x, dtype=np.float64), (*kv_batch, *shape))
            return np.repeat(x, self.group, axis=len(kv_batch) - 1) if self.group > 1 else x

        self.key, self.value = over_heads(key, num_keys, num_features), over_heads(value, *value.shape[-2:])
        self.batch = self.key.shape[:-2]
        self.query = np.broadcast_to(query, (*self.batch, *query.shape[-2:]))
        self.log_decay = None if log_decay is None else over_heads(log_decay, num_keys, num_features)
        self.beta = None if beta is None else over_heads(beta, num_keys)
        self.state = over_heads(0.0 if state is None else state, num_features, value.shape[-1] + bool(normalize))
        self.key_lengths = np.broadcast_to(num_keys if key_lengths is None else key_lengths, self.batch)
        self.query_lengths = np.broadcast_to(num_queries if query_lengths is None else query_lengths, self.batch)
        offsets = self.key_lengths - self.query_lengths if query_offset is None else query_offset
        self.offsets = np.broadcast_to(offsets, self.batch) if is_causal else None

    def parts(self):
        """Of each head: its index, its valid rows and keys, and the position of query 0 (None: behind all keys)."""
        for head in np.ndindex(*self.batch):
            rows, keys = slice(int(self.query_lengths[head])), slice(int(self.key_lengths[head]))
            yield head, rows, keys, None if self.offsets is None else int(self.offsets[head])


def linear_recurrence(query, key, value, state, offset, log_decay, beta, *, scale, eps):
    """One head: (L, F), (S, F), (S, E) and a state (F, E) or (F, E + 1) -> (L, E) and the new state.

    A key first lets the state decay, then adds itself. By the delta rule (`beta`; Schlag et al. 2021) it adds only what
    its value differs from what the state already says. offset: the position of query 0, where queries read between the
    keys; None: they read behind all of them. scale: None where the result is normalised.
    """
    memory, normaliser = state[:, : value.shape[-1]], state[:, value.shape[-1] :]
    out = np.zeros((len(query), value.shape[-1]))

    def read(i):
        answer = query[i] @ memory
        if scale is not None:
            return scale * answer
        denominator = query[i] @ normaliser[:, 0] + eps
        return np.zeros_like(answer) if denominator == 0 else answer / denominator

    with np.errstate(all="ignore"):
        position = np.arange(len(query)) + (len(key) if offset is None else offset)
        for i in np.flatnonzero(position < 0):
            out[i] = read(i)
        for j in range(len(key)):
            if log_decay is not None:
                forgets = log_decay[j, :, None] == -np.inf  # 0 * NaN would be NaN
                memory = np.where(forgets, 0.0, memory * np.exp(log_decay[j])[:, None])
                normaliser = np.where(forgets, 0.0, normaliser * np.exp(log_decay[j])[:, None])
            new = value[j] if beta is None else beta[j] * (value[j] - key[j] @ memory)
            memory = memory + np.outer(key[j], new)
            normaliser = normaliser + key[j][:, None]
            for i in np.flatnonzero(position == j):
                out[i] = read(i)
        for i in np.flatnonzero(position >= len(key)):
            out[i] = read(i)
    return out, np.concatenate([memory, normaliser], axis=1)


FEATURE_SLOPES = {
    "elu+1": lambda x: np.exp(np.minimum(x, 0)),
    "relu": lambda x: np.where(np.isnan(x), x, x > 0),
    None: np.ones_like,
}


def linear_attention_vjp(
    grad_out,
    query,
    key,
    value,
    *,
    wrt=("query", "key", "value"),
    grad_state=None,
    feature_map="elu+1",
    is_causal=False,
    query_offset=None,
    key_lengths=None,
    query_lengths=None,
    log_decay=None,
    beta=None,
    normalize=None,
    scale=None,
    eps=1e-6,
    state=None,
    enable_gqa=False,
    out=None,
    num_threads=None,
):
    """The gradients of a loss, given those for the output and the state of `linear_attention`.

    `linear_recurrence_vjp` goes through the keys of a head from the last to the first. What several heads share is
    summed.

    Parameters
    ----------
    grad_out : array_like, (..., L, E)
    wrt : name or tuple of names, of 'query', 'key', 'value', 'log_decay', 'beta', 'state'
        The arguments whose gradients are returned, in this order.
    grad_state : array_like, optional
        The gradient for the state that is returned.
    feature_map : {'elu+1', 'relu', None}
    out : ndarray or tuple of ndarray, optional
        Receive the gradients.
    query, key, value, is_causal, query_offset, key_lengths, query_lengths, log_decay, beta, normalize, scale, eps, \
state, enable_gqa, num_threads
        As in `linear_attention`.
    """
    if normalize is None:
        normalize = feature_map is not None and beta is None
    raw, heads = (
        LinearHeads(query, key, value, f, is_causal, query_offset, key_lengths, query_lengths, log_decay, beta,
                    normalize, scale, state, enable_gqa) for f in (None, feature_map)
    )  # fmt: skip
    slopes = FEATURE_SLOPES[feature_map]
    grad_out = np.asarray(grad_out, dtype=np.float64)
    grad_end = np.array(np.broadcast_to(0.0, heads.state.shape))
    if grad_state is not None:  # of the first head that shares it
        grad_end[..., :: heads.group, :, :] = grad_state
    given = {"query": query, "key": key, "value": value, "log_decay": log_decay, "beta": beta, "state": state}
    whole = {name: np.zeros(getattr(heads, name).shape) for name, x in given.items() if x is not None}
    for head, rows, keys, offset in heads.parts():
        parts = linear_recurrence_vjp(
            grad_out[head][rows],
            grad_end[head],
            heads.query[head][rows],
            heads.key[head][keys],
            heads.value[head][keys],
            None if state is None else heads.state[head],
            offset,
            None if log_decay is None else heads.log_decay[head],
            None if beta is None else heads.beta[head],
            slopes=(slopes(raw.query[head][rows]), slopes(raw.key[head][keys])),
            scale=heads.scale,
            eps=eps,
        )
        for name, part in parts.items():
            if name in whole:
                whole[name][head][rows if name == "query" else slice(None) if name == "state" else keys] = part

    if heads.group > 1:
        axis = len(heads.batch) - 1
        num_heads = heads.batch[-1] // heads.group
        whole = {name: x if name == "query" else sum_heads(x, num_heads, axis) for name, x in whole.items()}
    return as_named(whole, given, wrt, out)


def linear_recurrence_vjp(
    grad_out, grad_state, query, key, value, state, offset, log_decay, beta, *, slopes, scale, eps
):  # fmt: skip
    """The gradients of one head: `linear_recurrence` backwards. Returns them by name.

    Here the normaliser is one more column of the state, to which each value adds 1. All states are kept; the library
    does without. state: None where there is none: then a row that sees no key has no gradient. slopes: what the
    gradients of features of query and key are multiplied with.
    """
    num_queries, num_keys, width = len(query), len(key), value.shape[-1]
    if scale is None:
        value = np.concatenate([value, np.ones((num_keys, 1), value.dtype)], axis=1)
    position = np.arange(num_queries) + (num_keys if offset is None else offset)

    def forget(j, matrix):
        if log_decay is None:
            return matrix
        return np.where(log_decay[j, :, None] == -np.inf, 0.0, matrix * np.exp(log_decay[j])[:, None])

    with np.errstate(all="ignore"):
        # Forward: the state before each key, after its decay; what is added to it; and the state after all keys.
        memory = np.zeros((key.shape[-1], value.shape[-1]), key.dtype) if state is None else state
        before, added, missed = [], [], []
        for j in range(num_keys):
            memory = forget(j, memory)
            missed.append(value[j] - (0.0 if beta is None else key[j] @ memory))
            added.append(missed[j] if beta is None else beta[j] * missed[j])
            before.append(memory)
            memory = memory + np.outer(key[j], added[j])

        # Backward: grad is the gradient for the state, at first after all keys.
        d_query, d_key = np.zeros_like(query), np.zeros_like(key)
        d_value, d_decay, d_beta = np.zeros_like(value), np.zeros_like(key), np.zeros(num_keys, key.dtype)
        grad = np.array(grad_state)

        def read(i, memory):
            """The gradient that row i gives to the state it reads; and its own."""
            if state is None and (num_keys == 0 or position[i] < 0):
                return 0.0
            answer = query[i] @ memory
            if scale is not None:
                d_answer = scale * grad_out[i]
            else:
                denominator = answer[-1] + eps
                if denominator == 0:
                    return 0.0
                share = grad_out[i] @ answer[:width] / denominator
                d_answer = np.append(grad_out[i], -share) / denominator
            d_query[i] = slopes[0][i] * (memory @ d_answer)
            return np.outer(query[i], d_answer)

        for i in np.flatnonzero(position >= num_keys):
            grad = grad + read(i, memory)
        for j in reversed(range(num_keys)):
            after = before[j] + np.outer(key[j], added[j])
            for i in np.flatnonzero(position == j):
                grad = grad + read(i, after)
            d_key[j], d_value[j] = grad @ added[j], key[j] @ grad
            if beta is not None:
                d_beta[j] = d_value[j] @ missed[j]
                d_value[j] *= beta[j]
                d_key[j] -= before[j] @ d_value[j]
                grad = grad - np.outer(key[j], d_value[j])
            d_key[j] *= slopes[1][j]
            if log_decay is not None:
                d_decay[j] = np.where(log_decay[j] == -np.inf, 0.0, np.sum(before[j] * grad, axis=-1))
            grad = forget(j, grad)
        for i in np.flatnonzero(position < 0):
            grad = grad + read(i, np.zeros_like(grad) if state is None else state)
    return {
        "query": d_query,
        "key": d_key,
        "value": d_value[:, :width],
        "log_decay": d_decay,
        "beta": d_beta,
        "state": grad,
    }


def edge_scores(query, keys, *, w_score=None, negative_slope=0.2, scale=None):
    """Scores of one query ``(..., D)`` and the keys that its edges lead to ``(..., n, D)``: ``(..., n)``.

    Without `w_score` scaled dot products (TransformerConv, Shi et al. 2021). With it ``w_score . leaky_relu(query +
    key)`` (GATv2, Brody, Alon and Yahav 2022); with one channel, each side projected to a number before, that is GAT's
    score (Velickovic et al. 2018).
    """
    if w_score is None:
        if scale is None:
            scale = 1 / np.sqrt(max(query.shape[-1], 1))
        return np.sum(query[..., None, :] * float(scale) * keys, axis=-1)
    hidden = query[..., None, :] + keys
    hidden = np.maximum(hidden, 0) + float(negative_slope) * np.minimum(hidden, 0)
    w_score = np.asarray(w_score, dtype=np.float64) * (1.0 if scale is None else float(scale))
    return np.sum(w_score[..., None, :] * hidden, axis=-1)


def graph_attention(
    query,
    key,
    value,
    graph,
    *,
    w_score=None,
    negative_slope=0.2,
    edge_bias=None,
    edge_key=None,
    edge_value=None,
    scale=None,
    softcap=None,
    return_weights=False,
    return_lse=False,
    out=None,
    num_threads=None,
):
    """Attention in which query i sees the keys that row i of a sparse matrix names.

    Parameters
    ----------
    query : array_like, shape (..., L, D)
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
        The leading axes are batch axes and broadcast.
    graph : a SciPy CSR array or matrix of shape (L, S), or the pair (indptr, indices)
        Edges t from ``indptr[i]`` to ``indptr[i + 1]`` lead from query i to the keys ``indices[t]``.
    w_score : array_like, shape (D,) or (..., D) over the batch axes, optional
        Weights of the hidden units of GATv2's score, in place of dot products.
    negative_slope : float, default: 0.2
        Of the leaky ReLU in that score.
    edge_bias : array_like of float, optional
        Broadcasts to ``(..., nnz)``; added to the score of the edge. ``-inf`` hides it.
    edge_key, edge_value : array_like, optional
        Broadcast to ``(..., nnz, D)`` and ``(..., nnz, E)``; added to the key and the value at the end of the edge.
    scale : float, optional
        Default ``1 / sqrt(D)``, or 1 with `w_score`.
    softcap : float, optional
        ``softcap * tanh(score / softcap)``, before the bias is added.
    return_weights, return_lse : bool, default: False
        Return the weights ``(..., nnz)`` in the order of ``indices``, and the log-sum-exp ``(..., L)``, too.
    out : ndarray, optional
        Receives the output and is returned.
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    ndarray (..., L, E), or a tuple (out[, weights][, lse])
    """
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    indptr, indices = graph if isinstance(graph, (tuple, list)) else (graph.indptr, graph.indices)
    indptr, indices = np.asarray(indptr), np.asarray(indices, dtype=np.int64)[: indptr[-1]]
    batch_shape = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    num_queries = query.shape[-2]

    def of_edges(x, *trailing):
        """What was given for the edges, for all of the batch."""
        return np.broadcast_to(np.asarray(x, dtype=np.float64), (*batch_shape, len(indices), *trailing))

    edge_bias = of_edges(0.0 if edge_bias is None else edge_bias)
    edge_key = of_edges(0.0 if edge_key is None else edge_key, key.shape[-1])
    edge_value = of_edges(0.0 if edge_value is None else edge_value, value.shape[-1])
    result = np.zeros((*batch_shape, num_queries, value.shape[-1]))
    all_weights = np.zeros((*batch_shape, len(indices)))
    all_lse = np.full((*batch_shape, num_queries), -np.inf)
    with np.errstate(all="ignore"):
        for i in range(num_queries):
            row = slice(indptr[i], indptr[i + 1])
            keys = key[..., indices[row], :] + edge_key[..., row, :]
            values = value[..., indices[row], :] + edge_value[..., row, :]
            scores = edge_scores(query[..., i, :], keys, w_score=w_score, negative_slope=negative_slope, scale=scale)
            if softcap is not None:
                scores = float(softcap) * np.tanh(scores / float(softcap))
            visible = edge_bias[..., row] != -np.inf
            scores = np.where(visible, scores + edge_bias[..., row], -np.inf)
            scores = np.where(scores == np.inf, np.nan, scores)
            weights, lse = normalise(scores, visible)
            weights = np.where(scores == -np.inf, 0.0, weights)  # also in a row of NaN
            means = add_up(weights[..., None, :], visible[..., None, :], values, True)[..., 0, :]
            result[..., i, :] = np.where(lse == -np.inf, 0.0, means)
            all_weights[..., row] = weights
            all_lse[..., i] = lse[..., 0]
    result = _into(out, result)
    extras = [all_weights] if return_weights else []
    if return_lse:
        extras.append(all_lse)
    return (result, *extras) if extras else result


def graph_attention_vjp(
    grad_out,
    query,
    key,
    value,
    graph,
    *,
    wrt=("query", "key", "value"),
    w_score=None,
    negative_slope=0.2,
    edge_bias=None,
    edge_key=None,
    edge_value=None,
    scale=None,
    softcap=None,
    output=None,
    lse=None,
    grad_lse=None,
    out=None,
    num_threads=None,
):
    """Gradients of a loss for the inputs of `graph_attention`, from that for its output.

    Of row i, with g the gradient of its output, w the weights of its edges and v their values:

    ====================  =============================================================================
    value                 ``w * g``; so has what an edge adds to it
    score after softcap   ``s = w * (g . v - sum(w * (g . v)) + grad_lse)``; so has the bias
    raw score             ``s * (1 - tanh(raw / softcap) ** 2)``
    query, key            ``raw * scale * key``, ``raw * scale * query``; with `w_score` both have ``raw *
                          scale * w_score * (1 or negative_slope)``; so has what an edge adds to the key
    w_score               ``raw * scale * leaky_relu(query + key)``
    ====================  =============================================================================

    summed over all edges, and over all axes along which an array was broadcast. An edge whose score is -inf has no part
    in anything. leaky_relu has the derivative `negative_slope` at 0.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient for the output.
    query, key, value, graph, w_score, negative_slope, edge_bias, edge_key, edge_value, scale, softcap
        As of `graph_attention`.
    wrt : tuple of str, or str
        Whose gradients to return: "query", "key", "value", "w_score", "edge_bias", "edge_key", "edge_value".
    output, lse : array_like, optional
        Accepted and ignored here.
    grad_lse : array_like, shape (..., L), optional
        Gradient for the log-sum-exp.
    out : ndarray or tuple of ndarray or None, optional
        Receives the gradients.
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    tuple of ndarray, or one, with the shapes of the arrays named
    """
    arrays = {"query": query, "key": key, "value": value, "w_score": w_score, "edge_bias": edge_bias,
              "edge_key": edge_key, "edge_value": edge_value}  # fmt: skip
    arrays = {name: np.asarray(x, dtype=np.float64) for name, x in arrays.items() if x is not None}
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    indptr, indices = graph if isinstance(graph, (tuple, list)) else (graph.indptr, graph.indices)
    indptr, indices = np.asarray(indptr), np.asarray(indices, dtype=np.int64)[: indptr[-1]]
    batch_shape = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    (num_queries, head_dim), value_dim, num_edges = query.shape[-2:], value.shape[-1], len(indices)

    def whole(x, *shape):
        return np.broadcast_to(np.asarray(x, dtype=np.float64), (*batch_shape, *shape))

    query, key, value = whole(query, *query.shape[-2:]), whole(key, *key.shape[-2:]), whole(value, *value.shape[-2:])
    grad_out = whole(grad_out, num_queries, value_dim)
    grad_lse = whole(0.0 if grad_lse is None else grad_lse, num_queries)
    bias = whole(arrays.get("edge_bias", 0.0), num_edges)
    edge_key = whole(arrays.get("edge_key", 0.0), num_edges, head_dim)
    edge_value = whole(arrays.get("edge_value", 0.0), num_edges, value_dim)
    if scale is None:
        scale = 1 / np.sqrt(max(head_dim, 1)) if w_score is None else 1.0
    w = whole(arrays.get("w_score", 0.0), head_dim)[..., None, :]

    d_query, d_key, d_value = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    d_w, d_bias = np.zeros((*batch_shape, head_dim)), np.zeros(bias.shape)
    d_edge_key, d_edge_value = np.zeros(edge_key.shape), np.zeros(edge_value.shape)
    with np.errstate(all="ignore"):
        for i in range(num_queries):
            row = slice(indptr[i], indptr[i + 1])
            q, g = query[..., i, None, :], grad_out[..., i, None, :]
            keys = key[..., indices[row], :] + edge_key[..., row, :]
            values = value[..., indices[row], :] + edge_value[..., row, :]
            raw = edge_scores(query[..., i, :], keys, w_score=w_score, negative_slope=negative_slope, scale=scale)
            capped = raw if softcap is None else float(softcap) * np.tanh(raw / float(softcap))
            visible = bias[..., row] != -np.inf
            scores = np.where(visible, capped + bias[..., row], -np.inf)
            scores = np.where(scores == np.inf, np.nan, scores)
            seen = scores != -np.inf
            weights = np.where(seen, normalise(scores, visible)[0], 0.0)
            terms = np.where(seen, np.sum(g * values, axis=-1), 0.0)
            of_score = weights_vjp(terms, seen, weights, scores, visible, "softmax", grad_lse[..., i, None])
            d_bias[..., row] = of_score
            if softcap is not None:
                of_score = np.where(seen, of_score * (1 - np.tanh(raw / float(softcap)) ** 2), 0.0)
            of_score, seen, weights = of_score[..., None], seen[..., None], weights[..., None]
            if w_score is None:
                of_query = np.where(seen, of_score * float(scale) * keys, 0.0)
                of_key = np.where(seen, of_score * float(scale) * q, 0.0)
            else:
                slope = np.where(q + keys > 0, 1.0, float(negative_slope))
                of_query = of_key = np.where(seen, of_score * float(scale) * w * slope, 0.0)
                d_w += np.sum(np.where(seen, of_score * float(scale) * slope * (q + keys), 0.0), axis=-2)
            d_edge_value[..., row, :] = np.where(seen, weights * g, 0.0)
            d_edge_key[..., row, :] = of_key
            d_query[..., i, :] = np.sum(of_query, axis=-2)
        for e, j in enumerate(indices):
            d_key[..., j, :] += d_edge_key[..., e, :]
            d_value[..., j, :] += d_edge_value[..., e, :]
        gradients = {"query": d_query, "key": d_key, "value": d_value, "w_score": d_w, "edge_bias": d_bias,
                     "edge_key": d_edge_key, "edge_value": d_edge_value}  # fmt: skip
        return as_named(gradients, arrays, wrt, out)


def rotation_angles(length, dim, base, offset):
    """``(offset + i) * base ** (-2 * pair / dim)``, in radians: ``(..., length, pairs)``."""
    position = np.asarray(offset, dtype=np.float64)[..., None, None] + np.arange(length)[:, None]
    return position * float(base) ** (-np.arange(0, dim, 2) / max(dim, 1))


def sinusoidal_encoding(length, dim, *, base=10000.0, layout="interleaved", offset=0, dtype=np.float64):
    """Sines and cosines of the position, to be added to embeddings (Vaswani et al. 2017, section 3.5).

    Parameters
    ----------
    length, dim : int
        Rows and channels.
    base : float, default: 10000
        Channels 2 i and 2 i + 1 hold sine and cosine of ``position / base ** (2 * i / dim)``.
    layout : {"interleaved", "split"}
        Alternating sines and cosines, or all sines and then all cosines.
    offset : int, default: 0
        The position of row 0.
    dtype : dtype_like
        Accepted and ignored here.

    Returns
    -------
    ndarray (length, dim)
        With an odd `dim` the last cosine is omitted.
    """
    angle = rotation_angles(length, dim, base, offset)
    sines, cosines = np.sin(angle), np.cos(angle)[:, : dim // 2]
    if layout == "split":
        return np.concatenate([sines, cosines], axis=-1)
    table = np.empty((length, dim))
    table[:, 0::2], table[:, 1::2] = sines, cosines
    return table


def apply_rotary(
    x,
    *,
    offset=0,
    positions=None,
    base=10000.0,
    frequencies=None,
    attention_factor=1.0,
    interleaved=False,
    rotary_dim=None,
    inverse=False,
    out=None,
    num_threads=None,
):
    """Rotate pairs of channels by angles proportional to the position (Su et al. 2021, "RoFormer", section 3.2.2).

    As complex numbers, pair i of a row is multiplied by ``attention_factor * exp(1j * position * frequencies[i])``.

    Parameters
    ----------
    x : array_like, shape (..., L, D)
    offset : int or array of int over the batch axes, default: 0
        Row i has position ``offset + i``.
    positions : array of int that broadcasts to (..., L), optional
        The position of each row, instead of `offset`.
    base : float, default: 10000
        Frequency i is ``base ** (-2 * i / rotary_dim)``.
    frequencies : array, shape (rotary_dim / 2,), optional
        Instead of those from `base`.
    attention_factor : float, default: 1
    interleaved : bool, default: False
        A pair is channels 2 i and 2 i + 1 (GPT-J), not i and ``i + rotary_dim / 2`` (GPT-NeoX).
    rotary_dim : int, optional
        Only the first `rotary_dim` channels are rotated and multiplied. Default all.
    inverse : bool, default: False
        Rotate back: by the opposite angles, and multiply by the same factor. That is the transpose, so it takes a
        gradient for the result to that for `x`; it is the inverse where the factor is 1.
    out : ndarray, optional
        Receives the result and is returned.
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    ndarray (..., L, D)
    """
    x = np.asarray(x, dtype=np.float64)
    dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if positions is None:
        positions = np.asarray(offset)[..., None] + np.arange(x.shape[-2])
    if frequencies is None:
        frequencies = rotary_frequencies(dim, base=base)[0]
    angle = np.asarray(positions, dtype=np.float64)[..., None] * np.asarray(frequencies, dtype=np.float64)
    if interleaved:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    else:
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    real, imaginary = x[..., first], x[..., second]
    result = x.copy()
    with np.errstate(all="ignore"):
        cosine, sine = attention_factor * np.cos(angle), attention_factor * np.sin(-angle if inverse else angle)
        result[..., first] = real * cosine - imaginary * sine
        result[..., second] = imaginary * cosine + real * sine
    return _into(out, result)


def rotary_frequencies(dim, *, base=10000.0, scaling=None, length=None, max_positions=None):
    """Angles per position of rotary encoding, one per pair, as scaled by a model's configuration.

    Parameters
    ----------
    dim : int
        Channels of a head.
    base : float, default: 10000
        ``base ** (-2 * i / dim)`` before any scaling; ``rope_theta`` in the dict takes precedence.
    scaling : dict, optional
        What model files call rope_scaling or rope_parameters. S is its ``original_max_position_embeddings``, else
        `max_positions`; f its ``factor``, else ``max_positions / S``; w_i the unscaled frequencies. By rope_type:

        - default: w_i, of ``partial_rotary_factor * dim`` channels, as for all types;
        - linear: ``w_i / f``;
        - dynamic: w_i of the base times ``(f * max(length, S) / S - (f - 1)) ** (dim / (dim - 2))``;
        - llama3: a weighted mean of ``w_i`` and ``w_i / f``; the weight of the former goes from 0 to 1 as the number of
          full turns in S positions goes from low_freq_factor to high_freq_factor;
        - yarn: the same mean; the weight goes from 1 to 0 between the pair that makes beta_fast full turns in S
          positions and the one that makes beta_slow (Peng et al. 2023, section 3.2);
        - longrope: ``w_i / long_factor[i]`` where `length` is greater than S, else ``w_i / short_factor[i]`` (Ding et
          al. 2024).
    length : int, optional
        Tokens of the sequence.
    max_positions : int, optional
        The model's max_position_embeddings.

    Returns
    -------
    frequencies : ndarray
    attention_factor : float
        What the dict says, else for yarn ``m(mscale) / m(mscale_all_dim)`` if it has both, or ``m(1)``, with ``m(k) = 1
        + 0.1 k log f``; for longrope ``sqrt(1 + log f / log S)``; but 1 if f is at most 1, and for the other types.
    """
    given = dict(scaling or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    base = given.get("rope_theta") or base
    dim = int(dim * (given.get("partial_rotary_factor") or 1.0))
    pair = np.arange(dim // 2)
    if kind == "default":
        return float(base) ** (-2 * pair / max(dim, 1)), 1.0
    original = given.get("original_max_position_embeddings") or max_positions
    factor = given.get("factor") or max_positions / original
    if kind == "dynamic":
        base = base * (factor * max(length, original) / original - (factor - 1)) ** (dim / (dim - 2))
    plain = float(base) ** (-2 * pair / max(dim, 1))
    if kind == "dynamic":
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        share = np.clip((original * plain / (2 * np.pi) - low) / (high - low), 0, 1)
        return share * plain + (1 - share) * plain / factor, 1.0
    if kind == "yarn":
        turns = np.array([given.get("beta_fast") or 32, given.get("beta_slow") or 1])
        low, high = np.log(original / (2 * np.pi * turns)) / np.log(base) * dim / 2
        if given.get("truncate", True):
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        share = 1 - np.clip((pair - low) / (high - low if high != low else 0.001), 0, 1)
        result = share * plain + (1 - share) * plain / factor
        scales = given.get("mscale") or 0, given.get("mscale_all_dim") or 0
        above, below = scales if all(scales) else (1, 0)
        growth = 0.1 * np.log(max(factor, 1))
        attention_factor = (1 + above * growth) / (1 + below * growth)
    else:
        result = plain / np.array(given["long_factor" if length and length > original else "short_factor"])
        attention_factor = np.sqrt(1 + np.log(max(factor, 1)) / np.log(original))
    return result, float(given.get("attention_factor") or attention_factor)


def alibi_slopes(num_heads):
    """One slope per head for ALiBi (Press, Smith and Lewis 2022, section 3, and their code for other numbers).

    Parameters
    ----------
    num_heads : int
        For a power of two the slopes are the powers of ``2 ** (-8 / num_heads)``, starting with the first. Else those
        of the power of two below, followed by every other slope of the power of two above.

    Returns
    -------
    ndarray (num_heads,)
    """
    below = 2 ** int(np.log2(num_heads))
    slopes = (2.0 ** (-8 / below)) ** np.arange(1, below + 1)
    return slopes if below == num_heads else np.append(slopes, alibi_slopes(2 * below)[0::2][: num_heads - below])


def relative_position_buckets(
    query_length, key_length, *, num_buckets=32, max_distance=128, bidirectional=True, query_offset=None
):
    """The bucket of each query and key, by distance: a row index of T5's table of biases (Raffel et al. 2020).

    Parameters
    ----------
    query_length, key_length : int
    num_buckets : int, default: 32
    max_distance : int, default: 128
        From here on all distances share a bucket.
    bidirectional : bool, default: True
        Half of the buckets are for keys after the query's position; otherwise those are all in bucket 0.
    query_offset : int, optional
        Position of query 0 on the key axis. Default: the last query is at the last key.

    Returns
    -------
    ndarray of int (L, S)
    """
    position = query_positions(query_length, key_length, query_offset, None, None)
    distance = np.arange(key_length) - position
    first = np.zeros(distance.shape)
    if bidirectional:
        num_buckets //= 2
        first = np.where(distance > 0, num_buckets, 0)
        distance = -abs(distance)
    distance = np.maximum(-distance, 0)
    # Below this a bucket holds one distance; the other buckets divide the remaining range evenly by logarithm.
    exact = num_buckets // 2
    share = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    logarithmic = np.minimum(exact + np.floor(share * (num_buckets - exact)), num_buckets - 1)
    return (first + np.where(distance < exact, distance, logarithmic)).astype(np.int64)


@functools.partial(shows_rules, without=("enable_gqa",))
def self_attention(
    x,
    w_query,
    w_key,
    w_value,
    *,
    key_lengths=None,
    query_lengths=None,
    scale=None,
    **rules,
):
    """``softmax(Q K^T / sqrt(d_k)) V`` with ``Q = x @ w_query``, ``K = x @ w_key``, ``V = x @ w_value``.

    Vaswani et al. 2017, "Attention is all you need", equation 1.

    Parameters
    ----------
    x : array_like, shape (..., L, d_model)
    w_query, w_key : array_like, shape (d_model, d_k)
    w_value : array_like, shape (d_model, d_v)
    **rules
        As in `dot_product_attention`; `query_lengths` defaults to `key_lengths`.

    Returns
    -------
    ndarray (..., L, d_v), or a tuple (out[, weights][, lse])
    """
    x = np.asarray(x, dtype=np.float64)
    if query_lengths is None:
        query_lengths = key_lengths
    with np.errstate(all="ignore"):
        query, key, value = (project(x, w) for w in (w_query, w_key, w_value))
    return dot_product_attention(
        query,
        key,
        value,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        scale=scale,
        **rules,
    )


@functools.partial(shows_rules, without=("enable_gqa", "return_weights", "return_lse"))
def self_attention_vjp(
    grad_out,
    x,
    w_query,
    w_key,
    w_value,
    *,
    wrt=("x", "w_query", "w_key", "w_value"),
    output=None,
    lse=None,
    grad_lse=None,
    key_lengths=None,
    query_lengths=None,
    scale=None,
    out=None,
    **rules,
):
    """The gradients of a loss through `self_attention`, for the arrays named in `wrt`.

    With ``Q = x @ w_query``, and dQ the gradient for Q, ``w_query`` has ``x.T @ dQ`` and x has ``dQ @ w_query.T``, and
    so for the other two; x has the sum of all three.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, d_v)
        The gradient for what `self_attention` returned.
    x, w_query, w_key, w_value : array_like
        As for `self_attention`.
    wrt : str or tuple of str
        Of "x", "w_query", "w_key", "w_value", "bias", "relative_bias", "alibi_slopes" and "sinks".
    output, lse : array_like, optional
        Accepted and ignored here.
    grad_lse : array_like, shape (..., L), optional
        The gradient for the log-sum-exp.
    out : ndarray or tuple of them, optional
        Receives the gradients, which are returned.
    **rules
        As for `self_attention`.

    Returns
    -------
    ndarray, or a tuple as long as `wrt`
    """
    x = np.asarray(x, dtype=np.float64)
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    matrices = {"query": w_query, "key": w_key, "value": w_value}
    added = tuple(name for name in ADDED if name in names)
    with np.errstate(all="ignore"):
        answer = dot_product_attention_vjp(
            grad_out,
            *(project(x, w) for w in matrices.values()),
            wrt=(*matrices, *added),
            grad_lse=grad_lse,
            key_lengths=key_lengths,
            query_lengths=key_lengths if query_lengths is None else query_lengths,
            scale=scale,
            **rules,
        )
        gradients = dict(zip((*matrices, *added), answer, strict=True))
        gradients["x"] = sum(gradients[name] @ np.asarray(w, dtype=np.float64).T for name, w in matrices.items())
        gradients |= {f"w_{name}": outer_sum(x, gradients[name]) for name in matrices}
    given = {"x": x, **{f"w_{name}": w for name, w in matrices.items()}, **{name: rules[name] for name in added}}
    return as_named(gradients, given, wrt, out)


# What is added to scores or to their softmax and has a gradient.
ADDED = ("bias", "relative_bias", "alibi_slopes", "sinks")


def outer_sum(x, d_y):
    """The gradient for w of ``y = x @ w``: ``x.T @ d_y`` over all tokens. A product with a 0 is 0, even NaN's: where a
    token takes no part, its gradient is 0, whatever the token is."""
    x, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    good_x, good_d = np.isfinite(x), np.isfinite(d_y)
    total = np.where(good_x, x, 0.0).T @ np.where(good_d, d_y, 0.0)
    for t in np.flatnonzero(~(good_x.all(axis=1) & good_d.all(axis=1))):
        takes_part = (x[t, :, None] != 0) & (d_y[t] != 0) & ~(good_x[t, :, None] & good_d[t])
        total = total + np.where(takes_part, x[t, :, None] * d_y[t], 0.0)
    return total


class Linear:
    """A matrix that multiplies rows, and what follows: ``activation(x @ weight + bias) * multiply + residual``.

    Parameters
    ----------
    weight : array_like, shape (d_in, d_out)
    bias : array_like, shape (d_out,), optional
    weight_scale : array_like, shape (d_out,), or float, optional
        The matrix is ``weight * weight_scale``.
    dtype : dtype, optional
        In which the matrix is kept. With int8 it becomes integers times scales, as `columns_of_int8` has it.
    """

    def __init__(self, weight, bias=None, *, weight_scale=None, dtype=None):
        self.dtype = np.dtype(np.float64 if dtype is None else dtype)
        self.weight_scale = None
        if weight_scale is not None:
            self.dtype = np.dtype(np.int8)
            self.weight = np.array(weight, dtype=np.float64)
            self.weight_scale = np.float64(np.float32(weight_scale)) * np.ones(self.weight.shape[1])
        elif self.dtype == np.int8:
            self.weight, self.weight_scale = columns_of_int8(weight)
        else:
            with np.errstate(all="ignore"):
                self.weight = np.array(weight).astype(self.dtype).astype(np.float64)
        self.matrix = self.weight if self.weight_scale is None else self.weight * self.weight_scale
        self.bias = None if bias is None else np.array(bias, dtype=np.float64)
        self.d_in, self.d_out = self.weight.shape
        self.nbytes = sum(a.nbytes for a in (self.weight, self.bias, self.weight_scale) if a is not None)

    def __call__(self, x, *, activation=None, multiply=None, residual=None, out=None, num_threads=None):
        """The product of rows.

        Parameters
        ----------
        x : array_like, shape (..., d_in)
        activation : {None, "relu", "gelu", "gelu_tanh", "silu"}, optional
        multiply, residual : array_like, shape (..., d_out), optional
        out : ndarray, optional
            Receives the result and is returned.
        num_threads : int, optional
            Accepted and ignored here.

        Returns
        -------
        ndarray, shape (..., d_out)
        """
        with np.errstate(all="ignore"):
            y = ACTIVATIONS[activation](project(np.asarray(x, dtype=np.float64), self.matrix, self.bias))
            if multiply is not None:
                y = y * np.asarray(multiply, dtype=np.float64)
            if residual is not None:
                y = y + np.asarray(residual, dtype=np.float64)
        return _into(out, y)


def columns_of_int8(weight):
    """A matrix as integers from -127 to 127 and a scale for each column, such that ``integers * scales`` is near it.

    The scale is a 127th of the largest number of the column, rounded to float32: no less than its smallest normal
    number, and 0 for a column of zeros. Integers are the nearest, half to even.

    Parameters
    ----------
    weight : array_like, shape (d_in, d_out)

    Returns
    -------
    ndarray, shape (d_in, d_out), and ndarray, shape (d_out,)
    """
    weight = np.asarray(weight, dtype=np.float64)
    top = np.max(np.abs(weight), axis=0, initial=0.0)
    scale = np.where(top > 0, np.maximum(top / 127, float(np.finfo(np.float32).tiny)), 0.0)
    scale = np.float64(np.float32(scale))
    return np.rint(weight / np.where(scale > 0, scale, 1.0)), scale


def fading(share):
    """The function ``x * share(x)`` of a share that falls to 0 faster than x grows, so that -inf gives 0."""
    return lambda x: np.where(x == -np.inf, -0.0, x * share(x))


ERFC = np.vectorize(math.erfc, otypes=[np.float64])
ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    # Each share is written such that it keeps its digits where it is small.
    "gelu": fading(lambda x: ERFC(-x / math.sqrt(2)) / 2),
    "gelu_tanh": fading(lambda x: 1 / (1 + np.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)))),
    "silu": fading(lambda x: 1 / (1 + np.exp(-x))),
}


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None, return_sum=False, out=None, num_threads=None):
    """``(s - mean) / sqrt(variance + eps) * weight + bias`` over the last axis, with ``s = x + residual``.

    Parameters
    ----------
    x : array_like, shape (..., channels)
    weight, bias : array_like, shape (channels,), optional
    eps : float, default: 1e-5
    residual : array_like, shape (..., channels), optional
    return_sum : bool, default: False
        Whether to return s too.
    out : ndarray, optional
        Receives the result and is returned.
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    ndarray, shape (..., channels), or a pair of them
    """
    s = sum_of(x, residual)
    with np.errstate(all="ignore"):
        size = size_of(s)
        unit = s / size
        y = scaled(unit - np.mean(unit, axis=-1, keepdims=True), size, eps, weight)
        y = y + (0.0 if bias is None else np.asarray(bias, dtype=np.float64))
    y = _into(out, y)
    return (y, s) if return_sum else y


def rms_norm(x, weight=None, *, eps=1e-6, offset=0.0, residual=None, return_sum=False, out=None, num_threads=None):
    """``s / sqrt(mean(s**2) + eps) * (weight + offset)`` over the last axis, with ``s = x + residual``.

    Parameters
    ----------
    x : array_like, shape (..., channels)
    weight : array_like, shape (channels,), optional
        Without it nothing is multiplied.
    eps : float, default: 1e-6
    offset : float, default: 0
    residual : array_like, shape (..., channels), optional
    return_sum : bool, default: False
        Whether to return s too.
    out : ndarray, optional
        Receives the result and is returned.
    num_threads : int, optional
        Accepted and ignored here.

    Returns
    -------
    ndarray, shape (..., channels), or a pair of them
    """
    s = sum_of(x, residual)
    with np.errstate(all="ignore"):
        size = size_of(s)
        y = scaled(s / size, size, eps, None if weight is None else np.asarray(weight, dtype=np.float64) + offset)
    y = _into(out, y)
    return (y, s) if return_sum else y


def sum_of(x, residual):
    s = np.array(x, dtype=np.float64)
    with np.errstate(all="ignore"):
        return s if residual is None else s + np.asarray(residual, dtype=np.float64)


def size_of(s):
    """The largest number of each row, by which it can be divided: squares of the quotients are in range."""
    size = np.max(np.abs(s), axis=-1, keepdims=True, initial=0.0)
    return np.where(np.isfinite(size) & (size > 0), size, 1.0)


def scaled(unit, size, eps, weight):
    """``s / sqrt(mean(s**2) + eps) * weight`` of ``s = unit * size``; 0 where that is 0 / 0."""
    root = np.hypot(np.sqrt(np.mean(unit**2, axis=-1, keepdims=True)), math.sqrt(eps) / size)
    y = np.where(root == 0, 0.0, unit / root)
    return y if weight is None else y * np.asarray(weight, dtype=np.float64)


class MultiHeadAttention:
    """Several heads with projections before and after them (Vaswani et al. 2017, section 3.2.2).

    ``concat(head_1, ..., head_h) @ w_out + b_out`` with
    ``head_i = attention(x @ W_i^Q + b_i^Q, context @ W_i^K + b_i^K, context @ W_i^V + b_i^V)``, where W_i are a head's
    columns. With fewer heads of key and value, neighbouring query heads share one (Ainslie et al. 2023).

    Parameters
    ----------
    w_query : array_like, shape (d_model, num_heads * head_dim)
    w_key : array_like, shape (d_context, num_kv_heads * head_dim)
    w_value : array_like, shape (d_context, num_kv_heads * value_dim)
    w_out : array_like, shape (num_heads * value_dim, d_out), optional
        Without it the heads are returned side by side.
    num_heads : int
    num_kv_heads : int, optional
        Default `num_heads`.
    b_query, b_key, b_value, b_out : array_like, optional
        Added to the projections.
    rotary_base, rotary_frequencies, rotary_interleaved, rotary_dim : optional
        Rotate queries and keys by their positions, as `apply_rotary` does with this base, or with this pair of
        frequencies and attention factor; only if one of the two is given.
    q_norm, k_norm : array_like, shape (head_dim,), optional
        Weights of `rms_norm`, through which each head of query and of key goes before it is rotated.
    norm_eps : float
    is_causal, window_size, relative_bias, alibi_slopes, scale, softcap, sinks : optional
        Rules of every call that does not give them itself; None or False in a call means none.
    """

    def __init__(
        self,
        w_query,
        w_key,
        w_value,
        w_out=None,
        *,
        num_heads,
        num_kv_heads=None,
        b_query=None,
        b_key=None,
        b_value=None,
        b_out=None,
        rotary_base=None,
        rotary_frequencies=None,
        rotary_interleaved=False,
        rotary_dim=None,
        q_norm=None,
        k_norm=None,
        norm_eps=1e-6,
        is_causal=False,
        window_size=None,
        relative_bias=None,
        alibi_slopes=None,
        scale=None,
        softcap=None,
        sinks=None,
    ):
        arrays = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "w_out": w_out}
        arrays |= {"b_query": b_query, "b_key": b_key, "b_value": b_value, "b_out": b_out}
        arrays |= {"q_norm": q_norm, "k_norm": k_norm}
        for name, array in arrays.items():
            setattr(self, name, None if array is None else np.array(array, dtype=np.float64))
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.rotary_base = rotary_base
        self.rotary_frequencies = rotary_frequencies
        self.rotary_interleaved = rotary_interleaved
        self.rotary_dim = rotary_dim
        self.norm_eps = norm_eps
        self.held = {"is_causal": is_causal, "window_size": window_size, "relative_bias": relative_bias}
        self.held |= {"alibi_slopes": alibi_slopes, "scale": scale, "softcap": softcap, "sinks": sinks}

    def ruled(self, rules):
        """Those of a call, and what the layer holds where the call has none."""
        return {**self.held, **{name: x for name, x in rules.items() if x is not HELD}}

    @functools.partial(shows_rules, without=("enable_gqa", *SCALES), of=dot_product_attention, held=HELD_RULES)
    def __call__(self, x, context=None, *, cache=None, cu_seqlens=None, cu_seqlens_context=None, **rules):
        """Attend from x to itself, to `context`, or to what is in the cache followed by x.

        Parameters
        ----------
        x : array_like, shape (..., L, d_model)
        context : array_like, shape (..., S, d_context), optional
        cache : KVCache, optional
            Keys and values of x are appended after attention, `query_lengths` of them in each sequence. If it has a
            window w, and there is neither a `window_size` nor a `chunk_size`, `window_size` is ``(w - 1, None)``.
        cu_seqlens, cu_seqlens_context : array_like of int, optional
            As of `varlen_attention`: x and context are packed sequences, (total, d_model), each a call of its own.
        **rules
            As in `dot_product_attention`, where `return_weights` may also be a sequence of the heads whose weights are
            wanted; lengths and offsets have the batch axes of x, and no axis for the heads. If x
            attends to itself, `query_lengths` defaults to `key_lengths`. With a cache, chunks count from the first
            token ever appended, the columns of masks, biases and weights from the first that is there. Those that the
            layer holds count where they are not given.

        Returns
        -------
        ndarray (..., L, d_out), or a tuple (out[, weights (..., heads, L, S)][, lse (..., heads, L)])
        """
        rules = self.ruled(rules)
        if cu_seqlens is None:
            return self.answer(x, context, cache, **rules)
        x = np.asarray(x, dtype=np.float64)
        others = cu_seqlens if context is None else cu_seqlens_context
        parts = zip(cu_seqlens[:-1], cu_seqlens[1:], others[:-1], others[1:], strict=True)
        out = rules.pop("out", None)
        answers = [
            self.answer(x[a:b], None if context is None else np.asarray(context)[c:d], None, **rules)
            for a, b, c, d in parts
        ] or [self.answer(x, context, None, **rules)]
        if not isinstance(answers[0], tuple):
            return _into(out, np.concatenate(answers))
        outs, lses = zip(*answers, strict=True)
        return _into(out, np.concatenate(outs)), np.concatenate(lses, axis=-1)

    def answer(
        self,
        x,
        context,
        cache,
        *,
        window_size,
        chunk_size=None,
        left_chunks=None,
        query_offset=None,
        key_lengths=None,
        query_lengths=None,
        mask=None,
        scale=None,
        return_weights=False,
        out=None,
        **rules,
    ):
        """A call with all its rules."""
        x = np.asarray(x, dtype=np.float64)
        some_heads = None if isinstance(return_weights, (bool, str)) else np.asarray(return_weights, dtype=int)
        if context is None and cache is None and query_lengths is None:
            query_lengths = key_lengths
        context = x if context is None else np.asarray(context, dtype=np.float64)
        query_offset, key_lengths, query_lengths = map(per_head, (query_offset, key_lengths, query_lengths))
        query, key, value = self.projected(x, context)
        query, key = self.normalized(query, self.q_norm), self.normalized(key, self.k_norm)
        if cache is None:
            position = query_positions(query.shape[-2], key.shape[-2], query_offset, query_lengths, key_lengths)
            position, key_position = position[..., 0], np.arange(key.shape[-2])
        else:
            position = key_position = (cache.dropped + cache.lengths)[..., None] + np.arange(x.shape[-2])
        query, key = self.rotated(query, position), self.rotated(key, key_position)
        if cache is not None:
            counts = np.broadcast_to(x.shape[-2] if query_lengths is None else query_lengths, cache.lengths.shape)
            there, before = cache.lengths, cache.dropped
            if cache.dtype == np.int8:
                old_key = dequantized(cache.key, cache.key_scale, cache.key_center)
                old_value = dequantized(cache.value, cache.value_scale)
                cache.append(key, value, counts)
                block = key.shape[-1] // cache.key_scale.shape[-1]
                *stored, center = quantize_kv(key, value, center=cache.key_center, block=block)
                key, value = dequantized(stored[0], stored[2], center), dequantized(stored[1], stored[3])
            else:
                old_key, old_value = np.array(cache.key), np.array(cache.value)
                cache.append(key, value, counts)
            keys, values = (behind(old, new, there, counts) for old, new in ((old_key, key), (old_value, value)))
            key, value, key_lengths = keys, values, there + counts
            if window_size is None and chunk_size is None and cache.window is not None:
                window_size = (cache.window - 1, None)
            if chunk_size is not None:
                position = per_row(before) + query_positions(x.shape[-2], None, None, counts, key_lengths)
                key_position = per_row(before) + np.arange(key.shape[-2])
                near = near_chunks(position, key_position, chunk_size, left_chunks)
                mask = near if mask is None else near & np.asarray(mask)
                chunk_size = left_chunks = None

        results = dot_product_attention(
            query,
            key,
            value,
            enable_gqa=True,
            window_size=window_size,
            chunk_size=chunk_size,
            left_chunks=left_chunks,
            query_offset=query_offset,
            key_lengths=key_lengths,
            query_lengths=query_lengths,
            mask=mask,
            scale=scale,
            return_weights=True if some_heads is not None else return_weights,
            **rules,
        )
        if some_heads is not None:
            results = results[0], results[1][..., some_heads, :, :], *results[2:]
        heads, *rest = results if isinstance(results, tuple) else (results,)
        with np.errstate(all="ignore"):
            result = _into(out, project(join_heads(heads), self.w_out, self.b_out))
        return (result, *rest) if rest else result

    def projected(self, x, context):
        """Query, key and value, ``(..., heads, tokens, channels)``; before the norms of heads."""
        with np.errstate(all="ignore"):
            return (
                split_heads(project(x, self.w_query, self.b_query), self.num_heads),
                split_heads(project(context, self.w_key, self.b_key), self.num_kv_heads),
                split_heads(project(context, self.w_value, self.b_value), self.num_kv_heads),
            )

    def normalized(self, heads, weight):
        """Queries or keys after their norm, if there is one."""
        with np.errstate(all="ignore"):
            return heads if weight is None else rms_norm(heads, weight, eps=self.norm_eps)

    def rotated(self, heads, positions, inverse=False):
        """Queries or keys, rotated by their positions if the layer rotates at all; inverse: gradients, turned back."""
        if self.rotary_base is None and self.rotary_frequencies is None:
            return heads
        dim = heads.shape[-1] if self.rotary_dim is None else self.rotary_dim
        frequencies, factor = self.rotary_frequencies or rotary_frequencies(dim, base=self.rotary_base)
        return apply_rotary(
            heads,
            positions=positions,
            frequencies=frequencies,
            attention_factor=factor,
            interleaved=self.rotary_interleaved,
            rotary_dim=dim,
            inverse=inverse,
        )

    def parameters(self):
        """The layer's own arrays by the names of its arguments; the next call uses what is written there."""
        arrays = {f"{kind}_{name}": getattr(self, f"{kind}_{name}") for kind in "wb" for name in (*PARTS, "out")}
        arrays |= {"q_norm": self.q_norm, "k_norm": self.k_norm}
        return {name: array for name, array in arrays.items() if array is not None}

    @functools.partial(
        shows_rules,
        without=("enable_gqa", "return_weights", "return_lse", "out", *SCALES),
        of=dot_product_attention,
        held=HELD_RULES,
    )
    def vjp(self, x, context=None, **rules):
        """A call, and the function that takes the gradient of a loss for its output back to all that led there.

        A projection ``y = x @ w + b`` gives ``x.T @ dy`` to w, the sum of dy over all tokens to b, and ``dy @ w.T`` to
        x. The way back has the steps of a call, last to first: output projection, attention, rotation, projections.
        Rows past `query_lengths` are padding and take no part.

        Parameters
        ----------
        As for a call.

        Returns
        -------
        out : ndarray, shape (..., L, d_out)
        backward : callable
            ``backward(grad_out, wrt=None)`` returns a dict from names to gradients: x, context if given, the names of
            `parameters`, and bias, relative_bias, alibi_slopes and sinks if they are named in `wrt`.
        """
        return self.with_way_back(x, context, **self.ruled(rules))

    def with_way_back(self, x, context, *, query_offset=None, key_lengths=None, query_lengths=None, **rules):
        """`vjp` with all its rules."""
        x = np.asarray(x, dtype=np.float64)
        itself = context is None
        if itself and query_lengths is None:
            query_lengths = key_lengths
        context = x if itself else np.asarray(context, dtype=np.float64)
        query_offset, key_lengths, query_lengths = map(per_head, (query_offset, key_lengths, query_lengths))
        raw_query, raw_key, value = self.projected(x, context)
        query, key = self.normalized(raw_query, self.q_norm), self.normalized(raw_key, self.k_norm)
        position = query_positions(query.shape[-2], key.shape[-2], query_offset, query_lengths, key_lengths)[..., 0]
        key_position = np.arange(key.shape[-2])
        query, key = self.rotated(query, position), self.rotated(key, key_position)
        rules |= {"query_offset": query_offset, "key_lengths": key_lengths, "query_lengths": query_lengths}
        rules["enable_gqa"] = True
        heads = join_heads(dot_product_attention(query, key, value, **rules))
        with np.errstate(all="ignore"):
            out = project(heads, self.w_out, self.b_out)

        def backward(grad_out, wrt=None):
            given = {"x": x} | ({} if itself else {"context": context}) | self.parameters()
            names = tuple(given) if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
            added = tuple(name for name in ADDED if name in names)
            valid = np.ones(out.shape[:-1], dtype=bool)
            if query_lengths is not None:
                valid = np.broadcast_to(np.arange(out.shape[-2]) < query_lengths, valid.shape)
            d_out = np.where(valid[..., None], np.asarray(grad_out, dtype=np.float64), 0.0)
            with np.errstate(all="ignore"):
                d_heads = d_out if self.w_out is None else d_out @ self.w_out.T
                d_query, d_key, d_value, *others = dot_product_attention_vjp(
                    split_heads(d_heads, self.num_heads), query, key, value, wrt=(*PARTS, *added), **rules
                )
                d_query = self.rotated(d_query, position, inverse=True)
                d_key = self.rotated(d_key, key_position, inverse=True)
                norms = {}
                if self.q_norm is not None:
                    d_query, norms["q_norm"] = rms_norm_vjp(d_query, raw_query, self.q_norm, self.norm_eps)
                if self.k_norm is not None:
                    d_key, norms["k_norm"] = rms_norm_vjp(d_key, raw_key, self.k_norm, self.norm_eps)
                d_query, d_key, d_value = map(join_heads, (d_query, d_key, d_value))
                d_x = d_query @ self.w_query.T
                d_context = d_key @ self.w_key.T + d_value @ self.w_value.T
                gradients = {"x": d_x + d_context} if itself else {"x": d_x, "context": d_context}
                gradients |= dict(zip(added, others, strict=True)) | norms
                uses = ((x, d_query), (context, d_key), (context, d_value), (heads, d_out))
                for name, (tokens, d_y) in zip((*PARTS, "out"), uses, strict=True):
                    gradients[f"w_{name}"] = outer_sum(tokens, d_y)
                    gradients[f"b_{name}"] = d_y.sum(axis=tuple(range(d_y.ndim - 1)))
            return {name: gradients[name] for name in names}

        return out, backward


PARTS = ("query", "key", "value")


def rms_norm_vjp(d_y, x, weight, eps):
    """The gradients for x and weight. A row whose gradient is 0 takes no part, whatever it is."""
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    unit = x / root
    product = np.where(d_y != 0, d_y * unit, 0.0)
    d_x = (d_y * weight - unit * np.mean(product * weight, axis=-1, keepdims=True)) / root
    d_x = np.where(np.any(d_y != 0, axis=-1, keepdims=True), d_x, 0.0)
    return d_x, product.reshape(-1, x.shape[-1]).sum(axis=0)


def per_head(per_sequence):
    """A length or offset for each sequence, with an axis more for the heads; a number as it is."""
    return per_sequence if np.ndim(per_sequence) == 0 else np.asarray(per_sequence)[..., None]


def behind(old, new, old_lengths, new_lengths):
    """In each sequence the first new tokens right after the first old ones; rounded to the dtype of the old.

    old, new: ``(..., heads, tokens, channels)``; lengths: ``(..., 1)``, over the batch axes and one for the heads.
    """
    longest = int(np.max(old_lengths + new_lengths, initial=0))
    both = np.zeros((*old.shape[:-2], longest, old.shape[-1]))
    with np.errstate(all="ignore"):
        new = new.astype(old.dtype)
    for sequence in np.ndindex(old.shape[:-3]):
        n, m = int(old_lengths[sequence][0]), int(new_lengths[sequence][0])
        both[sequence][:, :n] = old[sequence][:, :n]
        both[sequence][:, n : n + m] = new[sequence][:, :m]
    return both


def split_heads(x, num_heads):
    """From ``(..., L, heads * D)`` to ``(..., heads, L, D)``."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).swapaxes(-2, -3)


def join_heads(x):
    """From ``(..., heads, L, E)`` to ``(..., L, heads * E)``."""
    return x.swapaxes(-2, -3).reshape(*x.shape[:-3], x.shape[-2], x.shape[-3] * x.shape[-1])
