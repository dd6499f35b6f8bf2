"""Attention along the edges of a graph, and its gradients. The docstrings are the specification; fastattn.reference
says it in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn import _graph, _graph_gradients
from fastattn._rules import readable

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@readable
def graph_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    graph: Any,
    *,
    w_score: ArrayLike | None = None,
    negative_slope: float = 0.2,
    edge_bias: ArrayLike | None = None,
    edge_key: ArrayLike | None = None,
    edge_value: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Attention along the edges of a graph: node i sees the nodes that row i of a sparse matrix names, and no others.

    ::

        score of edge e = (i, j)    scale * query_i . (key_j + edge_key_e)                      TransformerConv
                                    scale * w_score . leaky_relu(query_i + key_j + edge_key_e)  GATv2, with `w_score`
        out_i                       sum over i's edges of softmax(score)_e * (value_j + edge_value_e)

    The edges of a row are walked once, for all heads; nothing with a number for each edge and channel is in memory, nor
    for each edge, unless weights are asked for.

    Parameters
    ----------
    query : array_like, shape (..., L, D)
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
        float32, float64, float16 or bfloat16 (sums in float32); integers and bools become float64. They promote
        together, and with `w_score`, `edge_key` and `edge_value`, as `numpy.result_type` says. Leading axes are batch
        axes and broadcast; heads are one of them. Arrays of nodes (N, H, D) are passed as ``x.swapaxes(0, 1)``: that is
        the fast layout, because all heads of a node lie together.
    graph : scipy.sparse CSR array or matrix of shape (L, S), or a pair (indptr, indices)
        Row i has the edges ``indptr[i]`` to ``indptr[i + 1]``, which lead to the nodes ``indices[e]``; int32 or int64.
        Which entries are stored counts (explicit zeros, too), not what they are: pass ``edge_bias=A.data`` to add them
        to the scores, ``edge_bias=numpy.log(A.data)`` to multiply weights by them. Indices need not be sorted, an entry
        stored twice is two edges, and no loops from a node to itself are added. Checked first and then read in place:
        no other thread may write to them meanwhile.
    w_score : array_like, shape (D,) or (..., D) over the batch axes, optional
        Weights of the hidden units in GATv2's score, (H, D) for one set a head. A list takes the dtype of the arrays.
        GAT is the same with one unit: ``query=(x @ a_target)[..., None]``, ``key=(x @ a_source)[..., None]``,
        ``w_score=[1.0]``.
    negative_slope : float, default 0.2
        Of the leaky ReLU in that score, ``max(x, 0) + negative_slope * min(x, 0)``.
    edge_bias : array_like of float, optional
        Broadcasts to (..., nnz), nnz the number of edges; added to the score. -inf hides an edge.
    edge_key : array_like, optional
        Broadcasts to (..., nnz, D); added to the key for this edge.
    edge_value : array_like, optional
        Broadcasts to (..., nnz, E); added to the value for this edge.
    scale : float, optional
        Default ``1 / sqrt(D)``, with `w_score` 1.
    softcap : float, optional
        Positive; scores become ``softcap * tanh(score / softcap)`` before the bias is added.
    return_weights : bool, default False
        Return the weights too, (..., nnz), in the order of ``indices``.
    return_lse : bool, default False
        Return the log-sum-exp of each row's scores too, (..., L), natural logarithm: with it `merge_attention` joins
        the outputs of parts of the edges.
    out : ndarray, optional
        Receives the output; shape and dtype of the output. Must not overlap any input.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    ndarray, shape (..., L, E), or a tuple (out[, weights][, lse])
        The output in the dtype that the arrays promote to; weights and log-sum-exp are float64 for float64, else
        float32. A row without edges, or of hidden ones, has output 0 and log-sum-exp -inf.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above (COO, CSC and dense matrices: call ``.tocsr()``), or an index leads out of `key`;
        `out` is untouched then.

    See Also
    --------
    graph_attention_vjp : its gradients.
    dot_product_attention : with ``mask=A.toarray()`` the same, in time and memory of L * S.

    References
    ----------
    Velickovic et al., "Graph attention networks", 2018, equations 1 to 4. Brody, Alon and Yahav, "How attentive are
    graph attention networks?", 2022, equation 7. Shi et al., "Masked label prediction", 2021, equations 3 and 4
    (TransformerConv).

    Examples
    --------
    Node 0 sees nodes 1 and 2, node 1 sees nothing, node 2 sees itself.

    >>> import numpy as np
    >>> import fastattn
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    >>> fastattn.graph_attention(x, x, x, ([0, 2, 2, 3], [1, 2, 2]))
    array([[0., 3.],
           [0., 0.],
           [0., 4.]])
    """
    return _graph.graph_attention(
        query,
        key,
        value,
        graph,
        w_score,
        negative_slope,
        edge_bias,
        edge_key,
        edge_value,
        scale,
        softcap,
        return_weights,
        return_lse,
        out,
        num_threads,
    )


@readable
def graph_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    graph: Any,
    *,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    w_score: ArrayLike | None = None,
    negative_slope: float = 0.2,
    edge_bias: ArrayLike | None = None,
    edge_key: ArrayLike | None = None,
    edge_value: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | tuple[NDArray[Any] | None, ...] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of a loss for the inputs of `graph_attention`, from its gradient for the output.

    ::

        score of edge e = (i, j)    s_e, of weight w_e in row i; its raw score, before the softcap, r_e
        term of the edge            t_e = grad_out_i . (value_j + edge_value_e)
        edge_bias                   d_s_e = w_e * (t_e - sum over i's edges of w * t + grad_lse_i)
        raw score                   d_r_e = d_s_e * (1 - tanh(r_e / softcap) ** 2)
        query                       sum over i's edges of d_r_e * scale * (key_j + edge_key_e)
        key                         sum over the edges that lead to j of d_r_e * scale * query_i
        value                       sum over the edges that lead to j of w_e * grad_out_i
        edge_key, edge_value        the summands of key and of value
        with `w_score`              x = query_i + key_j + edge_key_e and its leaky ReLU's slope, 1 or negative_slope:
                                    query, key, edge_key have d_r_e * scale * w_score * slope, and
                                    w_score the sum over all edges of d_r_e * scale * slope * x

    Two passes over the edges, one by rows and one by columns, for which the graph is transposed on the way. Two numbers
    are kept for each edge and head; one for each edge and channel only where that is what `wrt` asks for.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient for the output, of its shape; float32, float64, float16 or bfloat16, integers and bools become float64.
        ``numpy.broadcast_to(1.0, out.shape)`` is the gradient of a sum.
    query, key, value, graph, w_score, negative_slope, edge_bias, edge_key, edge_value, scale, softcap
        As in the call of `graph_attention`.
    wrt : tuple of str, or str, default ("query", "key", "value")
        Whose gradients to return; also "w_score", "edge_bias", "edge_key", "edge_value" if given. A single name: that
        array alone, not a tuple. Only what is named is computed.
    output, lse : array_like, optional
        What the forward call returned; both or neither. Accepted as in the other functions of this form, but nothing is
        gained by them: the weights of a row are made again while its terms are.
    grad_lse : array_like, shape (..., L), optional
        Gradient for the log-sum-exp, if the loss has used that too.
    out : ndarray, or tuple of ndarray or None, optional
        Receives the gradients, in the order of `wrt`: of the gradient's shape, and of its dtype or of that of the sums
        (float64 for float64, else float32). Must not overlap an input, nor each other.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`. It changes no bit, nor do strides.

    Returns
    -------
    tuple of ndarray, or one
        Each with the shape and dtype of its array; integers, and lists of numbers, have gradients of float64. What was
        broadcast has the sum over the axes along which it was. An edge whose score is -inf gives and gets exactly 0,
        and so does a row of such edges, whatever stands in `grad_out`.

    Raises
    ------
    ValueError, TypeError
        As in `graph_attention`; if `wrt` names what is not given or cannot be named, a gradient that comes in has not
        the shape of what it belongs to, or one of `output` and `lse` comes without the other. `out` is untouched then.

    See Also
    --------
    graph_attention : what it is the gradient of.

    References
    ----------
    As of `graph_attention`. Dao et al., "FlashAttention", 2022, appendix B.2, for the gradients of softmax without its
    matrix.

    Examples
    --------
    Node 0 sees nodes 1 and 2, whose values have equal weights in the sum of its output: scores do not matter then.

    >>> import numpy as np
    >>> import fastattn
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    >>> graph = [0, 2, 2, 3], [1, 2, 2]
    >>> ones = np.broadcast_to(1.0, (3, 2))
    >>> fastattn.graph_attention_vjp(ones, x, x, x, graph, wrt="value")
    array([[0. , 0. ],
           [0.5, 0.5],
           [1.5, 1.5]])
    """
    return _graph_gradients.graph_attention_vjp(
        grad_out,
        query,
        key,
        value,
        graph,
        wrt,
        w_score,
        negative_slope,
        edge_bias,
        edge_key,
        edge_value,
        scale,
        softcap,
        output,
        lse,
        grad_lse,
        out,
        num_threads,
    )
