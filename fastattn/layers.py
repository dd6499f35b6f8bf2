"""What stands between attention and attention in a model: matrix products with what follows them, and norms.

The docstrings are the specification; fastattn.reference is the same in NumPy.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn import _layers
from fastattn._checks import as_array, empty, floating, is_one_number, real, storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, DTypeLike, NDArray

_FLOAT64, _INT8 = np.dtype(np.float64), np.dtype(np.int8)
_BLOCK = 1 << 17  # numbers that are quantized at a time


class Linear:
    """
    A matrix that multiplies rows, packed once: ``activation(x @ weight + bias) * multiply + residual`` in one pass.

    Parameters
    ----------
    weight : array_like, shape (d_in, d_out)
        The matrix, on the right of x: float32, float64, float16 or bfloat16; integers and bools become float64. It is
        copied. PyTorch's ``nn.Linear`` stores its transpose: pass ``weight.T``.
    bias : array_like, shape (d_out,), optional
        Added to each row of the product. It does not change the dtype of the result.
    weight_scale : array_like, shape (d_out,), or float, optional
        Makes an int8 weight stand for ``weight * weight_scale``, a scale for each column or one for all; kept as
        float32. Without it, int8 numbers become float64, as all integers.
    dtype : dtype, optional
        In which the matrix is kept: float32, float64, float16, bfloat16 or int8. Default: that of `weight`. With int8,
        each column of a floating weight is divided by its scale, ``max(abs(column)) / 127``, and rounded to the nearest
        integer, half to even. Otherwise numbers are converted, as `numpy.ndarray.astype` does.

    Attributes
    ----------
    weight : ndarray, shape (d_in, d_out)
        A read-only copy, unpacked when asked for; int8 numbers without their scales.
    bias : ndarray, shape (d_out,), or None
        Read-only.
    weight_scale : ndarray of float32, shape (d_out,), or None
        Read-only. None unless `dtype` is int8.
    d_in, d_out : int
    dtype : numpy.dtype
        Of the matrix that is kept.
    nbytes : int
        Bytes that the object keeps, with the zeros that make columns whole panels.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.
    MemoryError
        If there is no memory for the packed matrix.

    See Also
    --------
    layer_norm, rms_norm : what precedes it in most models.
    MultiHeadAttention : attention between such products.

    Notes
    -----
    The matrix is stored as the kernels read it, in panels of some columns. A product of more than 8 rows (counted over
    all axes of x but the last) runs at the arithmetic limit, one of up to 8 reads the matrix once at the speed of
    memory. A weight of 16 or 8 bits stays so in memory and is widened as it is read; the sums are float32. From memory,
    few rows times an int8 weight take a quarter to a third of the time that they take with float32, many rows the same
    time.

    The bits of a row of the result depend on the row and on whether there are more than 8 rows, not on the other rows,
    strides or threads. Its error is at most ``eps * (d_in / 8 + 8) * sum(abs(x_i * w_i))`` of the accumulation dtype,
    and one rounding if the result has 16 bits; no activation has a slope above 1.2. This holds for an int8 weight too,
    with ``w = weight * weight_scale``: int8 numbers are exact in float32, and the scale multiplies each sum once. (So
    ``x @ weight`` without the scale has to be in the range of float32.) What `dtype` int8 rounds away is another thing:
    at most half a scale for each number, ``weight_scale / 2 * sum(abs(x_i))`` in a result.

    Objects can be shared by threads, copied and pickled.

    References
    ----------
    .. [1] D. Hendrycks, K. Gimpel, "Gaussian error linear units (GELUs)", 2016.
    .. [2] N. Shazeer, "GLU variants improve transformer", 2020: the gated unit of the example.
    .. [3] T. Dettmers, M. Lewis, Y. Belkada, L. Zettlemoyer, "LLM.int8(): 8-bit matrix multiplication for transformers
       at scale", 2022, section 2: int8 matrices with a scale for each column. (There x is rounded too; here it is not.)

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> linear = fastattn.Linear([[1.0, 0.0, 2.0], [0.0, 1.0, -2.0]], bias=[0.0, 0.0, 1.0])
    >>> linear([[3.0, 4.0], [1.0, 1.0]])
    array([[ 3.,  4., -1.],
           [ 1.,  1.,  1.]])
    >>> linear([3.0, 4.0], activation="relu", residual=np.ones(3))
    array([4., 5., 1.])

    The feed-forward part of a Llama:

    >>> rng = np.random.default_rng(0)
    >>> gate, up = (fastattn.Linear(rng.normal(size=(16, 32))) for _ in range(2))
    >>> down = fastattn.Linear(rng.normal(size=(32, 16)))
    >>> x = rng.normal(size=(5, 16))
    >>> y = down(gate(x, activation="silu", multiply=up(x)), residual=x)
    >>> y.shape
    (5, 16)

    A matrix of 8 bits, and one that somebody else has quantized:

    >>> small = fastattn.Linear(np.float32([[0.5, 2.0], [1.27, -25.4]]), dtype=np.int8)
    >>> small.weight
    array([[  50,   10],
           [ 127, -127]], dtype=int8)
    >>> small.weight_scale
    array([0.01, 0.2 ], dtype=float32)
    >>> given = fastattn.Linear(np.int8([[50, 10], [127, -127]]), weight_scale=[0.01, 0.2])
    >>> given(np.float32([1.0, 1.0]))
    array([  1.77, -23.4 ], dtype=float32)
    """

    __slots__ = ("_bias", "_matrix", "_scale", "_wide")

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        weight_scale: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        wanted = None if dtype is None else storage_dtype(dtype, ("int8",))
        w = as_array(weight, "weight")
        if w.ndim != 2:
            raise ValueError(f"weight has shape {w.shape}; it must be (d_in, d_out)")
        scale: NDArray[Any] | None = None
        if weight_scale is not None:
            scale, wanted = _scale_of(weight_scale, w, wanted), _INT8
        elif w.dtype == _INT8 == wanted:
            raise ValueError(
                "weight is int8 and weight_scale is not given: pass the number that each column is multiplied by, "
                "weight_scale=1 for the integers themselves"
            )
        else:
            w = floating(w, "weight")
            if wanted == _INT8:
                w, scale = _quantized(w)
        b = None
        if bias is not None:
            b = floating(bias, "bias")
            if b.shape != w.shape[1:]:
                raise ValueError(f"bias has shape {b.shape}; it must be {w.shape[1:]}, one for each column of weight")
            b = b.copy()
            b.flags.writeable = False
        self._bias: NDArray[Any] | None = b
        self._scale = scale
        self._matrix = _layers.Matrix(w, b, w.dtype if wanted is None else wanted, scale)
        self._wide: _layers.Matrix | None = None  # the same in float64, once an x asks for it

    def __call__(
        self,
        x: ArrayLike,
        *,
        activation: str | None = None,
        multiply: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """
        Multiply rows by the matrix.

        Parameters
        ----------
        x : array_like, shape (..., d_in)
            float32, float64, float16 or bfloat16; integers and bools become float64. A 1-D x is one row. With an int8
            weight, float32, float16 or bfloat16 alone.
        activation : {None, "relu", "gelu", "gelu_tanh", "silu"}, optional
            What is done to each number of ``x @ weight + bias``: nothing; ``max(x, 0)``; x times the normal
            distribution at x; the same with a tanh in place of its integral; ``x / (1 + exp(-x))``.
        multiply : array_like, shape (..., d_out), optional
            Multiplies the result of the activation. Of the result's shape: it does not broadcast. Any of the dtypes
            above; it does not change that of the result.
        residual : array_like, shape (..., d_out), optional
            Is added last; as `multiply`.
        out : ndarray, shape (..., d_out), optional
            Receives the result, of whose dtype it must be. May be `residual` or `multiply`; otherwise it must overlap
            no input.
        num_threads : int, optional
            Upper limit on threads. Default `get_num_threads`.

        Returns
        -------
        ndarray, shape (..., d_out)
            Of the dtype to which x and weight promote (`numpy.result_type`): float32 over a 16-bit weight is float32.
            With an int8 weight, of x's dtype.

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above; the message names it, and `out` is untouched.
        MemoryError
            If there is no memory for the result or the workspace.
        """
        matrix = self._matrix
        a = floating(x, "x") if self._scale is None else _of_few_bits(x)
        if a.ndim == 0 or a.shape[-1] != matrix.d_in:
            raise ValueError(
                f"x has shape {a.shape}; it must be (..., {matrix.d_in}): weight is ({matrix.d_in}, {matrix.d_out})"
            )
        if self._scale is None:
            result, stored = _layers.dense_dtypes(a, matrix.dtype)
            if stored != matrix.dtype:
                matrix = self._in_float64()
        else:
            result = a.dtype
        return _layers.dense(matrix, a, result, activation, multiply, residual, out, num_threads)

    def _in_float64(self) -> _layers.Matrix:
        if self._wide is None:
            self._wide = _layers.Matrix(self._matrix.unpacked(), self._bias, _FLOAT64)
        return self._wide

    @property
    def weight(self) -> NDArray[Any]:
        w = self._matrix.unpacked()
        w.flags.writeable = False
        return w

    @property
    def bias(self) -> NDArray[Any] | None:
        return self._bias

    @property
    def weight_scale(self) -> NDArray[Any] | None:
        return self._scale

    @property
    def d_in(self) -> int:
        return self._matrix.d_in

    @property
    def d_out(self) -> int:
        return self._matrix.d_out

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._matrix.dtype

    @property
    def nbytes(self) -> int:
        parts = (self._matrix, self._wide, self._bias, self._scale)
        return sum(part.nbytes for part in parts if part is not None)

    def __reduce__(self) -> tuple[Callable[..., Linear], tuple[Any, ...]]:
        # Panels are as wide as the vectors of this CPU: a pickle may be read on another.
        make = type(self) if self._scale is None else functools.partial(type(self), weight_scale=self._scale)
        return make, (self._matrix.unpacked(), self._bias)

    def __repr__(self) -> str:
        return f"Linear({self.d_in}, {self.d_out}, bias={self._bias is not None}, dtype={self.dtype})"


def _scale_of(scale: ArrayLike, w: NDArray[Any], wanted: np.dtype[Any] | None) -> NDArray[Any]:
    """The argument weight_scale, checked, as a float32 number for each column."""
    if w.dtype != _INT8:
        raise TypeError(
            f"weight_scale is for an int8 weight, and weight has dtype {w.dtype}: dtype=numpy.int8 makes int8 numbers "
            f"and their scales of a floating weight"
        )
    if wanted is not None and wanted != _INT8:
        raise ValueError(
            f"weight_scale is for a matrix that is kept as int8, not as {wanted}: pass weight * weight_scale for that"
        )
    d_out = w.shape[1]
    if is_one_number(scale):
        given = np.full(d_out, real(scale, "weight_scale", "a finite number, or one for each column"))
    else:
        given = floating(scale, "weight_scale")
    if given.shape != (d_out,):
        raise ValueError(
            f"weight_scale has shape {given.shape}; it must be ({d_out},), one for each column of weight, or a number"
        )
    with np.errstate(all="ignore"):
        kept = given.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(kept))
    if bad.size:
        raise ValueError(f"weight_scale must be finite in float32; weight_scale[{bad[0]}] is {given[bad[0]]}")
    kept.flags.writeable = False
    return kept


def _quantized(w: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A floating matrix as int8 numbers, and the float32 scale of each column."""
    d_in, d_out = w.shape
    step = max(1, _BLOCK // max(1, d_out))
    parts = [slice(begin, begin + step) for begin in range(0, d_in, step)]
    with np.errstate(all="ignore"):
        top = np.zeros(d_out)
        for part in parts:
            np.maximum(top, np.abs(w[part].astype(np.float64)).max(axis=0), out=top)
        # No smaller: below it float32 has fewer digits, and 127 scales might not reach the top.
        least = np.where(top > 0, np.finfo(np.float32).tiny, 0)
        scale = np.maximum(top / 127, least).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(scale))
        if bad.size:
            column = w[:, bad[0]].astype(np.float64)
            row = int(np.abs(column).argmax())  # of a NaN, if there is one
            raise ValueError(
                f"weight[{row}, {bad[0]}] is {column[row]}: with dtype int8 all numbers must be finite, and their "
                f"scales, a 127th of them, in the range of float32"
            )
        numbers = empty((d_in, d_out), _INT8, "the int8 matrix")
        divisor = np.where(scale > 0, scale.astype(np.float64), 1)
        for part in parts:
            numbers[part] = np.rint(w[part] / divisor)
    scale.flags.writeable = False
    return numbers, scale


def _of_few_bits(x: ArrayLike) -> NDArray[Any]:
    """The argument x of a product with an int8 matrix."""
    a = as_array(x, "x")
    if a.dtype == _FLOAT64 or a.dtype.kind in "biu":
        raise TypeError(
            f"x has dtype {a.dtype}: an int8 weight multiplies float32, float16 and bfloat16 (its sums are float32): "
            f"pass x.astype(numpy.float32)"
        )
    return floating(a, "x")


def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    return_sum: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> Any:
    """
    Layer norm over the last axis: ``(s - mean) / sqrt(variance + eps) * weight + bias`` with ``s = x + residual``.

    Parameters
    ----------
    x : array_like, shape (..., channels)
        float32, float64, float16 or bfloat16; integers and bools become float64. Any strides.
    weight, bias : array_like, shape (channels,), optional
        Multiply and are added last; default 1 and 0. They do not change the dtype.
    eps : float, default 1e-5
        Is added to the variance; at least 0. With 0, a row whose numbers are all equal gives 0 before the bias.
    residual : array_like, shape (..., channels), optional
        Is added to x first. Of x's shape: it does not broadcast, nor change the dtype.
    return_sum : bool, default False
        Whether to return ``x + residual`` too (without `residual`, a copy of x).
    out : ndarray, shape (..., channels), optional
        Receives the normalised rows; of x's dtype. May be `x` or `residual`, but overlap no input otherwise.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    out : ndarray, shape (..., channels)
        Of x's dtype (float64 for integers and bools).
    sum : ndarray, shape (..., channels)
        Only with `return_sum`, of the same dtype. What is normalised is not rounded to 16 bits first.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    See Also
    --------
    rms_norm : without the mean.

    Notes
    -----
    The variance is that of all channels (divided by their number), summed after the mean is subtracted: the error of a
    result is a few eps of ``max(abs(s)) / sigma``. The bits of a row do not depend on other rows, strides or threads.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer normalization", 2016, equation 4.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.layer_norm([1.0, 2.0, 3.0], eps=0).round(4)
    array([-1.2247,  0.    ,  1.2247])
    """
    return _layers.norm(True, x, weight, bias, eps, 0.0, residual, return_sum, out, num_threads)


def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: ArrayLike | None = None,
    return_sum: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> Any:
    """
    RMS norm over the last axis: ``s / sqrt(mean(s**2) + eps) * (weight + offset)`` with ``s = x + residual``.

    Parameters
    ----------
    x : array_like, shape (..., channels)
        float32, float64, float16 or bfloat16; integers and bools become float64. Any strides.
    weight : array_like, shape (channels,), optional
        Multiplies last; without it nothing does. It does not change the dtype.
    eps : float, default 1e-6
        Is added to the mean of squares; at least 0. With 0, a row of zeros gives 0.
    offset : float, default 0
        Is added to `weight`: 1 for Gemma, whose weights are stored less 1.
    residual : array_like, shape (..., channels), optional
        Is added to x first. Of x's shape: it does not broadcast, nor change the dtype.
    return_sum : bool, default False
        Whether to return ``x + residual`` too (without `residual`, a copy of x).
    out : ndarray, shape (..., channels), optional
        Receives the normalised rows; of x's dtype. May be `x` or `residual`, but overlap no input otherwise.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    out : ndarray, shape (..., channels)
        Of x's dtype (float64 for integers and bools).
    sum : ndarray, shape (..., channels)
        Only with `return_sum`, of the same dtype. What is normalised is not rounded to 16 bits first.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    See Also
    --------
    layer_norm : with the mean subtracted.

    Notes
    -----
    The bits of a row do not depend on other rows, strides or threads.

    References
    ----------
    .. [1] B. Zhang, R. Sennrich, "Root mean square layer normalization", 2019, equation 4.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.rms_norm([3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], eps=0)
    array([1.2, 1.6, 0. , 0. ])
    """
    return _layers.norm(False, x, weight, None, eps, offset, residual, return_sum, out, num_threads)
