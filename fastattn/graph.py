"""Attention along the edges of a graph. The docstring is the specification; fastattn.reference says it in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn import _graph
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
        stored twice is two edges, and no loops from a node to itself are added.
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
