"""softmax, its relatives, and their gradients. The docstrings are the specification; fastattn.reference is the same in
NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn import _softmax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def softmax(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Softmax, ``exp(x) / sum(exp(x))`` along `axis`, without overflow.

    Parameters
    ----------
    x : array_like
        float32, float64, float16 or bfloat16; integers and bools become float64. Any strides.
    axis : int, tuple of int or None, default -1
        The axes of a row; None: all of them.
    mask : array_like of bool, optional
        Broadcasts to x's shape; **True means that the entry counts**. Hidden entries give 0, even if x is NaN or
        infinite there; so does a row in which nothing counts, or only -inf.
    out : ndarray, optional
        Receives the result; shape and dtype of the result. May be `x` itself, but must not overlap it otherwise.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    ndarray
        x's shape and dtype (float64 for integers and bools).

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; `out` is untouched then.

    See Also
    --------
    log_softmax, logsumexp, sparsemax, entmax15 : its relatives.
    softmax_vjp : its gradient.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> fastattn.softmax(np.array([0.0, 1.0, 1000.0]))
    array([0., 0., 1.])
    >>> fastattn.softmax(np.log([[1.0, 1.0, 2.0]]), mask=[True, True, False])
    array([[0.5, 0.5, 0. ]])
    """
    return _softmax.softmax(x, axis, mask, out, num_threads)


def softmax_vjp(
    grad_out: ArrayLike,
    output: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Gradient of `softmax`: ``output * (grad_out - sum(output * grad_out))`` along `axis`, from what it returned.

    Parameters
    ----------
    grad_out : array_like
        Gradient of a loss for the output; exactly its shape, any of the dtypes and strides of `softmax`.
    output : array_like
        What `softmax` returned.
    axis, mask, num_threads
        As for `softmax`. Entries of weight 0 do not count: a mask changes only what NaN in `output` hides.
    out : ndarray, optional
        Receives the gradient; of its shape, and of its dtype or the one it is computed in (float64 for float64, else
        float32). May be `grad_out` or `output` itself, but must not overlap an argument otherwise.

    Returns
    -------
    ndarray
        The gradient for x: shape and dtype of `output` (float64 for integers and bools).

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; `out` is untouched then.

    See Also
    --------
    log_softmax_vjp, logsumexp_vjp, sparsemax_vjp, entmax15_vjp

    Notes
    -----
    Where `output` is 0 (hidden, -inf, or too small for a number) the gradient is exactly 0, also if `grad_out` is NaN
    there; so it is in a row in which nothing counts. NaN in anything else makes its row NaN. In 16 bits sums are
    float32, and each gradient is rounded once.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> output = fastattn.softmax(np.array([0.0, 0.0, -np.inf]))
    >>> fastattn.softmax_vjp([4.0, 0.0, np.nan], output)
    array([ 1., -1.,  0.])
    """
    return _softmax.softmax_vjp(grad_out, output, axis, mask, out, num_threads)


def log_softmax(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Logarithm of the softmax, ``x - log(sum(exp(x)))`` along `axis`, without overflow or loss of small values.

    Parameters
    ----------
    x, axis, mask, out, num_threads
        As for `softmax`, except that hidden entries, and rows in which nothing counts, give -inf.

    Returns
    -------
    ndarray
        x's shape and dtype (float64 for integers and bools).

    Raises
    ------
    ValueError, TypeError
        If an argument is not as for `softmax`; `out` is untouched then.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> fastattn.log_softmax(np.array([0.0, -1000.0]))
    array([    0., -1000.])
    """
    return _softmax.log_softmax(x, axis, mask, out, num_threads)


def log_softmax_vjp(
    grad_out: ArrayLike,
    output: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Gradient of `log_softmax`: ``grad_out - exp(output) * sum(grad_out)`` along `axis`, from what it returned.

    Parameters
    ----------
    grad_out, output, axis, mask, out, num_threads
        As for `softmax_vjp`; `output` is what `log_softmax` returned. Entries of -inf do not count.

    Returns
    -------
    ndarray
        The gradient for x: shape and dtype of `output` (float64 for integers and bools). Exactly 0 where `output` is
        -inf, also if `grad_out` is NaN there.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as for `softmax_vjp`; `out` is untouched then.

    Examples
    --------
    The gradient of a cross entropy, of which class 2 is the right one:

    >>> import numpy as np
    >>> import fastattn
    >>> output = fastattn.log_softmax(np.zeros(4))
    >>> fastattn.log_softmax_vjp([0.0, 0.0, -1.0, 0.0], output)
    array([ 0.25,  0.25, -0.75,  0.25])
    """
    return _softmax.log_softmax_vjp(grad_out, output, axis, mask, out, num_threads)


def logsumexp(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    keepdims: bool = False,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | np.floating[Any]:
    """
    ``log(sum(exp(x)))`` along `axis`, natural logarithm, without overflow.

    Parameters
    ----------
    x, axis, mask, num_threads
        As for `softmax`. Hidden entries do not count.
    keepdims : bool, default False
        Whether to keep the axes of a row, with size 1.
    out : ndarray, optional
        Receives the result; shape and dtype of the result. Must not overlap `x`.

    Returns
    -------
    ndarray or scalar
        float64 for float64, integers and bools, else float32. -inf for a row in which nothing counts.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; `out` is untouched then.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> float(fastattn.logsumexp(np.array([1000.0, 1000.0])).round(6))
    1000.693147
    """
    return _softmax.logsumexp(x, axis, keepdims, mask, out, num_threads)


def logsumexp_vjp(
    grad_out: ArrayLike,
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    keepdims: bool = False,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Gradient of `logsumexp`: ``grad_out * softmax(x)`` along `axis`.

    Parameters
    ----------
    grad_out : array_like
        Gradient of a loss for what `logsumexp` returned; exactly its shape, any of the dtypes and strides of `softmax`.
    x, axis, keepdims, mask, num_threads
        As for `logsumexp`. Hidden entries and those of -inf do not count.
    out : ndarray, optional
        Receives the gradient; of its shape, and of its dtype or the one it is computed in (float64 for float64, else
        float32). Must not overlap an argument.

    Returns
    -------
    ndarray
        The gradient for x: its shape and dtype (float64 for integers and bools). Exactly 0 in what does not count, and
        in a row in which nothing counts, also if `grad_out` is NaN.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; `out` is untouched then.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> fastattn.logsumexp_vjp(2.0, np.array([1000.0, 1000.0, -np.inf]))
    array([1., 1., 0.])
    """
    return _softmax.logsumexp_vjp(grad_out, x, axis, keepdims, mask, out, num_threads)


def sparsemax(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    The point of the simplex nearest to `x`: ``max(x - t, 0)`` along `axis`, with the t for which that sums to 1.

    What lies 1 or more below the largest entry is exactly 0, and mostly much more is [1]_.

    Parameters
    ----------
    x, axis, mask, out, num_threads
        As for `softmax`.

    Returns
    -------
    ndarray
        x's shape and dtype (float64 for integers and bools). NaN or +inf that counts makes its row NaN.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as for `softmax`; `out` is untouched then.

    See Also
    --------
    entmax15, softmax

    Notes
    -----
    No row is sorted: t is found by Newton's method, in two or three passes.

    References
    ----------
    .. [1] A. Martins and R. Astudillo, "From softmax to sparsemax: a sparse model of attention and multi-label
           classification", 2016, equation 1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> fastattn.sparsemax(np.array([0.0, 0.5, 1.0]))
    array([0.  , 0.25, 0.75])
    """
    return _softmax.sparsemax(x, axis, mask, out, num_threads)


def sparsemax_vjp(
    grad_out: ArrayLike,
    output: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Gradient of `sparsemax`, from what it returned: `grad_out` minus its mean, over the entries that are not 0.

    Parameters
    ----------
    grad_out, output, axis, mask, out, num_threads
        As for `softmax_vjp`; `output` is what `sparsemax` returned.

    Returns
    -------
    ndarray
        The gradient for x: shape and dtype of `output` (float64 for integers and bools). Exactly 0 where `output` is 0,
        also if `grad_out` is NaN there [1]_.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as for `softmax_vjp`; `out` is untouched then.

    References
    ----------
    .. [1] A. Martins and R. Astudillo, "From softmax to sparsemax: a sparse model of attention and multi-label
           classification", 2016, section 2.5.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> output = fastattn.sparsemax(np.array([0.0, 0.5, 1.0]))
    >>> fastattn.sparsemax_vjp([5.0, 2.0, 4.0], output)
    array([ 0., -1.,  1.])
    """
    return _softmax.sparsemax_vjp(grad_out, output, axis, mask, out, num_threads)


def entmax15(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    1.5-entmax, half way from softmax to sparsemax: ``max(x / 2 - t, 0) ** 2`` along `axis`, of sum 1.

    What lies 2 or more below the largest entry is exactly 0 [1]_.

    Parameters
    ----------
    x, axis, mask, out, num_threads
        As for `softmax`.

    Returns
    -------
    ndarray
        x's shape and dtype (float64 for integers and bools). NaN or +inf that counts makes its row NaN.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as for `softmax`; `out` is untouched then.

    See Also
    --------
    sparsemax, softmax

    References
    ----------
    .. [1] B. Peters, V. Niculae and A. Martins, "Sparse sequence-to-sequence models", 2019, equation 8.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> fastattn.entmax15(np.array([0.0, 1.0, 2.0])).round(3)
    array([0.   , 0.169, 0.831])
    """
    return _softmax.entmax15(x, axis, mask, out, num_threads)


def entmax15_vjp(
    grad_out: ArrayLike,
    output: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Gradient of `entmax15`, from what it returned: ``s * (grad_out - sum(s * grad_out) / sum(s))``, s = sqrt(output).

    Parameters
    ----------
    grad_out, output, axis, mask, out, num_threads
        As for `softmax_vjp`; `output` is what `entmax15` returned.

    Returns
    -------
    ndarray
        The gradient for x: shape and dtype of `output` (float64 for integers and bools). Exactly 0 where `output` is 0,
        also if `grad_out` is NaN there [1]_.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as for `softmax_vjp`; `out` is untouched then.

    References
    ----------
    .. [1] B. Peters, V. Niculae and A. Martins, "Sparse sequence-to-sequence models", 2019, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> fastattn.entmax15_vjp([6.0, 0.0, 0.0], np.array([0.25, 0.25, 0.25]))
    array([ 2., -1., -1.])
    """
    return _softmax.entmax15_vjp(grad_out, output, axis, mask, out, num_threads)
