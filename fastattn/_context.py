"""The keys and values of a context that was projected once, for decoders that look at it at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ProjectedContext:
    """
    What `MultiHeadAttention.project_context` returns, and a call of the same layer takes as its `context`.

    Attributes
    ----------
    key : ndarray, shape (..., num_kv_heads, S, head_dim)
    value : ndarray, shape (..., num_kv_heads, S, value_dim)
        Read-only, in C order: what a query reads lies side by side.
    lengths : int, ndarray of int64, or None
        `context_lengths`, read-only; None if all S tokens count.
    dtype : numpy.dtype
        To which the context and the layer's weights promote; key and value are in its accumulation dtype, float64 for
        float64 and otherwise float32.
    nbytes : int
        Memory that key and value hold, in bytes.

    Notes
    -----
    It can be pickled and copied, and belongs to the copies of its layer too, which have the same weights.
    """

    def __init__(
        self,
        key: NDArray[Any],
        value: NDArray[Any],
        lengths: int | NDArray[np.int64] | None,
        dtype: np.dtype[Any],
        of: bytes,
    ) -> None:
        self._key, self._value, self._lengths, self._dtype, self._of = key, value, lengths, dtype, of
        self._lock()

    def _lock(self) -> None:
        for a in (self._key, self._value, self._lengths):
            if a is not None and not isinstance(a, int):
                a.flags.writeable = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock()

    def __repr__(self) -> str:
        lengths = "" if self._lengths is None else ", with lengths"
        return f"<ProjectedContext: key {self._key.shape}, value {self._value.shape}{lengths}, {self._dtype}>"

    @property
    def key(self) -> NDArray[Any]:
        """Of shape (..., num_kv_heads, S, head_dim)."""
        return self._key

    @property
    def value(self) -> NDArray[Any]:
        """Of shape (..., num_kv_heads, S, value_dim)."""
        return self._value

    @property
    def lengths(self) -> int | NDArray[np.int64] | None:
        """How many tokens count, as given; None: all."""
        return self._lengths

    @property
    def dtype(self) -> np.dtype[Any]:
        """To which the context and the layer's weights promote."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Memory that key and value hold, in bytes."""
        return self._key.nbytes + self._value.nbytes
