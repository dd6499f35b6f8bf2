"""What a careful NumPy user would write instead of calling fastattn: the baselines of all benchmarks."""

import functools

import numpy as np


def softmax(x, axis=-1):
    weights = x - x.max(axis=axis, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=axis, keepdims=True)
    return weights


def softmax_back(grad_out, weights, axis=-1):
    """The gradient of softmax, from what it returned."""
    products = weights * grad_out
    products -= weights * products.sum(axis=axis, keepdims=True)
    return products


def sparse(x, function="sparsemax", axis=-1):
    """sparsemax or entmax15 as their papers write them: sorted, and a threshold for each number of the largest."""
    z = x - x.max(axis=axis, keepdims=True)
    z = np.moveaxis(z, axis, -1)
    k = np.arange(1, z.shape[-1] + 1, dtype=x.dtype)
    if function == "sparsemax":
        largest = -np.sort(-z, axis=-1)
        t = (np.cumsum(largest, axis=-1) - 1) / k
    else:
        z /= 2
        largest = -np.sort(-z, axis=-1)
        mean = np.cumsum(largest, axis=-1) / k
        with np.errstate(invalid="ignore"):
            t = mean - np.sqrt(1 / k - (np.cumsum(largest * largest, axis=-1) / k - mean * mean))
    count = np.count_nonzero(largest > t, axis=-1, keepdims=True)
    weights = np.maximum(z - np.take_along_axis(t, count - 1, axis=-1), 0)
    return np.moveaxis(weights if function == "sparsemax" else weights * weights, -1, axis)


def dot_product_attention(query, key, value, is_causal=False, scale=None):
    """Two matrix products, with everything between them in place; L x S scores for all heads at once."""
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
    # Dividing the output rather than the weights: head_dim numbers per row, not seqlen_k.
    output /= scores.sum(axis=-1, keepdims=True)
    return output


# Queries per block of a band, a compromise between wide and narrow windows.
BAND_ROWS = 64


def truncated_attention(query, key, value, left, right=0, rows=BAND_ROWS):
    """One head at a time, blocks of queries over the keys of their windows, several blocks per NumPy call.

    Hidden scores of a block are computed too, and get a bias of minus infinity that all blocks share.
    """
    seqlen, head_dim = query.shape[-2:]
    query = query * query.dtype.type(head_dim**-0.5)
    output = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    width = left + rows + right
    # Blocks whose windows are within the keys: [first, last).
    first = -(-left // rows)
    last = max(first, (seqlen - right) // rows)
    offsets = np.arange(width) - left - np.arange(rows)[:, None]
    band = np.where((-left <= offsets) & (offsets <= right), 0, -np.inf).astype(query.dtype)
    step = _rows_of_a_block(band, BLOCK_BYTES)
    scores = _workspace((step, rows, width), query.dtype)
    for head in np.ndindex(query.shape[:-2]):
        blocks, results = (_blocks(array[head], rows) for array in (query, output))
        keys, values = (_windows_of_blocks(array[head], rows, width) for array in (key, value))
        for start in range(first, last, step):
            stop = min(start + step, last)
            part = scores[: stop - start]
            # The window of block i begins at key i * rows - left.
            there = slice(start * rows - left, (stop - 1) * rows - left + 1, rows)
            np.matmul(blocks[start:stop], keys[there].swapaxes(-1, -2), out=part)
            part += band
            results[start:stop] = _add_up(part, values[there])
        edges = (range(0, min(first * rows, seqlen), rows), range(last * rows, seqlen, rows))
        for start in (*edges[0], *edges[1]):
            _edge(query[head], key[head], value[head], output[head], start, min(start + rows, seqlen), left, right)
    return output


def _edge(query, key, value, output, start, stop, left, right):
    """Rows of a band whose windows extend past the keys."""
    keys = slice(max(0, start - left), min(len(key), stop + right))
    scores = query[start:stop] @ key[keys].T
    offsets = np.arange(keys.start, keys.stop) - np.arange(start, stop)[:, None]
    np.copyto(scores, -np.inf, where=(offsets < -left) | (offsets > right))
    output[start:stop] = _add_up(scores, value[keys])


def _blocks(array, rows):
    """(n, head_dim) as whole blocks: (n // rows, rows, head_dim)."""
    return array[: len(array) // rows * rows].reshape(-1, rows, array.shape[-1])


def _windows_of_blocks(array, rows, width):
    """A view (n - width + 1, width, head_dim) of (n, head_dim): entry i starts at row i."""
    if len(array) < width:
        return array[:0, None]
    return np.lib.stride_tricks.sliding_window_view(array, width, axis=0).swapaxes(-1, -2)


def truncated_by_row(query, key, value, left, right=0):
    """The same with a window per query, and products summed by einsum: for narrow windows."""
    return _by_row(query, key, value, left, right, _einsum_scores, _einsum_values)


def truncated_by_distance(query, key, value, left, right=0):
    """The same with one sum over all queries per distance between query and key: for the narrowest windows."""
    return _by_row(query, key, value, left, right, _shifted_scores, _shifted_values)


def _by_row(query, key, value, left, right, make_scores, add_up):
    seqlen, head_dim = query.shape[-2:]
    query = query * query.dtype.type(head_dim**-0.5)
    output = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    width = left + 1 + right
    first, last = min(left, seqlen), max(min(left, seqlen), seqlen - right)
    step = max(1, BLOCK_BYTES // (query.itemsize * max(head_dim, width)))
    for head in np.ndindex(query.shape[:-2]):
        q, k, v, result = query[head], key[head], value[head], output[head]
        for start in range(first, last, step):
            stop = min(start + step, last)
            keys = slice(start - left, stop + right)
            weights = make_scores(q[start:stop], k[keys], width)
            weights -= weights.max(axis=-1, keepdims=True)
            np.exp(weights, out=weights)
            weights /= weights.sum(axis=-1, keepdims=True)
            add_up(weights, v[keys], result[start:stop])
        for start, stop in ((0, first), (last, seqlen)):
            if start < stop:
                _edge(q, k, v, result, start, stop, left, right)
    return output


def _windows(array, width):
    return np.lib.stride_tricks.sliding_window_view(array, width, axis=0)


def _einsum_scores(query, key, width):
    return np.einsum("ld,ldw->lw", query, _windows(key, width))


def _einsum_values(weights, value, output):
    np.einsum("lw,ldw->ld", weights, _windows(value, weights.shape[-1]), out=output)


def _shifted_scores(query, key, width):
    scores = np.empty((len(query), width), query.dtype)
    for distance in range(width):
        np.einsum("ld,ld->l", query, key[distance : distance + len(query)], out=scores[:, distance])
    return scores


def _shifted_values(weights, value, output):
    np.multiply(weights[:, :1], value[: len(output)], out=output)
    for distance in range(1, weights.shape[-1]):
        output += weights[:, distance, None] * value[distance : distance + len(output)]


def grouped_attention(query, key, value):
    """Queries that share a key head become rows of one head: keys and values are read once for all of them."""
    rows = query.reshape(*key.shape[:-2], -1, query.shape[-1])
    return dot_product_attention(rows, key, value).reshape(*query.shape[:-1], value.shape[-1])


def grouped_attention_keys_first(query, key, value):
    """The same with the scores as key @ query.T."""
    rows = query.reshape(*key.shape[:-2], -1, query.shape[-1]) * query.dtype.type(query.shape[-1] ** -0.5)
    scores = key @ np.ascontiguousarray(rows.swapaxes(-1, -2))
    scores = np.ascontiguousarray(scores.swapaxes(-1, -2))
    return _add_up(scores, value).reshape(*query.shape[:-1], value.shape[-1])


def edge_weights(query, key, graph, rows, w_score=None):
    """Softmax over the edges of each row, (heads, edges): dot products, or GAT's scores of one number a node.

    rows: of each edge. Everything is written down for each edge, the channels of query and key too.
    """
    indptr, indices = graph
    if w_score is None:
        scores = np.einsum("hec,hec->he", query[:, rows], key[:, indices])
        scores *= query.shape[-1] ** -0.5
    else:
        scores = query[:, rows, 0] + key[:, indices, 0]
        np.maximum(scores, 0.2 * scores, out=scores)
        scores *= w_score[0]
    begins = indptr[:-1][np.diff(indptr) > 0]
    filled = rows[begins]  # rows with edges
    most = np.zeros((len(scores), len(indptr) - 1), scores.dtype)
    most[:, filled] = np.maximum.reduceat(scores, begins, axis=1)
    scores -= most[:, rows]
    np.exp(scores, out=scores)
    most[:, filled] = np.add.reduceat(scores, begins, axis=1)
    scores /= most[:, rows]
    return scores


def graph_attention(query, key, value, graph, rows, w_score=None):
    """A head at a time: weighted values of all edges, and their sums by rows."""
    indptr, indices = graph
    begins = indptr[:-1][np.diff(indptr) > 0]
    output = np.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
    for q, k, v, out in zip(query, key, value, output, strict=True):
        weights = edge_weights(q[None], k[None], graph, rows, w_score)[0]
        out[rows[begins]] = np.add.reduceat(weights[:, None] * v[indices], begins, axis=0)
    return output


def graph_gradients(grad_out, query, key, value, graph, rows, w_score=None):
    """Gradients for query, key and value, a head at a time: rows are added up where they begin, columns by
    numpy.add.at. A single set of weights for GAT's score, of one number a node."""
    indptr, indices = graph
    begins = indptr[:-1][np.diff(indptr) > 0]
    filled = rows[begins]
    gradients = [np.zeros_like(x) for x in (query, key, value)]
    for g, q, k, v, d_query, d_key, d_value in zip(grad_out, query, key, value, *gradients, strict=True):
        weights = edge_weights(q[None], k[None], graph, rows, w_score)[0]
        terms = np.einsum("ec,ec->e", g[rows], v[indices])
        mean = np.zeros(len(q), q.dtype)
        mean[filled] = np.add.reduceat(weights * terms, begins)
        of_scores = (weights * (terms - mean[rows]))[:, None]
        if w_score is None:
            of_scores *= q.shape[-1] ** -0.5
            of_query, of_key = of_scores * k[indices], of_scores * q[rows]
        else:
            of_query = of_key = of_scores * w_score * np.where(q[rows] + k[indices] > 0, 1, q.dtype.type(0.2))
        d_query[filled] = np.add.reduceat(of_query, begins, axis=0)
        np.add.at(d_key, indices, of_key)
        np.add.at(d_value, indices, weights[:, None] * g[rows])
    return gradients


def expected_graph_gradients(grad_out, query, key, value, graph, rows, w_score=None):
    """The same in float64, side by side."""
    arrays = (x.astype(np.float64) for x in (grad_out, query, key, value))
    return np.concatenate(graph_gradients(*arrays, graph, rows, w_score), axis=-1)


def expected_graph_attention(query, key, value, graph, rows, w_score=None):
    """The same in float64."""
    return graph_attention(*(x.astype(np.float64) for x in (query, key, value)), graph, rows, w_score)


def bilinear_attention(query, key, value, w_query, w_key):
    """Dot products of projected queries and keys, at scale 1."""
    return dot_product_attention(query @ w_query, key @ w_key, value, scale=1.0)


def multi_head_attention(x, w_qkv, b_qkv, w_out, b_out, heads):
    """One product for queries, keys and values, with weights concatenated beforehand, and the formula."""
    batch, seqlen, d_model = x.shape
    # Flat rows: for a stack of matrices NumPy would make one product each.
    projected = x.reshape(-1, d_model) @ w_qkv
    projected += b_qkv
    query, key, value = projected.reshape(batch, seqlen, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    rows = dot_product_attention(query, key, value).swapaxes(1, 2).reshape(-1, d_model)
    output = rows @ w_out
    output += b_out
    return output.reshape(x.shape)


def multi_head_attention_step(x, w_qkv, b_qkv, w_out, b_out, heads, grad_out):
    """The same and its way back, with the weights kept: the gradients of x, w_qkv, b_qkv, w_out and b_out."""
    batch, seqlen, d_model = x.shape
    tokens, grad = x.reshape(-1, d_model), grad_out.reshape(-1, d_model)
    projected = tokens @ w_qkv
    projected += b_qkv
    query, key, value = projected.reshape(batch, seqlen, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scale = query.dtype.type(query.shape[-1] ** -0.5)
    weights = softmax((query * scale) @ key.swapaxes(-1, -2))
    rows = (weights @ value).swapaxes(1, 2).reshape(-1, d_model)
    _ = rows @ w_out + b_out

    d_rows = (grad @ w_out.T).reshape(batch, seqlen, heads, -1).swapaxes(1, 2)
    d_projected = np.empty_like(projected)
    d_query, d_key, d_value = d_projected.reshape(batch, seqlen, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    np.matmul(weights.swapaxes(-1, -2), d_rows, out=d_value)
    d_scores = d_rows @ value.swapaxes(-1, -2)
    d_scores -= (d_scores * weights).sum(axis=-1, keepdims=True)
    d_scores *= weights
    d_scores *= scale
    np.matmul(d_scores, key, out=d_query)
    np.matmul(d_scores.swapaxes(-1, -2), query, out=d_key)
    d_x = (d_projected @ w_qkv.T).reshape(x.shape)
    return d_x, tokens.T @ d_projected, d_projected.sum(axis=0), rows.T @ grad, grad.sum(axis=0)


def rotary_tables(seqlen, head_dim, dtype, base=10000.0):
    """Cosines and sines of the angles, (seqlen, head_dim / 2)."""
    angles = np.arange(seqlen)[:, None] * base ** (-2 * np.arange(head_dim // 2) / head_dim)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def apply_rotary(x, cosines, sines):
    """Rotates each pair of channels i and i + head_dim / 2 by the angles of the tables."""
    first, second = np.split(x, 2, axis=-1)
    output = np.empty_like(x)
    new_first, new_second = np.split(output, 2, axis=-1)
    np.multiply(first, cosines, out=new_first)
    new_first -= second * sines
    np.multiply(second, cosines, out=new_second)
    new_second += first * sines
    return output


# Size of a block of (queries, channels, keys): small enough for a core's cache, large enough for the overhead of calls
# to be negligible. Found by experiment.
BLOCK_BYTES = 2**19


def tanh_scores(query, key, w_score):
    """Additive scores of one head, (L, S): a block of sums, their tanh in place, a matrix product with w_score."""
    key = np.ascontiguousarray(key.T)  # keys last, for long inner loops whatever the number of channels
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
    """The same with tanh(a + b) = 1 - 2 A / (A + B), where A = exp(-2a) and B = exp(2b): a sum and a division.

    The exponentials are computed once per row. Only for numbers small enough for them to be finite.
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
    """The same with one division per two channels, whose denominator and numerator are matrix products.

    (A1 + B1) (A2 + B2) = [A1 A2, A1, A2, 1] . [1, B2, B1, B1 B2], and with the weights u and v of the channels u A1 (A2
    + B2) + v A2 (A1 + B1) = [(u + v) A1 A2, u A1, v A2, 0] . [the same]. Only for numbers small enough for products of
    two exponentials to be finite.
    """
    if len(w_score) % 2:  # one more channel, of weight 0
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


# Kept for the next head and the next call: fresh memory costs a page fault per 4 KiB.
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
    """The formula as it stands: an array of (L, S, hidden)."""
    return np.tanh(query[:, None, :] + key) @ w_score


def additive_attention(query, key, value, w_score, w_query=None, w_key=None, scores=tanh_scores):
    """One head at a time; `scores` is one of the ways above to compute a head's L x S scores."""
    query = query if w_query is None else query @ w_query
    key = key if w_key is None else key @ w_key
    output = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    for head in np.ndindex(query.shape[:-2]):
        output[head] = _add_up(scores(query[head], key[head], w_score), value[head])
    return output


def attention_gradients(grad_out, query, key, value, visible=True, bias=None):
    """Gradients for query, key and value, a head at a time, each with arrays of (L, S). bias: of heads and keys."""
    gradients = [np.empty_like(query), np.zeros_like(key), np.zeros_like(value)]
    scale = query.dtype.type(query.shape[-1] ** -0.5)
    for batch, head in np.ndindex(query.shape[:2]):
        shared = batch, head * key.shape[1] // query.shape[1]
        q, k, v, g = query[batch, head], key[shared], value[shared], grad_out[batch, head]
        weights = q @ k.T
        weights *= scale
        if bias is not None:
            weights += bias[head]
        if visible is not True:
            weights[~visible] = -np.inf
        weights -= weights.max(-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(-1, keepdims=True)
        of_scores = g @ v.T
        of_scores -= np.einsum("ij,ij->i", of_scores, weights)[:, None]
        of_scores *= weights
        of_scores *= scale
        gradients[0][batch, head] = of_scores @ k
        gradients[1][shared] += of_scores.T @ q
        gradients[2][shared] += weights.T @ g
    return gradients


def expected_attention_gradients(grad_out, query, key, value, visible, bias):
    """The same in float64."""
    arrays = (array.astype(np.float64) for array in (grad_out, query, key, value))
    return attention_gradients(*arrays, visible, bias)


def additive_gradients(grad_out, query, key, value, w_score):
    """Gradients for query, key, value and w_score, a head at a time, each with an array of (L, S, hidden)."""
    gradients = [np.empty_like(x) for x in (query, key, value)]
    d_w_score = np.zeros_like(w_score)
    for head in np.ndindex(query.shape[:-2]):
        g, v = grad_out[head], value[head]
        tanh = np.tanh(query[head][:, None, :] + key[head])
        weights = tanh @ w_score
        weights -= weights.max(-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(-1, keepdims=True)
        of_scores = g @ v.T
        of_scores -= (of_scores * weights).sum(-1, keepdims=True)
        of_scores *= weights
        gradients[2][head] = weights.T @ g
        d_w_score += of_scores.ravel() @ tanh.reshape(-1, len(w_score))
        np.multiply(tanh, tanh, out=tanh)
        np.subtract(1, tanh, out=tanh)
        tanh *= of_scores[..., None]
        gradients[0][head] = tanh.sum(1) * w_score
        gradients[1][head] = tanh.sum(0) * w_score
    return *gradients, d_w_score


def expected_additive_gradients(*arrays):
    """The same in float64."""
    return additive_gradients(*(array.astype(np.float64) for array in arrays))


# Tokens of a chunk of linear attention: the best of 32 to 256.
CHUNK = 64


def elu_plus_1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def linear_attention(query, key, value, chunk=CHUNK, eps=1e-6):
    """Causal, with elu + 1 and normalised: within a chunk by scores, with what came before by the state."""
    query, key = elu_plus_1(query), elu_plus_1(key)
    output = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    state = np.zeros((*key.shape[:-2], key.shape[-1], value.shape[-1]), query.dtype)
    total = np.zeros((*key.shape[:-2], key.shape[-1], 1), query.dtype)
    visible = np.tri(chunk, dtype=query.dtype)
    for start in range(0, query.shape[-2], chunk):
        q, k, v = (array[..., start : start + chunk, :] for array in (query, key, value))
        scores = q @ k.swapaxes(-1, -2)
        scores *= visible[: q.shape[-2], : q.shape[-2]]
        part = scores @ v
        part += q @ state
        part /= scores.sum(-1, keepdims=True) + q @ total + query.dtype.type(eps)
        output[..., start : start + chunk, :] = part
        state += k.swapaxes(-1, -2) @ v
        total += k.sum(-2)[..., None]
    return output


def linear_attention_gradients(grad_out, query, key, value, chunk=CHUNK, eps=1e-6):
    """The gradients of the same: chunks forward for what queries read, then backward for what keys are read by."""
    inputs = query, key
    slopes = [np.exp(np.minimum(x, 0)) for x in inputs]
    query, key = (elu_plus_1(x) for x in inputs)
    value = np.concatenate([value, np.ones_like(value[..., :1])], axis=-1)  # the normaliser is one more channel
    d_query, d_key, d_value = np.empty_like(query), np.empty_like(key), np.empty_like(value)
    grad = np.empty_like(value[..., : query.shape[-2], :])
    state = np.zeros((*key.shape[:-2], key.shape[-1], value.shape[-1]), query.dtype)
    visible = np.tri(chunk, dtype=query.dtype)
    starts = range(0, query.shape[-2], chunk)
    for start in starts:
        at = (..., slice(start, start + chunk), slice(None))
        q, k, v, g = query[at], key[at], value[at], grad_out[at]
        scores = q @ k.swapaxes(-1, -2)
        scores *= visible[: q.shape[-2], : q.shape[-2]]
        sums = scores @ v + q @ state
        below = sums[..., -1:] + query.dtype.type(eps)
        share = np.sum(g * sums[..., :-1], axis=-1, keepdims=True) / below
        grad[at] = np.concatenate([g, -share], axis=-1) / below
        d_scores = grad[at] @ v.swapaxes(-1, -2)
        d_scores *= visible[: q.shape[-2], : q.shape[-2]]
        d_query[at] = d_scores @ k + grad[at] @ state.swapaxes(-1, -2)
        state += k.swapaxes(-1, -2) @ v
    state[...] = 0
    for start in reversed(starts):
        at = (..., slice(start, start + chunk), slice(None))
        q, k, v, g = query[at], key[at], value[at], grad[at]
        scores, d_scores = (a @ b.swapaxes(-1, -2) * visible[: q.shape[-2], : q.shape[-2]] for a, b in ((q, k), (g, v)))
        d_value[at] = scores.swapaxes(-1, -2) @ g + k @ state
        d_key[at] = d_scores.swapaxes(-1, -2) @ q + v @ state.swapaxes(-1, -2)
        state += q.swapaxes(-1, -2) @ g
    d_query *= slopes[0]
    d_key *= slopes[1]
    return d_query, d_key, d_value[..., :-1]


def expected_linear_attention(query, key, value):
    """The same formula in float64."""
    return linear_attention(*(array.astype(np.float64) for array in (query, key, value)))


def gated_delta_rule(query, key, value, log_decay, beta):
    """Token by token, all heads at once."""
    state = np.zeros((*key.shape[:-2], key.shape[-1], value.shape[-1]), query.dtype)
    output = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    decay, scale = np.exp(log_decay)[..., None, None], query.dtype.type(query.shape[-1] ** -0.5)
    for t in range(query.shape[-2]):
        q, k, v = (array[..., t : t + 1, :] for array in (query, key, value))
        state *= decay[..., t, :, :]
        state += k.swapaxes(-1, -2) @ (beta[..., t, None, None] * (v - k @ state))
        output[..., t : t + 1, :] = q @ state
    output *= scale
    return output


def expected_gated_delta_rule(*arrays):
    """The same in float64."""
    return gated_delta_rule(*(array.astype(np.float64) for array in arrays))


def linear_step(query, key, value, state, decay):
    """One token; the state is updated in place."""
    state *= state.dtype.type(decay)
    state += key.swapaxes(-1, -2) * value
    return query @ state * query.dtype.type(query.shape[-1] ** -0.5)


def expected_additive_attention(*arrays, **projections):
    """The answer to check against: the same formula in float64."""
    projections = {name: array.astype(np.float64) for name, array in projections.items()}
    return additive_attention(*(array.astype(np.float64) for array in arrays), **projections)


def expected_attention(query, key, value, is_causal=False):
    """The answer to check against: the same formula in float64, one head at a time to bound the memory."""
    output = np.empty((*query.shape[:-1], value.shape[-1]))
    for head in np.ndindex(query.shape[:-2]):
        rows = (array[head].astype(np.float64) for array in (query, key, value))
        output[head] = dot_product_attention(*rows, is_causal)
    return output


def expected_multi_head_attention(*arrays, heads):
    """The same formula in float64."""
    return multi_head_attention(*(array.astype(np.float64) for array in arrays), heads)


def expected_multi_head_attention_step(*arrays, heads, grad_out):
    """The gradient of x, by the same formula in float64."""
    arrays = (array.astype(np.float64) for array in arrays)
    return multi_head_attention_step(*arrays, heads, grad_out.astype(np.float64))[0]


def neighborhood_attention(query, key, value, seen):
    """Gathers what each pixel sees, (heads, pixels, keys, channels), and multiplies. seen: (pixels, keys)."""
    scores = np.einsum("hpc,hpkc->hpk", query * query.dtype.type(query.shape[-1] ** -0.5), key[:, seen], optimize=True)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return (scores[:, :, None, :] @ value[:, seen])[:, :, 0]


def neighborhood_attention_vjp(grad_out, query, key, value, seen):
    """The gradients for query, key and value: gathers as above, and adds what each pixel gives to those it sees."""
    scale = query.dtype.type(query.shape[-1] ** -0.5)
    keys, values = key[:, seen], value[:, seen]
    weights = np.einsum("hpc,hpkc->hpk", query * scale, keys, optimize=True)
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    d_scores = np.einsum("hpc,hpkc->hpk", grad_out, values, optimize=True)
    d_scores = scale * weights * (d_scores - (weights * d_scores).sum(axis=-1, keepdims=True))
    d_key, d_value = np.zeros_like(key), np.zeros_like(value)
    for i in range(seen.shape[1]):  # pixels that see another by the same number may repeat it at the edges
        np.add.at(d_key, (slice(None), seen[:, i]), d_scores[..., i, None] * query)
        np.add.at(d_value, (slice(None), seen[:, i]), weights[..., i, None] * grad_out)
    return (d_scores[:, :, None, :] @ keys)[:, :, 0], d_key, d_value


def block_attention(query, key, value, pattern, block):
    """A row of blocks at a time, with the keys of its blocks alone."""
    out = np.empty_like(query)
    shape = (*key.shape[:-2], len(pattern), block, key.shape[-1])
    keys, values = key.reshape(shape), value.reshape(shape)
    for row, columns in enumerate(pattern):
        rows = slice(row * block, (row + 1) * block)
        seen = [x[..., columns, :, :].reshape(*x.shape[:-3], -1, x.shape[-1]) for x in (keys, values)]
        out[..., rows, :] = dot_product_attention(query[..., rows, :], *seen)
    return out


def expected_block_attention(query, key, value, pattern, block):
    """The same in float64."""
    return block_attention(*(x.astype(np.float64) for x in (query, key, value)), pattern, block)


def expected_neighborhood_attention(query, key, value, seen):
    """The same in float64."""
    return neighborhood_attention(*(x.astype(np.float64) for x in (query, key, value)), seen)


def expected_rotary(x):
    """The same formula in float64."""
    return apply_rotary(x.astype(np.float64), *rotary_tables(*x.shape[-2:], np.float64))


def expected_truncated_attention(query, key, value, left, right):
    """The same in a window: one row at a time, with only its window."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    output = np.empty((*query.shape[:-1], value.shape[-1]))
    for *head, row in np.ndindex(query.shape[:-1]):
        seen = (*head, slice(max(0, row - left), row + right + 1))
        scores = key[seen] @ query[(*head, row)] * query.shape[-1] ** -0.5
        output[(*head, row)] = _add_up(scores, value[seen])
    return output


def product(x, weight, bias, activation=None):
    y = x @ weight
    y += bias
    if activation is None:
        return y
    if activation == "silu":
        share = np.negative(y)
    else:  # the form with tanh, as NumPy has no erf
        share = y * y
        share *= -0.0713548162726
        share -= 1.5957691216057
        share *= y
    np.exp(share, out=share)
    share += 1
    y /= share
    return y


def layer_norm(x, weight, bias, eps=1e-5):
    y = x - x.mean(axis=-1, keepdims=True)
    y /= np.sqrt(np.einsum("...i,...i->...", y, y)[..., None] / y.dtype.type(y.shape[-1]) + y.dtype.type(eps))
    y *= weight
    y += bias
    return y


def rms_norm(x, weight, eps=1e-6):
    square = np.einsum("...i,...i->...", x, x)[..., None] / x.dtype.type(x.shape[-1])
    y = x / np.sqrt(square + x.dtype.type(eps))
    y *= weight
    return y
