"""What a careful NumPy user would write instead of calling fastattn: the baseline of every benchmark."""

import functools

import numpy as np


def softmax(x):
    weights = x - x.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def dot_product_attention(query, key, value, is_causal=False, scale=None):
    """Two matrix products, with everything between them in place; L x S scores for each head at once."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    scores = (query * scale) @ key.swapaxes(-1, -2)
    if is_causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        visible = np.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)
        np.copyto(scores, -np.inf, where=~visible)
    return _add_up(scores, value)


def _add_up(scores, value):
    """Softmax of the scores, in place, times the values."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    output = scores @ value
    # Dividing the output rather than the weights: head_dim numbers a row, not seqlen_k.
    output /= scores.sum(axis=-1, keepdims=True)
    return output


def bilinear_attention(query, key, value, w_query, w_key):
    """Dot products of what two matrices make of the queries and the keys, at scale 1."""
    return dot_product_attention(query @ w_query, key @ w_key, value, scale=1.0)


# What a block of (queries, channels, keys) may take: the passes over it then find it in a core's cache, and few
# enough calls are made that their own cost does not show. Found by trying.
BLOCK_BYTES = 2**19


def tanh_scores(query, key, w_score):
    """Additive scores of one head, (L, S): a block of sums, their tanh in place, a matrix product with w_score."""
    key = np.ascontiguousarray(key.T)  # keys last: the inner loops are long whatever the number of channels
    scores = np.empty((len(query), key.shape[1]), query.dtype)
    rows = _rows_of_a_block(key, BLOCK_BYTES)
    block = _workspace((rows, *key.shape), query.dtype)
    for start in range(0, len(query), rows):
        stop = min(start + rows, len(query))
        part = block[: stop - start]
        np.add(query[start:stop, :, None], key, out=part)
        np.tanh(part, out=part)
        np.matmul(w_score, part, out=scores[start:stop])
    return scores


def exponential_scores(query, key, w_score):
    """The same by tanh(a + b) = 1 - 2 A / (A + B), where A = exp(-2a) and B = exp(2b): a sum and a division.

    The exponentials are taken once a row. For numbers so small that they stay finite.
    """
    a, b = np.exp(-2 * query), np.exp(2 * key.T, order="C")
    weights = (w_score * a)[:, None, :]
    scores = np.empty((len(query), 1, len(key)), query.dtype)
    rows = _rows_of_a_block(b, 4 * BLOCK_BYTES)
    block, one = _workspace((rows, *b.shape), query.dtype), query.dtype.type(1)
    for start in range(0, len(query), rows):
        stop = min(start + rows, len(query))
        part = block[: stop - start]
        np.add(a[start:stop, :, None], b, out=part)
        np.divide(one, part, out=part)  # twice as fast as np.reciprocal
        np.matmul(weights[start:stop], part, out=scores[start:stop])
    return _from_sum(scores[:, 0], w_score)


def paired_scores(query, key, w_score):
    """The same with one division for two channels, whose denominator and numerator are matrix products.

    (A1 + B1) (A2 + B2) = [A1 A2, A1, A2, 1] . [1, B2, B1, B1 B2], and with the weights u and v of the channels
    u A1 (A2 + B2) + v A2 (A1 + B1) = [(u + v) A1 A2, u A1, v A2, 0] . [the same].
    For numbers so small that products of two exponentials stay finite.
    """
    if len(w_score) % 2:  # one more channel, which weighs nothing
        query, key, w_score = (np.append(x, np.zeros_like(x[..., :1]), axis=-1) for x in (query, key, w_score))
    a1, a2 = np.exp(-2 * query.T, order="C").reshape(-1, 2, len(query)).swapaxes(0, 1)
    b1, b2 = np.exp(2 * key.T, order="C").reshape(-1, 2, len(key)).swapaxes(0, 1)
    u, v = w_score.reshape(-1, 2, 1).swapaxes(0, 1)
    below = np.stack([a1 * a2, a1, a2, np.ones_like(a1)], axis=-1)
    above = np.stack([(u + v) * a1 * a2, u * a1, v * a2, np.zeros_like(a1)], axis=-1)
    keys = np.stack([np.ones_like(b1), b2, b1, b1 * b2], axis=1)
    scores = np.empty((len(query), len(key)), query.dtype)
    rows = _rows_of_a_block(b1, 2 * BLOCK_BYTES)
    blocks = _workspace((2, len(b1), rows, len(key)), query.dtype)
    for start in range(0, len(query), rows):
        part = slice(start, min(start + rows, len(query)))
        numerators, denominators = blocks[:, :, : part.stop - start]
        np.matmul(above[:, part], keys, out=numerators)
        np.matmul(below[:, part], keys, out=denominators)
        np.divide(numerators, denominators, out=numerators)
        np.sum(numerators, axis=0, out=scores[part])
    return _from_sum(scores, w_score)


# Kept for the next head and the next call: memory fresh from the system costs a page fault for each 4 KiB.
@functools.lru_cache(maxsize=1)
def _workspace(shape, dtype):
    return np.empty(shape, dtype)


def _rows_of_a_block(row, nbytes):
    return max(1, nbytes // max(1, row.nbytes))


def _from_sum(scores, w_score):
    scores *= -2
    scores += w_score.sum()
    return scores


def textbook_scores(query, key, w_score):
    """As the formula has it: an array of (L, S, hidden)."""
    return np.tanh(query[:, None, :] + key) @ w_score


def additive_attention(query, key, value, w_score, w_query=None, w_key=None, scores=tanh_scores):
    """A head at a time; `scores` is one of the ways above to make a head's L x S scores."""
    query = query if w_query is None else query @ w_query
    key = key if w_key is None else key @ w_key
    output = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    for head in np.ndindex(query.shape[:-2]):
        output[head] = _add_up(scores(query[head], key[head], w_score), value[head])
    return output


def expected_additive_attention(*arrays, **projections):
    """The answer to check against: the same formula in float64."""
    projections = {name: array.astype(np.float64) for name, array in projections.items()}
    return additive_attention(*(array.astype(np.float64) for array in arrays), **projections)


def expected_attention(query, key, value, is_causal=False):
    """The answer to check against: the same formula in float64, a head at a time to bound the memory."""
    output = np.empty((*query.shape[:-1], value.shape[-1]))
    for head in np.ndindex(query.shape[:-2]):
        rows = (array[head].astype(np.float64) for array in (query, key, value))
        output[head] = dot_product_attention(*rows, is_causal)
    return output
