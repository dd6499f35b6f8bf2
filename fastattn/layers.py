"""What stands between attention and attention in a model: matrix products with what follows them, and norms.

The docstrings are the specification; fastattn.reference is the same in NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn import _layers
from fastattn._checks import floating

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

_FLOAT64 = np.dtype(np.float64)


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

    Attributes
    ----------
    weight : ndarray, shape (d_in, d_out)
        A read-only copy, unpacked when asked for.
    bias : ndarray, shape (d_out,), or None
        Read-only.
    d_in, d_out : int
    dtype : numpy.dtype
        Of the weight.

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
    memory. A 16-bit weight stays 16 bits in memory and is widened as it is read; the sums are float32.

    The bits of a row of the result depend on the row and on whether there are more than 8 rows, not on the other rows,
    strides or threads. Its error is at most ``eps * (d_in / 8 + 8) * sum(abs(x_i * w_i))`` of the accumulation dtype,
    and one rounding if the result has 16 bits; no activation has a slope above 1.2.

    Objects can be shared by threads, copied and pickled.

    References
    ----------
    .. [1] D. Hendrycks, K. Gimpel, "Gaussian error linear units (GELUs)", 2016.
    .. [2] N. Shazeer, "GLU variants improve transformer", 2020: the gated unit of the example.

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
    """

    __slots__ = ("_bias", "_matrix", "_wide")

    def __init__(self, weight: ArrayLike, bias: ArrayLike | None = None) -> None:
        w = floating(weight, "weight")
        if w.ndim != 2:
            raise ValueError(f"weight has shape {w.shape}; it must be (d_in, d_out)")
        b = None
        if bias is not None:
            b = floating(bias, "bias")
            if b.shape != w.shape[1:]:
                raise ValueError(f"bias has shape {b.shape}; it must be {w.shape[1:]}, one for each column of weight")
            b = b.copy()
            b.flags.writeable = False
        self._bias: NDArray[Any] | None = b
        self._matrix = _layers.Matrix(w, b, w.dtype)
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
            float32, float64, float16 or bfloat16; integers and bools become float64. A 1-D x is one row.
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

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above; the message names it, and `out` is untouched.
        MemoryError
            If there is no memory for the result or the workspace.
        """
        a = floating(x, "x")
        matrix = self._matrix
        if a.ndim == 0 or a.shape[-1] != matrix.d_in:
            raise ValueError(
                f"x has shape {a.shape}; it must be (..., {matrix.d_in}): weight is ({matrix.d_in}, {matrix.d_out})"
            )
        result, stored = _layers.dense_dtypes(a, matrix.dtype)
        if stored != matrix.dtype:
            matrix = self._in_float64()
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
    def d_in(self) -> int:
        return self._matrix.d_in

    @property
    def d_out(self) -> int:
        return self._matrix.d_out

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._matrix.dtype

    def __reduce__(self) -> tuple[Callable[..., Linear], tuple[Any, ...]]:
        # Panels are as wide as the vectors of this CPU: a pickle may be read on another.
        return type(self), (self._matrix.unpacked(), self._bias)

    def __repr__(self) -> str:
        return f"Linear({self.d_in}, {self.d_out}, bias={self._bias is not None}, dtype={self.dtype})"


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
