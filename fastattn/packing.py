"""Batches of sequences with and without padding: packed one after the other on one axis, and back."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._call import starts
from fastattn._checks import as_array, empty, integer, integer_array

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def pack(x: ArrayLike, lengths: ArrayLike) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """
    The sequences of a padded batch, one after the other and without their padding.

    Parameters
    ----------
    x : array_like, shape (B, S, ...)
        B sequences of up to S tokens, of any dtype.
    lengths : array_like of int, shape (B,)
        How many tokens of each sequence count, 0 to S: the first ones.

    Returns
    -------
    packed : ndarray, shape (sum(lengths), ...)
        A copy, of x's dtype.
    cu_seqlens : ndarray of int64, shape (B + 1,)
        Where each sequence begins and ends in it, ``[0, n1, n1 + n2, ..., sum(lengths)]``, as `varlen_attention` and
        the call of a `MultiHeadAttention` take it.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.
    MemoryError
        If there is no memory for the result.

    See Also
    --------
    unpack : the way back.

    Examples
    --------
    Two sequences of 1 and 3 tokens; 9 is padding.

    >>> import fastattn
    >>> packed, cu_seqlens = fastattn.pack([[1, 9, 9], [2, 3, 4]], [1, 3])
    >>> packed
    array([1, 2, 3, 4])
    >>> cu_seqlens
    array([0, 1, 4])
    """
    a = as_array(x, "x", "pass its data, and lengths=")
    if a.ndim < 2:
        raise ValueError(f"x has shape {a.shape}; it must be (B, S, ...): sequences, tokens, and what each token has")
    sequences, most = a.shape[:2]
    allowed = f"{sequences} integers from 0 to {most}, one for each sequence of x"
    counts = integer_array(lengths, "lengths", allowed)
    if counts.shape != (sequences,):
        raise ValueError(f"lengths has shape {counts.shape}; it must be ({sequences},): {allowed}")
    wrong = np.flatnonzero((counts < 0) | (counts > most))
    if wrong.size:
        raise ValueError(f"lengths must be {allowed}; number {wrong[0]} is {counts[wrong[0]]}")
    cu_seqlens = np.zeros(sequences + 1, np.int64)
    np.cumsum(counts, out=cu_seqlens[1:])
    packed = empty((int(cu_seqlens[-1]), *a.shape[2:]), a.dtype, "the packed tokens")
    if sequences:
        np.concatenate([a[b, :n] for b, n in enumerate(counts.tolist())], out=packed)
    return packed, cu_seqlens


def unpack(packed: ArrayLike, cu_seqlens: ArrayLike, length: int | None = None) -> NDArray[Any]:
    """
    A padded batch of packed sequences; the padding is 0.

    Parameters
    ----------
    packed : array_like, shape (total, ...)
        The tokens of all sequences, one after the other, of any dtype.
    cu_seqlens : array_like of int, shape (B + 1,)
        ``[0, n1, n1 + n2, ..., total]``: where each sequence begins and ends.
    length : int, optional
        S, at least the length of the longest sequence, which is the default.

    Returns
    -------
    ndarray, shape (B, S, ...)
        A copy, of the same dtype.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.
    MemoryError
        If there is no memory for the result.

    See Also
    --------
    pack : the way there.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.unpack([1, 2, 3, 4], [0, 1, 4])
    array([[1, 0, 0],
           [2, 3, 4]])
    >>> fastattn.unpack([1, 2, 3, 4], [0, 1, 4], 4).shape
    (2, 4)
    """
    a = as_array(packed, "packed", "pass its data")
    if a.ndim < 1:
        raise ValueError("packed has no axes; it must be (total, ...): tokens, and what each token has")
    begins = starts(cu_seqlens, "cu_seqlens", len(a), "packed's first axis").tolist()
    longest = max((end - begin for begin, end in pairwise(begins)), default=0)
    allowed = f"an integer of at least {longest}, the length of the longest sequence"
    size = longest if length is None else integer(length, "length", allowed, longest)
    padded = empty((len(begins) - 1, size, *a.shape[1:]), a.dtype, "the padded batch", True)
    for b, (begin, end) in enumerate(pairwise(begins)):
        padded[b, : end - begin] = a[begin:end]
    return padded
