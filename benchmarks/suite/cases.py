"""What is measured: shapes, dtypes and inputs, shared by asv and compare.py.

Only append: changing a case breaks the comparison with all older results.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

# Channels of the values of additive attention, and of its queries and keys before projection.
HEAD_DIM = 64


class Case:
    """Something to measure. Its name and label are made from its shape, its dtype and a few words.

    `fields` are the attributes that form the shape; `words` follow it in the name, `label_words` in the label. Names
    include float64, but not float32.
    """

    kind = ""
    fields = ()
    words = ()

    @property
    def shape(self):
        return tuple(getattr(self, field) for field in self.fields)

    @property
    def label_words(self):
        return *self.words, *self._dtype_word

    @property
    def _dtype_word(self):
        return () if self.dtype == "float32" else (self.dtype,)

    @property
    def name(self):
        return "-".join([self.kind, "x".join(map(str, self.shape)), *self.words, *self._dtype_word])

    @property
    def label(self):
        return " ".join([", ".join(map(str, self.shape)), *self.label_words])


@dataclass(frozen=True)
class Attention(Case):
    """Dot-product attention of (batch, heads, seqlen_q, head_dim) over (batch, heads, seqlen_k, head_dim)."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "float32"
    is_causal: bool = False
    kind = "attention"
    fields = ("batch", "heads", "seqlen_q", "seqlen_k", "head_dim")

    @property
    def words(self):
        return ("causal",) if self.is_causal else ()

    @property
    def label_words(self):
        return self.words

    @property
    def flops(self):
        """Operations of the two matrix products that affect the result: hidden scores do not count."""
        pairs = self.seqlen_q * self.seqlen_k
        if self.is_causal:
            if self.seqlen_q != self.seqlen_k:
                raise ValueError("causal cases are square: libraries align other shapes differently")
            pairs = self.seqlen_q * (self.seqlen_q + 1) // 2
        return 4 * self.batch * self.heads * pairs * self.head_dim

    def inputs(self):
        return _attention_inputs(self.shape, self.dtype)


@dataclass(frozen=True)
class AttentionBack(Case):
    """Dot-product attention there and back: the output, then the gradients for query, key and value.

    rule: 'causal', a window 'left x right', 'bias' (one a head and key, with its gradient) or 'grouped' (4 heads of
    queries share one of keys).
    """

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    rule: str = ""
    dtype: str = "float32"
    kind = "attentionback"
    fields = ("batch", "heads", "seqlen", "head_dim")

    @property
    def words(self):
        return (self.rule,) if self.rule else ()

    @property
    def window(self):
        """(left, right), or None."""
        sides = self.rule.split("x")
        return tuple(map(int, sides)) if len(sides) == 2 else None

    @property
    def rules(self):
        """Keywords of fastattn's function."""
        if self.rule == "causal":
            return {"is_causal": True}
        if self.rule == "bias":
            return {"bias": _bias_of_keys(self.heads, self.seqlen, self.dtype)}
        if self.rule == "grouped":
            return {"enable_gqa": True}
        return {"window_size": self.window} if self.window else {}

    @property
    def flops(self):
        """Operations of the five matrix products of the way back that affect the result."""
        pairs = self.seqlen**2
        if self.rule == "causal" or self.window:
            sides = (min(side, self.seqlen - 1) for side in self.window or (self.seqlen, 0))
            pairs = self.seqlen + sum(side * self.seqlen - side * (side + 1) // 2 for side in sides)
        return 10 * self.batch * self.heads * pairs * self.head_dim

    def inputs(self):
        query, key, value = _attention_inputs(
            (self.batch, self.heads, self.seqlen, self.seqlen, self.head_dim), self.dtype
        )
        return (query, key[:, ::4], value[:, ::4]) if self.rule == "grouped" else (query, key, value)

    def grad_out(self):
        return _output_gradient((*self.shape[:3], self.head_dim), self.dtype)

    def visible(self):
        """(L, S), or True."""
        if self.rule == "causal":
            return np.tri(self.seqlen, dtype=bool)
        if not self.window:
            return True
        left, right = self.window
        return np.tri(self.seqlen, k=right, dtype=bool) & ~np.tri(self.seqlen, k=-left - 1, dtype=bool)


@dataclass(frozen=True)
class Softmax(Case):
    """Softmax over an axis."""

    sizes: tuple
    dtype: str = "float32"
    axis: int = -1
    kind = "softmax"

    @property
    def shape(self):
        return self.sizes

    @property
    def words(self):
        return (f"axis{self.axis}",) if self.axis != -1 else ()

    @property
    def label_words(self):
        return (f"along axis {self.axis}",) if self.axis != -1 else ()

    @property
    def nbytes(self):
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def inputs(self):
        return (_normal(self.shape, self.dtype),)


@dataclass(frozen=True)
class SoftmaxBack(Softmax):
    """The gradient of softmax over an axis, from a gradient and what softmax returned."""

    kind = "softmaxback"

    @property
    def nbytes(self):
        """As a copy has it, which counts a number that is read and written once: here two are read for one written."""
        return super().nbytes * 3 // 2

    def inputs(self):
        return _gradient_and_weights(self.shape, self.dtype, self.axis)


@dataclass(frozen=True)
class Sparse(Softmax):
    """sparsemax or entmax15 over an axis, of normal numbers of size 2, as logits are."""

    function: str = "sparsemax"
    kind = "sparse"

    @property
    def words(self):
        return (self.function, *super().words)

    @property
    def label_words(self):
        return (self.function, *super().label_words)

    def inputs(self):
        return (_normal(self.shape, self.dtype) * np.dtype(self.dtype).type(2),)


@dataclass(frozen=True)
class Additive(Case):
    """Additive attention of queries and keys with `hidden` channels, or with HEAD_DIM, projected to `hidden`."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    hidden: int
    dtype: str = "float32"
    is_projected: bool = False
    kind = "additive"
    fields = ("batch", "heads", "seqlen_q", "seqlen_k", "hidden")

    @property
    def words(self):
        return ("projected",) if self.is_projected else ()

    @property
    def label_words(self):
        return *(f"{word} from {HEAD_DIM}" for word in self.words), *self._dtype_word

    @property
    def triples(self):
        """Triples of a query, a key and a channel: each costs a tanh."""
        return math.prod(self.shape)

    def inputs(self):
        """query, key, value, w_score"""
        return _additive_inputs(self.shape, self.dtype, self.is_projected)[:4]

    def projections(self):
        """w_query and w_key, if there are any."""
        weights = _additive_inputs(self.shape, self.dtype, self.is_projected)[4:]
        return dict(zip(("w_query", "w_key"), weights, strict=True)) if weights else {}


@dataclass(frozen=True)
class AdditiveBack(Additive):
    """The same there and back: the output, then gradients for query, key, value and w_score from one for the output."""

    kind = "additiveback"

    def grad_out(self):
        return _output_gradient((*self.shape[:3], HEAD_DIM), self.dtype)


@dataclass(frozen=True)
class Bilinear(Case):
    """Bilinear attention: each head's queries and keys, of head_dim channels, are multiplied by a square matrix."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "float32"
    kind = "bilinear"
    fields = ("batch", "heads", "seqlen_q", "seqlen_k", "head_dim")

    def inputs(self):
        """query, key, value, w_query, w_key"""
        return *_attention_inputs(self.shape, self.dtype), *_square_matrices(self.head_dim, self.dtype)


@dataclass(frozen=True)
class Truncated(Case):
    """Dot-product attention of (batch, heads, seqlen, head_dim) in a window: `left` keys before and `right` after."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    left: int
    right: int
    dtype: str = "float32"
    kind = "truncated"
    fields = ("batch", "heads", "seqlen", "head_dim")

    @property
    def words(self):
        return ("x".join(map(str, self.window)),)

    @property
    def label_words(self):
        return str(self.window), *self._dtype_word

    @property
    def window(self):
        return self.left, self.right

    @property
    def rows(self):
        return self.batch * self.heads * self.seqlen

    @property
    def flops(self):
        """Operations of the two matrix products, for pairs of a query and a visible key."""
        sides = (min(side, self.seqlen - 1) for side in self.window)
        pairs = self.seqlen + sum(side * self.seqlen - side * (side + 1) // 2 for side in sides)
        return 4 * self.batch * self.heads * pairs * self.head_dim

    @property
    def nbytes(self):
        """Bytes of each of query, key, value and result."""
        return self.rows * self.head_dim * np.dtype(self.dtype).itemsize

    def inputs(self):
        return _attention_inputs((self.batch, self.heads, self.seqlen, self.seqlen, self.head_dim), self.dtype)


@dataclass(frozen=True)
class Decode(Case):
    """A few queries over a cache: (batch, heads, seqlen_q, head_dim), (batch, kv_heads, seqlen_k, head_dim)."""

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "float32"
    kind = "decode"
    fields = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim")

    @property
    def is_grouped(self):
        return self.heads != self.kv_heads

    @property
    def nbytes(self):
        """Bytes of key and value, which must be read once."""
        return 2 * self.batch * self.kv_heads * self.seqlen_k * self.head_dim * np.dtype(self.dtype).itemsize

    @property
    def as_rows(self):
        """The same as ordinary attention: the queries that share a key head are rows of one head."""
        rows = self.heads // self.kv_heads * self.seqlen_q
        return Attention(self.batch, self.kv_heads, rows, self.seqlen_k, self.head_dim, self.dtype)

    def inputs(self):
        query, key, value = self.as_rows.inputs()
        return query.reshape(self.batch, self.heads, self.seqlen_q, self.head_dim), key, value


@dataclass(frozen=True)
class Stored(Decode):
    """Keys and values of fewer bits: float16 and bfloat16 under a query of the same, int8 under float32."""

    storage: str = "float16"
    is_causal = False
    kind = "stored"

    @property
    def words(self):
        return (self.storage,)

    @property
    def is_decode(self):
        """Whether reading keys and values is the limit, and not the arithmetic."""
        return self.seqlen_q == 1

    @property
    def nbytes(self):
        """Bytes of key and value without scales."""
        return super().nbytes * np.dtype(_number_type(self.storage)).itemsize // 4

    @property
    def flops(self):
        return self.as_rows.flops

    def plain(self):
        """Query, key and value in float32."""
        return super().inputs()

    def inputs(self):
        """Query, key and value as they are stored; with int8 also their scales, one for each token and head."""
        query, key, value = self.plain()
        if self.storage != "int8":
            return tuple(x.astype(_number_type(self.storage)) for x in (query, key, value))
        scales = [np.abs(x).max(-1, keepdims=True) / np.float32(127) for x in (key, value)]
        return query, *(np.rint(x / s).astype(np.int8) for x, s in zip((key, value), scales, strict=True)), *scales

    def read_back(self):
        """The numbers that these stand for."""
        query, key, value, *scales = self.inputs()
        if scales:
            key, value = key * scales[0], value * scales[1]
        return query, key, value


def _number_type(name):
    if name == "bfloat16":
        import ml_dtypes  # NumPy itself has none

        return ml_dtypes.bfloat16
    return name


@dataclass(frozen=True)
class MultiHead(Case):
    """Self-attention of (batch, seqlen, d_model): matrix products before and after it, with biases."""

    batch: int
    seqlen: int
    d_model: int
    heads: int
    dtype: str = "float32"
    kind = "multihead"
    fields = ("batch", "seqlen", "d_model", "heads")

    @property
    def flops(self):
        """Operations of the four matrix products with weights, and of the two of the attention."""
        return self.batch * self.seqlen * self.d_model * (8 * self.d_model + 4 * self.seqlen)

    def inputs(self):
        """x, w_query, w_key, w_value, w_out"""
        return _multihead_inputs(self.batch, self.seqlen, self.d_model, self.dtype)[:5]

    def biases(self):
        """b_query, b_key, b_value and b_out"""
        biases = _multihead_inputs(self.batch, self.seqlen, self.d_model, self.dtype)[5:]
        return dict(zip(("b_query", "b_key", "b_value", "b_out"), biases, strict=True))

    def packed(self):
        """w_qkv and b_qkv, for queries, keys and values in one product, w_out and b_out."""
        _, *weights, w_out = self.inputs()
        *biases, b_out = self.biases().values()
        return np.concatenate(weights, axis=1), np.concatenate(biases), w_out, b_out


@dataclass(frozen=True)
class MultiHeadStep(MultiHead):
    """The same and its way back: the gradients of x, weights and biases."""

    kind = "multiheadstep"

    @property
    def flops(self):
        """Each product with weights has two on the way back, the two of attention have five."""
        return self.batch * self.seqlen * self.d_model * (24 * self.d_model + 14 * self.seqlen)

    def grad_out(self):
        return _normal((self.batch, self.seqlen, self.d_model), self.dtype)


@dataclass(frozen=True)
class CachedStep(Case):
    """One token through a layer over a cache that holds seqlen_k others, with rotary encoding."""

    seqlen_k: int
    d_model: int
    heads: int
    dtype: str = "float32"
    kind = "cachedstep"
    fields = ("seqlen_k", "d_model", "heads")

    def inputs(self):
        """The token, those before it, and four matrices."""
        tokens = _normal((1, self.seqlen_k + 1, self.d_model), self.dtype)
        return tokens[:, -1:], tokens[:, :-1], *_normal((4, self.d_model, self.d_model), self.dtype) / self.d_model**0.5


@dataclass(frozen=True)
class AdditiveStep(Case):
    """One query over keys that are projected from d_key channels to hidden ones, and are the values."""

    seqlen_k: int
    d_key: int
    hidden: int
    dtype: str = "float32"
    kind = "additivestep"
    fields = ("seqlen_k", "d_key", "hidden")

    def inputs(self):
        """Query, keys, w_score, and the matrix of the keys."""
        keys = _normal((self.seqlen_k, self.d_key), self.dtype)
        w_key = _normal((self.d_key, self.hidden), self.dtype) / self.d_key**0.5
        return _normal((1, self.hidden), self.dtype), keys, _normal(self.hidden, self.dtype), w_key


@dataclass(frozen=True)
class Rotary(Case):
    """Rotary encoding of (batch, heads, seqlen, head_dim), channel i paired with i + head_dim / 2."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str = "float32"
    kind = "rotary"
    fields = ("batch", "heads", "seqlen", "head_dim")

    @property
    def nbytes(self):
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def inputs(self):
        return (_normal(self.shape, self.dtype),)


@dataclass(frozen=True)
class Product(Case):
    """Rows of d_in channels times (d_in, d_out), a bias and what follows."""

    rows: int
    d_in: int
    d_out: int
    activation: str | None = None
    dtype: str = "float32"
    kind = "product"
    fields = ("rows", "d_in", "d_out")

    @property
    def words(self):
        return () if self.activation is None else (self.activation,)

    def inputs(self):
        weight = _normal((self.d_in, self.d_out), self.dtype) / np.dtype(self.dtype).type(math.sqrt(self.d_in))
        return _normal((self.rows, self.d_in), self.dtype), weight, _normal((self.d_out,), self.dtype)


@dataclass(frozen=True)
class Norm(Case):
    """Layer norm or RMS norm of rows."""

    rows: int
    channels: int
    function: str = "layer_norm"
    dtype: str = "float32"
    kind = "norm"
    fields = ("rows", "channels")

    @property
    def words(self):
        return (self.function,)

    def inputs(self):
        weights = (_normal((self.channels,), self.dtype), _normal((self.channels,), self.dtype))
        return _normal((self.rows, self.channels), self.dtype), *weights[: 2 if self.function == "layer_norm" else 1]


@dataclass(frozen=True)
class Blocks(Attention):
    """BigBird's pattern in blocks of 64: three neighbours, the first and the last block, three random ones a row."""

    block: int = 64
    kind = "blocks"

    def pattern(self):
        """(blocks of queries, blocks of keys)"""
        return _big_bird(self.seqlen_q // self.block)

    @property
    def flops(self):
        return super().flops * self.pattern().mean()


@functools.cache
def _big_bird(count):
    generator = np.random.default_rng(7)
    row, column = np.arange(count)[:, None], np.arange(count)
    pattern = (abs(row - column) <= 1) | (row % (count - 1) == 0) | (column % (count - 1) == 0)
    for blocks in pattern:
        blocks[generator.choice(count, 3, replace=False)] = True
    return pattern


@dataclass(frozen=True)
class Neighborhood(Case):
    """Attention of pixels to the `kernel` pixels around them along each axis of `space`, clamped at the edges."""

    heads: int
    space: tuple
    kernel: int
    head_dim: int
    dtype: str = "float32"
    kind = "neighborhood"

    @property
    def shape(self):
        return self.heads, *self.space, self.head_dim

    @property
    def words(self):
        return (f"k{self.kernel}",)

    @property
    def kernel_size(self):
        return (self.kernel,) * len(self.space)

    @property
    def flops(self):
        """Operations of the two products on pairs of a pixel and one that it sees."""
        return 4 * self.heads * math.prod(self.space) * self.kernel ** len(self.space) * self.head_dim

    def inputs(self):
        return _pixels(self.shape, self.dtype)

    def in_a_row(self):
        """The same arrays with pixels as tokens: (1, heads, pixels, head_dim)."""
        return tuple(x.reshape(1, self.heads, -1, self.head_dim) for x in self.inputs())

    def first_seen(self):
        """For each axis of space, where the kernel of each pixel begins."""
        return [np.clip(np.arange(n) - self.kernel // 2, 0, n - self.kernel) for n in self.space]

    def seen(self):
        """(pixels, keys): the numbers of the pixels that each sees, in a row."""
        pixels, numbers = np.indices(self.space).reshape(len(self.space), -1), 0
        for axis, (n, first) in enumerate(zip(self.space, self.first_seen(), strict=True)):
            along = first[pixels[axis]][:, None] + np.arange(self.kernel)
            shape = [len(pixels[axis]), *(1,) * len(self.space)]
            shape[axis + 1] = self.kernel
            numbers = numbers * n + along.reshape(shape)
        return numbers.reshape(len(pixels[0]), -1)


@dataclass(frozen=True)
class MiniLM(Case):
    """Real sentences through the encoder of examples/minilm.py: the first `batch` of encoder.py, padded to `seqlen`."""

    batch: int
    seqlen: int
    dtype = "float32"
    kind = "minilm"
    fields = ("batch", "seqlen")


@dataclass(frozen=True)
class Linear(Case):
    """Causal linear attention of (batch, heads, seqlen, head_dim): elu + 1, normalised, or by the gated delta rule."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    rule: str = "linear"
    dtype: str = "float32"
    kind = "linear"
    fields = ("batch", "heads", "seqlen", "head_dim")

    @property
    def words(self):
        return (self.rule.replace(" ", "-"),) if self.is_delta else ()

    @property
    def label_words(self):
        return (self.rule,)

    @property
    def is_delta(self):
        return self.rule == "gated delta"

    @property
    def flops(self):
        """Each number of the state is updated and read once a token; the delta rule reads it twice."""
        return (6 if self.is_delta else 4) * math.prod(self.shape) * self.head_dim

    def inputs(self):
        """query, key, value"""
        return _linear_inputs(self.shape, self.dtype, self.is_delta)[:3]

    def gates(self):
        """log_decay (..., S) and beta (..., S), if there are any."""
        return _linear_inputs(self.shape, self.dtype, self.is_delta)[3:]


@dataclass(frozen=True)
class LinearStep(Case):
    """One token of linear attention with a decay, on a state (batch, heads, head_dim, head_dim) updated in place."""

    batch: int
    heads: int
    head_dim: int
    dtype: str = "float32"
    kind = "linearstep"
    fields = ("batch", "heads", "head_dim")
    decay = 0.9

    @property
    def nbytes(self):
        """Of the state, which must be read and written once."""
        return math.prod(self.shape) * self.head_dim * np.dtype(self.dtype).itemsize

    def inputs(self):
        """query, key, value, state: the last to be copied by who changes it"""
        shape = self.batch, self.heads, 1, self.head_dim
        state = _normal((self.batch, self.heads, self.head_dim, self.head_dim), self.dtype)
        return *_linear_inputs(shape, self.dtype, False)[:3], state


@dataclass(frozen=True)
class Graph(Case):
    """Attention along the edges of a graph of a known shape; dot products, or GAT's scores, which are a number a node.

    Nodes lie in memory as (nodes, heads, channels).
    """

    graph: str  # of GRAPHS
    nodes: int
    edges: int  # at most: a mesh has those that its degree allows
    heads: int
    channels: int
    score: str = "dot"
    dtype: str = "float32"
    kind = "graph"
    fields = ("nodes", "edges", "heads", "channels")

    @property
    def name(self):
        return "-".join([self.kind, self.graph, self.score, *self._dtype_word])

    @property
    def label_words(self):
        return self.graph, self.score, *self._dtype_word

    @property
    def structure(self):
        """indptr and indices."""
        return GRAPHS[self.graph](self.nodes, self.edges)

    def inputs(self):
        """query, key and value, (heads, nodes, channels): views of memory where the heads of a node lie together."""
        width = 1 if self.score == "gat" else self.channels
        arrays = _node_inputs(self.nodes, self.heads, width, self.channels, self.dtype)
        return tuple(array.swapaxes(0, 1) for array in arrays)

    def rows(self):
        """The row of each edge."""
        indptr = self.structure[0]
        return np.repeat(np.arange(self.nodes), np.diff(indptr))

    def w_score(self):
        """What turns dot products into GAT's score, if anything."""
        return np.ones(1, self.dtype) if self.score == "gat" else None

    @property
    def nbytes(self):
        """Of the rows of keys and values that the edges name."""
        row = sum(array.shape[-1] for array in self.inputs()[1:]) * self.heads
        return len(self.structure[1]) * row * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class GraphBack(Graph):
    """The same there and back: the output, then gradients for query, key and value from one for the output."""

    kind = "graphback"

    def grad_out(self):
        return _node_gradient(self.nodes, self.heads, self.channels, self.dtype).swapaxes(0, 1)


@functools.cache
def power_law_graph(nodes, edges):
    """Few nodes have many edges, as in a citation graph: the share of the node of rank r falls as (r + 10)^-0.7. Their
    other ends are anywhere."""
    generator = np.random.default_rng(7)
    shares = (np.arange(nodes) + 10.0) ** -0.7
    rows = generator.choice(nodes, edges, p=shares / shares.sum())
    counts = np.bincount(generator.permutation(nodes)[rows], minlength=nodes)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return indptr, generator.integers(0, nodes, edges, dtype=np.int32)


@functools.cache
def mesh_graph(nodes, edges):
    """A sheet in rows of 200 nodes: each has its nearest neighbours, and all as many."""
    width, degree = 200, edges // nodes
    steps = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4)), axis=-1).reshape(-1, 2)
    steps = steps[np.argsort((steps**2).sum(-1), kind="stable")][1 : degree + 1]
    places = np.stack(np.divmod(np.arange(nodes), width), axis=-1)
    others = np.clip(places[:, None] + steps, 0, [nodes // width - 1, width - 1])
    indices = np.sort(others[..., 0] * width + others[..., 1], axis=1).astype(np.int32)
    return np.arange(nodes + 1, dtype=np.int32) * degree, indices.reshape(-1)


@functools.cache
def even_graph(nodes, edges):
    """Every node has as many edges, which lead anywhere."""
    indices = np.random.default_rng(7).integers(0, nodes, edges, dtype=np.int32)
    return np.arange(nodes + 1, dtype=np.int32) * (edges // nodes), indices


GRAPHS = {"arxiv": power_law_graph, "mesh": mesh_graph, "wide": even_graph, "cora": power_law_graph}


# Made once per case and read by every library, so that no benchmark times the random numbers. Few are kept: the largest
# is 134 MB.
@functools.lru_cache(maxsize=2)
def _attention_inputs(shape, dtype):
    batch, heads, seqlen_q, seqlen_k, head_dim = shape
    generator = np.random.default_rng(7)
    shapes = ((batch, heads, rows, head_dim) for rows in (seqlen_q, seqlen_k, seqlen_k))
    return tuple(generator.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes)


@functools.lru_cache(maxsize=2)
def _additive_inputs(shape, dtype, is_projected):
    batch, heads, seqlen_q, seqlen_k, hidden = shape
    generator = np.random.default_rng(7)
    width = HEAD_DIM if is_projected else hidden

    def normal(*shape, size=1.0):
        return (np.float32(size) * generator.standard_normal(shape, dtype=np.float32)).astype(dtype)

    query, key = (normal(batch, heads, rows, width) for rows in (seqlen_q, seqlen_k))
    value = normal(batch, heads, seqlen_k, HEAD_DIM)
    w_score = normal(hidden, size=hidden**-0.5)
    matrices = [normal(HEAD_DIM, hidden, size=HEAD_DIM**-0.5) for _ in range(2)] if is_projected else []
    return query, key, value, w_score, *matrices


@functools.lru_cache(maxsize=2)
def _bias_of_keys(heads, seqlen, dtype):
    return np.random.default_rng(9).standard_normal((heads, 1, seqlen), dtype=np.float32).astype(dtype)


@functools.lru_cache(maxsize=2)
def _output_gradient(shape, dtype):
    return np.random.default_rng(8).standard_normal(shape, dtype=np.float32).astype(dtype)


@functools.lru_cache(maxsize=2)
def _node_inputs(nodes, heads, width, channels, dtype):
    generator = np.random.default_rng(7)
    shapes = ((nodes, heads, last) for last in (width, width, channels))
    return tuple(generator.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes)


@functools.lru_cache(maxsize=2)
def _node_gradient(nodes, heads, channels, dtype):
    return np.random.default_rng(8).standard_normal((nodes, heads, channels), dtype=np.float32).astype(dtype)


@functools.lru_cache(maxsize=2)
def _square_matrices(head_dim, dtype):
    """Two matrices, scaled so that scores are of size 1."""
    generator = np.random.default_rng(8)
    matrices = generator.standard_normal((2, head_dim, head_dim), dtype=np.float32) * np.float32(head_dim**-0.75)
    return tuple(matrices.astype(dtype))


@functools.lru_cache(maxsize=2)
def _multihead_inputs(batch, seqlen, d_model, dtype):
    """x, four matrices and four biases, scaled so that queries, keys and values, and so the scores, are of size 1."""
    generator = np.random.default_rng(7)

    def normal(*shape, size=1.0):
        return (np.float32(size) * generator.standard_normal(shape, dtype=np.float32)).astype(dtype)

    matrices = (normal(d_model, d_model, size=d_model**-0.5) for _ in range(4))
    return normal(batch, seqlen, d_model), *matrices, *(normal(d_model, size=0.3) for _ in range(4))


@functools.lru_cache(maxsize=2)
def _linear_inputs(shape, dtype, is_delta):
    """query, key, value; with the delta rule keys of length 1, logarithms of decays, and strengths."""
    generator = np.random.default_rng(7)
    arrays = [generator.standard_normal(shape, dtype=np.float32) for _ in range(3)]
    if is_delta:
        arrays[1] /= np.linalg.norm(arrays[1], axis=-1, keepdims=True)
        arrays += [np.log(generator.uniform(0.8, 1, shape[:-1])), generator.uniform(0.2, 0.9, shape[:-1])]
    return tuple(array.astype(dtype) for array in arrays)


@functools.lru_cache(maxsize=2)
def _pixels(shape, dtype):
    return tuple(np.random.default_rng(7).standard_normal((3, *shape), dtype=np.float32).astype(dtype))


@functools.lru_cache(maxsize=2)
def _normal(shape, dtype):
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32).astype(dtype)


@functools.lru_cache(maxsize=2)
def _gradient_and_weights(shape, dtype, axis):
    """A gradient, and the softmax of other numbers."""
    weights = np.exp(_normal(shape, dtype))
    weights /= weights.sum(axis, keepdims=True)
    return np.random.default_rng(11).standard_normal(shape, dtype=np.float32).astype(dtype), weights


# Small calls, an encoder's layers, cross-attention over audio, long sequences.
ATTENTION_SHAPES = (
    (1, 1, 1, 8, 8),
    (1, 8, 16, 16, 64),
    (1, 12, 128, 128, 64),
    (1, 8, 512, 512, 64),
    (2, 16, 384, 384, 80),
    (1, 12, 77, 1500, 64),
    (1, 8, 2048, 2048, 64),
    (1, 8, 2048, 2048, 128),
)

ATTENTION = (
    *(Attention(*shape) for shape in ATTENTION_SHAPES),
    Attention(1, 8, 2048, 2048, 64, is_causal=True),
    Attention(1, 8, 2048, 2048, 128, is_causal=True),
    Attention(1, 8, 512, 512, 64, "float64"),
    Attention(1, 8, 2048, 2048, 64, "float64"),
    Attention(1, 8, 2048, 2048, 128, "float64"),
    Attention(1, 8, 2048, 2048, 64, "float64", is_causal=True),
)

# A square, the scores of an encoder, a vocabulary, many short rows, rows larger than a core's cache.
SOFTMAX = (
    Softmax((1024, 1024)),
    Softmax((8, 12, 128, 128)),
    Softmax((64, 32000)),
    Softmax((100_000, 64)),
    Softmax((16, 1_000_000)),
    Softmax((1024, 1024), "float64"),
    Softmax((512, 4096), axis=0),
    Softmax((512, 4096), "float64", axis=0),
    Softmax((8, 256, 32, 32), axis=1),
)

SOFTMAX_BACK = (
    SoftmaxBack((1024, 1024)),
    SoftmaxBack((64, 32000)),
    SoftmaxBack((100_000, 64)),
    SoftmaxBack((512, 4096), axis=0),
)

# The scores of a long sequence, and of short ones.
SPARSE = tuple(
    Sparse(sizes, function=function) for function in ("sparsemax", "entmax15") for sizes in ((512, 4096), (8192, 128))
)

# A medium size, remainders in every axis, from one channel to very many, a long sequence.
ADDITIVE_SHAPES = (
    (1, 8, 512, 512, 64),
    (1, 8, 500, 509, 61),
    (1, 8, 512, 512, 1),
    (1, 8, 512, 512, 8),
    (1, 8, 128, 128, 256),
    (1, 2, 128, 128, 1024),
    (1, 1, 2048, 2048, 128),
)

ADDITIVE = (
    *(Additive(*shape) for shape in ADDITIVE_SHAPES),
    Additive(1, 8, 512, 512, 64, is_projected=True),
    Additive(1, 8, 512, 512, 64, "float64"),
)

# A quarter of ogbn-arxiv, a mesh, a dense graph, and Cora.
GRAPH = (
    Graph("arxiv", 42_000, 290_000, 4, 32),
    Graph("arxiv", 42_000, 290_000, 8, 16, "gat"),
    Graph("mesh", 20_000, 320_000, 1, 64),
    Graph("wide", 4_000, 400_000, 4, 32),
    Graph("cora", 2_708, 10_556, 8, 8),
    Graph("cora", 2_708, 10_556, 8, 8, "gat"),
)

GRAPH_BACK = tuple(GraphBack(c.graph, c.nodes, c.edges, c.heads, c.channels, c.score) for c in GRAPH)

ATTENTION_BACK_SHAPES = (
    (1, 12, 128, 64),
    (1, 8, 512, 64),
    (1, 8, 2048, 64),
    (1, 8, 2048, 128),
    (1, 1, 2048, 64),
)
ATTENTION_BACK = (
    *(AttentionBack(*shape) for shape in ATTENTION_BACK_SHAPES),
    AttentionBack(1, 8, 2048, 64, "causal"),
    AttentionBack(1, 8, 2048, 128, "causal"),
    AttentionBack(1, 8, 2048, 64, "64x64"),
    AttentionBack(1, 8, 2048, 64, "256x256"),
    AttentionBack(1, 8, 2048, 64, "bias"),
    AttentionBack(1, 32, 512, 64, "grouped"),
    AttentionBack(1, 8, 512, 64, dtype="float64"),
)

ADDITIVE_BACK = (
    AdditiveBack(1, 8, 512, 512, 64),
    AdditiveBack(1, 8, 128, 128, 64),
    AdditiveBack(32, 1, 50, 50, 64),
    AdditiveBack(1, 8, 128, 128, 64, "float64"),
)

BILINEAR_SHAPES = ((1, 12, 128, 128, 64), (1, 8, 512, 512, 64), (1, 8, 2048, 2048, 64))

# On few heads the threads must share one head's rows.
SCALING = (
    Attention(1, 8, 2048, 2048, 64),
    Attention(1, 1, 2048, 2048, 64),
    Attention(1, 12, 128, 128, 64),
)

# Neighbours, a few frames back, both sides, far back, wide. The last length no longer fits in a core's caches.
WINDOWS = ((1, 1), (15, 0), (64, 64), (128, 0), (256, 256))
LENGTHS = (1024, 4096, 16384, 65536)


def in_window(seqlen, window):
    """One head, so that the longest stays small; its rows are still divided among the threads."""
    return Truncated(1, 1, seqlen, 64, *window)


# All windows at one length, and one window at all lengths.
TRUNCATED = (
    *(in_window(4096, window) for window in WINDOWS),
    *(in_window(seqlen, (64, 64)) for seqlen in LENGTHS if seqlen != 4096),
)

# One query and a few: over 34, 134 and 67 MB of keys and values (the last with grouped heads), one head alone, a batch.
DECODE = tuple(
    Decode(batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim)
    for batch, heads, kv_heads, seqlen_k, head_dim in (
        (1, 8, 8, 8192, 64),
        (1, 8, 8, 32768, 64),
        (1, 32, 8, 8192, 128),
        (1, 1, 1, 65536, 64),
        (8, 12, 12, 1024, 64),
    )
    for seqlen_q in (1, 4, 8)
)

# A token of a large model whose heads share keys, four to one, and of one whose heads do not: 34 and 134 MB in float32;
# and a page of 2048 tokens.
STORED = tuple(
    Stored(1, heads, kv_heads, seqlen_q, seqlen_k, head_dim, storage=storage)
    for heads, kv_heads, seqlen_q, seqlen_k, head_dim in (
        (32, 8, 1, 4096, 128),
        (32, 32, 1, 4096, 128),
        (8, 8, 2048, 2048, 64),
        (8, 8, 2048, 2048, 128),
    )
    for storage in ("float16", "bfloat16", "int8")
)

# A sentence and a page in an encoder, a batch for a small one, one token.
MULTI_HEAD_SHAPES = ((1, 128, 768, 12), (1, 512, 768, 12), (8, 64, 384, 12), (1, 1, 768, 12))
MULTI_HEAD = tuple(MultiHead(*shape) for shape in MULTI_HEAD_SHAPES)
MULTI_HEAD_STEPS = tuple(MultiHeadStep(*shape) for shape in MULTI_HEAD_SHAPES[:3])

# A small decoder at a short and at a long text; a decoder of Bahdanau's over a long sentence.
CACHED_STEPS = (CachedStep(64, 768, 12), CachedStep(1024, 768, 12))
ADDITIVE_STEPS = (AdditiveStep(500, 1024, 256), AdditiveStep(50, 1024, 256))

# The queries of a page, of one token in a large model, of a batch.
ROTARY_SHAPES = ((1, 12, 512, 64), (1, 32, 1, 128), (8, 12, 128, 64))
ROTARY = tuple(Rotary(*shape) for shape in ROTARY_SHAPES)

# A page in an encoder, into and out of the wide layer; a batch of a small one; a token, and four, in a decoder.
PRODUCTS = (
    Product(512, 768, 768),
    Product(512, 768, 3072, "gelu"),
    Product(512, 3072, 768),
    Product(2048, 384, 1536, "silu"),
    Product(1, 768, 3072),
    Product(4, 2048, 2048),
)
NORMS = tuple(Norm(rows, 768, name) for name in ("layer_norm", "rms_norm") for rows in (1, 512))

# A layer, one long head, a batch of wide heads, a stream sixteen times as long; and a layer of a gated delta net.
LINEAR_SHAPES = ((1, 8, 4096, 64), (1, 1, 16384, 64), (2, 4, 2048, 128), (1, 1, 65536, 64))
LINEAR = (*(Linear(*shape) for shape in LINEAR_SHAPES), Linear(1, 8, 2048, 128, "gated delta"))
# A token in a large model, in a small one.
LINEAR_STEPS = (LinearStep(1, 32, 128), LinearStep(1, 8, 64))

# A long document, and one that NumPy can take.
BLOCKS = (Blocks(1, 8, 8192, 8192, 64), Blocks(1, 8, 2048, 2048, 64))

# The first two stages of a NAT, a small volume.
NEIGHBORHOOD_SPACES = (((56, 56), 7), ((28, 28), 7), ((16, 16, 16), 3))
NEIGHBORHOOD = tuple(Neighborhood(4, space, kernel, 32) for space, kernel in NEIGHBORHOOD_SPACES)

# One sentence, and a batch of mixed lengths.
MINILM = (MiniLM(1, 24), MiniLM(32, 64))

MEMORY = (
    Attention(1, 1, 16384, 16384, 64),
    Attention(1, 1, 16384, 16384, 64, is_causal=True),
    in_window(65536, (64, 64)),
)
