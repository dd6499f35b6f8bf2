"""What a careful NumPy user would write instead of calling fastattn: the baseline of every benchmark."""

import numpy as np


def softmax(x):
    weights = x - x.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def dot_product_attention(query, key, value, is_causal=False):
    """Two matrix products, with everything between them in place; L x S scores for each head at once."""
    scale = query.shape[-1] ** -0.5
    scores = (query * scale) @ key.swapaxes(-1, -2)
    if is_causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        visible = np.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)
        np.copyto(scores, -np.inf, where=~visible)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    output = scores @ value
    # Dividing the output rather than the weights: head_dim numbers a row, not seqlen_k.
    output /= scores.sum(axis=-1, keepdims=True)
    return output


def expected_attention(query, key, value, is_causal=False):
    """The answer to check against: the same formula in float64, a head at a time to bound the memory."""
    output = np.empty((*query.shape[:-1], value.shape[-1]))
    for head in np.ndindex(query.shape[:-2]):
        rows = (array[head].astype(np.float64) for array in (query, key, value))
        output[head] = dot_product_attention(*rows, is_causal)
    return output
