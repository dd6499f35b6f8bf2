"""ONNX's attention operators for the reference evaluator, which runs them in NumPy otherwise.

    from onnx.reference import ReferenceEvaluator
    from fastattn.integrations.onnx import operators

    outputs = ReferenceEvaluator(model, new_ops=operators).run(None, inputs)

`operators` are `Attention` (opsets 23 to 25), `LinearAttention` (27), `Softmax` and `LogSoftmax` (all opsets); every
other operator stays ONNX's. Shapes and dtypes of results are those of the operators; arithmetic is fastattn's: 16-bit
numbers are computed in float32 and rounded once, and what a query does not see, even NaN, never reaches its output.
An attribute that fastattn cannot follow is an error that names it.

Arrays are read where they lie, heads within the last axis too, and outputs are written where they belong. Copied are:
a cache that an operator appends to (`past_key`, `past_value`), as the operator says; arrays for
``softmax_precision=DOUBLE``. The output `qk_matmul_output` has the size of all scores; it is computed only where a
graph names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

try:
    from onnx import TensorProto
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError('fastattn.integrations.onnx needs ONNX: pip install "fastattn[onnx]"') from error

import fastattn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Array = NDArray[Any]


def _as_heads(x: Array, num_heads: int | None, name: str, attribute: str) -> Array:
    """A view (batch, heads, length, channels) of an array (batch, length, heads * channels)."""
    if num_heads is None or num_heads < 1 or x.shape[-1] % num_heads:
        raise ValueError(f"{attribute} is {num_heads}, but {name} has the shape {x.shape}: heads are in its last axis")
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


def _wide(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """The dtype in which fastattn computes."""
    return np.float64 if dtype == np.float64 else np.float32


class _Operator(OpRun):
    """An operator of ONNX's own domain."""

    op_domain = ""

    @property
    def _opset(self) -> int:
        return int(self.run_params["opsets"][self.domain])

    def _wants(self, output: int) -> bool:
        """Whether the graph has a name for it."""
        return len(self.output) > output and bool(self.output[output])

    def _refuse_others(self, attributes: Iterable[str]) -> None:
        """Attributes of opsets to come, unless they have their defaults."""
        written = {attribute.name for attribute in self.onnx_node.attribute}
        for name in attributes:
            if name in written:
                raise NotImplementedError(f"{self.op_type} has the attribute {name}, which fastattn does not know")

    def _check_and_fix_outputs(self, res: tuple[Any, ...]) -> tuple[Any, ...]:
        # An output without a name is None here. The evaluator stores it under "", as the value of every optional input
        # that a later node leaves out, and its own check takes arrays only.
        return res


class Attention(_Operator):
    """
    ONNX Attention, by `fastattn.dot_product_attention`.

    Inputs, outputs and attributes are the operator's: heads in an axis of their own or in the last one, grouped heads,
    an `attn_mask` of booleans or numbers, also one that is shorter than the keys, a cache inside the operator
    (`past_key`) or outside (`nonpad_kv_seqlen`), `is_causal`, windows, `softcap`, `scale`, and all four values of
    `qk_matmul_output_mode`. A query that sees no key gives zeros.

    Notes
    -----
    The softmax is in float32, or in float64 for float64; that is never coarser than what the operator says. So of
    `softmax_precision` FLOAT, DOUBLE (the whole call is in float64 then) and the inputs' own type are taken; to round
    the scores of wider inputs is refused.

    In mode 0 `qk_matmul_output` is the product before `softcap`, as the operator's text says; ONNX's own evaluator
    (1.23) gives the capped one there.
    """

    def _run(  # type: ignore[no-untyped-def]
        self,
        Q: Array,
        K: Array,
        V: Array,
        attn_mask: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        nonpad_kv_seqlen: Array | None = None,
        *,
        scale: float | None = None,
        is_causal: int = 0,
        q_num_heads: int | None = None,
        kv_num_heads: int | None = None,
        softmax_precision: int | None = None,
        softcap: float | None = None,
        qk_matmul_output_mode: int | None = None,
        left_window_size: int | None = None,
        right_window_size: int | None = None,
        **others,
    ) -> tuple[Array | None, ...]:
        self._refuse_others(others)
        if (past_key is None) != (past_value is None):
            raise ValueError("past_key and past_value must be given together")
        if past_key is not None and nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen is for a cache outside the operator: it cannot be with past_key")
        if not Q.ndim == K.ndim == V.ndim or Q.ndim not in (3, 4):
            raise ValueError(f"Q, K and V must have three axes, or four, not the shapes {Q.shape, K.shape, V.shape}")
        packed = Q.ndim == 3
        if packed:
            Q = _as_heads(Q, q_num_heads, "Q", "q_num_heads")
            K, V = (_as_heads(x, kv_num_heads, name, "kv_num_heads") for x, name in ((K, "K"), (V, "V")))
        elif self._opset >= 25:
            for name, given in (("q_num_heads", q_num_heads), ("kv_num_heads", kv_num_heads)):
                if given is not None:
                    raise ValueError(f"{name} is {given}, but only arrays of three axes have it")
        if past_key is not None and past_value is not None:
            K, V = np.concatenate([past_key, K], axis=2), np.concatenate([past_value, V], axis=2)

        rows, columns, width = Q.shape[2], K.shape[2], V.shape[3]
        offset: int | Array = 0
        if past_key is not None:
            offset = past_key.shape[2]
        rules: dict[str, Any] = {}
        seen = columns  # keys that the mask has a column for
        if attn_mask is not None:
            seen = min(columns, attn_mask.shape[-1])
            if attn_mask.dtype.kind in "iu":  # added like a float
                attn_mask = attn_mask.astype(_wide(Q.dtype))
            rules["mask" if attn_mask.dtype == bool else "bias"] = attn_mask
        if nonpad_kv_seqlen is not None:
            lengths = np.asarray(nonpad_kv_seqlen).reshape(-1, 1)
            offset = lengths - rows
            rules["key_lengths"] = np.minimum(lengths, seen) if seen < columns else lengths
        window = tuple(-1 if side is None else side for side in (left_window_size, right_window_size))
        for name, side in zip(("left_window_size", "right_window_size"), window, strict=True):
            if side < -1:
                raise ValueError(f"{name} must be -1 or more, not {side}")
        rules.update(is_causal=bool(is_causal), window_size=window, query_offset=offset)
        if softcap is not None and softcap > 0:
            rules["softcap"] = softcap
        mode = qk_matmul_output_mode or 0
        if mode not in (0, 1, 2, 3):
            raise ValueError(f"qk_matmul_output_mode must be 0, 1, 2 or 3, not {mode}")
        scores = self._wants(3)

        arrays = self._converted((Q, K[:, :, :seen], V[:, :, :seen]), softmax_precision)
        dtype = np.result_type(*arrays)
        shape = Q.shape[0], rows, Q.shape[1], width
        Y = np.empty(shape, dtype) if packed else np.empty((shape[0], shape[2], rows, width), dtype)
        weights = scores and mode == 3
        result = fastattn.dot_product_attention(
            *arrays,
            **rules,
            scale=scale,
            enable_gqa=True,
            return_weights=weights,
            out=Y.swapaxes(1, 2) if packed else Y,
        )
        Y = Y.reshape(*shape[:2], -1) if packed else Y
        qk = None
        if scores:
            qk = self._padded(result[1], columns, 0) if weights else self._scores(Q, K, scale, mode, rules)
            qk = qk.astype(Q.dtype, copy=False)
        return (
            Y.astype(Q.dtype, copy=False),
            K if self._wants(1) else None,
            V if self._wants(2) else None,
            qk,
        )[: len(self.output)]

    @staticmethod
    def _converted(arrays: tuple[Array, ...], softmax_precision: int | None) -> tuple[Array, ...]:
        """Q, K and V in the dtype whose softmax is at least as precise as is asked for."""
        if softmax_precision == TensorProto.DOUBLE:
            return tuple(x.astype(np.float64, copy=False) for x in arrays)
        own = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
        dtype = arrays[0].dtype
        allowed = {None, own.get(dtype.name), None if dtype == np.float64 else TensorProto.FLOAT}
        if softmax_precision not in allowed:
            names = {value: name for name, value in TensorProto.DataType.items()}
            asked = names.get(softmax_precision, softmax_precision)
            raise NotImplementedError(
                f"softmax_precision is {asked}: fastattn does not round the scores of {dtype} to it; "
                "without the attribute the softmax is at least as precise"
            )
        return arrays

    @staticmethod
    def _padded(x: Array, columns: int, fill: float) -> Array:
        """With columns for keys that a short mask hides."""
        missing = columns - x.shape[-1]
        return np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, missing)], constant_values=fill) if missing else x

    def _scores(self, Q: Array, K: Array, scale: float | None, mode: int, rules: dict[str, Any]) -> Array:
        """What the softmax of `rules` is given: the product (mode 0), capped (1), with hidden keys and bias (2)."""
        batch, heads, rows, channels = Q.shape
        columns = K.shape[2]
        dtype = _wide(np.result_type(Q, K))
        grouped = Q.reshape(batch, K.shape[1], -1, channels).astype(dtype, copy=False)
        scores = np.asarray(grouped @ K.swapaxes(2, 3).astype(dtype, copy=False)).reshape(batch, heads, rows, columns)
        scores *= dtype(1 / np.sqrt(channels) if scale is None else scale)
        if mode and "softcap" in rules:
            cap = dtype(rules["softcap"])
            scores = np.tanh(scores / cap) * cap
        if mode < 2:
            return scores
        if "bias" in rules:
            scores += self._padded(rules["bias"], columns, -np.inf).astype(dtype, copy=False)
        key = np.arange(columns)
        query = np.arange(rows)[:, None] + np.reshape(rules["query_offset"], (-1, 1, 1, 1))
        left, right = rules["window_size"]
        visible = np.ones((1, 1, 1, columns), dtype=bool)
        if rules["is_causal"]:
            visible = visible & (key <= query)
        if left >= 0:
            visible = visible & (key >= query - left)
        if right >= 0:
            visible = visible & (key <= query + right)
        if "key_lengths" in rules:
            visible = visible & (key < rules["key_lengths"][:, :, None, None])
        if "mask" in rules:
            visible = visible & self._padded(rules["mask"], columns, False)
        return np.where(visible, scores, dtype(-np.inf))


class LinearAttention(_Operator):
    """
    ONNX LinearAttention, by `fastattn.linear_attention`.

    Inputs, outputs and attributes are the operator's; `chunk_size`, a hint, changes nothing.
    """

    def _run(  # type: ignore[no-untyped-def]
        self,
        query: Array,
        key: Array,
        value: Array,
        past_state: Array | None = None,
        decay: Array | None = None,
        beta: Array | None = None,
        *,
        q_num_heads: int | None = None,
        kv_num_heads: int | None = None,
        scale: float | None = None,
        update_rule: str | None = None,
        chunk_size: int | None = None,
        **others,
    ) -> tuple[Array | None, ...]:
        self._refuse_others(others)
        rule = "gated_delta" if update_rule is None else update_rule
        if rule not in ("linear", "gated", "delta", "gated_delta"):
            raise ValueError(f"update_rule must be linear, gated, delta or gated_delta, not {rule}")
        for name, given, needed in (("decay", decay, "gated" in rule), ("beta", beta, "delta" in rule)):
            if (given is not None) != needed:
                raise ValueError(f"{name} must {'' if needed else 'not '}be given where update_rule is {rule}")
        for name, given in (("query", query), ("key", key), ("value", value), ("decay", decay), ("beta", beta)):
            if given is not None and given.ndim != 3:
                raise ValueError(f"{name} must have three axes, not the shape {given.shape}")
        rules: dict[str, Any] = {}
        if decay is not None:
            rules["log_decay"] = _as_heads(decay, kv_num_heads, "decay", "kv_num_heads")
        if beta is not None:
            rules["beta"] = beta.swapaxes(1, 2)
        dtype = np.result_type(query, key, value)
        if past_state is not None:
            rules["state"] = past_state.astype(_wide(dtype), copy=False)
        Q = _as_heads(query, q_num_heads, "query", "q_num_heads")
        K, V = (_as_heads(x, kv_num_heads, name, "kv_num_heads") for x, name in ((key, "key"), (value, "value")))
        out = np.empty((*query.shape[:2], Q.shape[1], V.shape[3]), dtype)
        _, state = fastattn.linear_attention(
            Q,
            K,
            V,
            **rules,
            feature_map=None,
            is_causal=True,
            scale=scale or None,
            enable_gqa=True,
            return_state=True,
            out=out.swapaxes(1, 2),
        )
        kept = query.dtype if past_state is None else past_state.dtype
        out = out.reshape(*query.shape[:2], -1).astype(query.dtype, copy=False)
        return (out, state.astype(kept, copy=False) if self._wants(1) else None)[: len(self.output)]


class Softmax(_Operator):
    """
    ONNX Softmax, by `fastattn.softmax`.

    Before opset 13 a row is all axes from `axis` on, which is 1 by default.
    """

    _function = staticmethod(fastattn.softmax)

    def _run(self, x: Array, *, axis: int | None = None) -> tuple[Array]:
        if self._opset >= 13:
            return (self._function(x, -1 if axis is None else axis),)
        given = [attribute.i for attribute in self.onnx_node.attribute if attribute.name == "axis"]
        first = given[0] if given else 1
        return (self._function(x, tuple(range(first % x.ndim if first < 0 else first, x.ndim))),)


class LogSoftmax(Softmax):
    """ONNX LogSoftmax, by `fastattn.log_softmax`; rows as in `Softmax`."""

    _function = staticmethod(fastattn.log_softmax)


operators: list[type[OpRun]] = [Attention, LinearAttention, Softmax, LogSoftmax]

__all__ = ["operators"]
