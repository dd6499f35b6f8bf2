"""The streaming example: its features are right however the sound is split, and it streams as claimed.

The script needs tqdm (the `examples` extra), the picture matplotlib. Tests for what is not installed are skipped, with
the reason.
"""

import importlib.util
import os
import re
import subprocess
import sys
import types
import wave
from pathlib import Path

import numpy as np
import pytest

import fastattn

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "streaming_speech.py"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

needs_tqdm = pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="the examples need tqdm")


@pytest.fixture(scope="module")
def speech():
    """The module examples/streaming_speech.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("streaming_speech", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sine(hertz, rate, seconds=0.5, loudness=0.5):
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path, channels, rate=16000, width=2):
    """Write float samples, one array per channel, as PCM of that many bytes."""
    samples = np.stack(channels, axis=1)
    whole = np.round(samples * 2.0 ** (8 * width - 1)).astype(np.int64)
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
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_width_is_read(speech, tmp_path, width, channels):
    rng = np.random.default_rng(width)
    sounds = [rng.uniform(-0.99, 0.99, 1000) for _ in range(channels)]
    path = write_wav(tmp_path / "x.wav", sounds, width=width)
    for size in (1 << 14, 64, 333):
        blocks = list(speech.read_wav(path, size))
        assert max(map(len, blocks)) <= size
        samples = np.concatenate(blocks)
        assert samples.dtype == np.float32
        np.testing.assert_allclose(samples, sounds[0], rtol=1e-7, atol=0.5001 * 2.0 ** (1 - 8 * width))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_extremes_of_a_width(speech, tmp_path, width):
    step = 2.0 ** (1 - 8 * width)
    path = write_wav(tmp_path / "x.wav", [np.array([-1.0, 0.0, 1 - step])], width=width)
    np.testing.assert_array_equal(next(speech.read_wav(path)), np.float32([-1, 0, 1 - step]))


def test_a_recording_is_repeated(speech, tmp_path):
    sound = sine(300, 16000, 0.1)
    source = speech.Recording(write_wav(tmp_path / "x.wav", [sound]))
    heard = np.concatenate(list(speech.pushes(source, 0.35, 30)))
    assert len(heard) == 5600
    np.testing.assert_array_equal(heard, np.tile(heard[:1600], 4)[:5600])
    np.testing.assert_allclose(heard[:1600], sound, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [16000, 11025, 44100])
@pytest.mark.parametrize("milliseconds", [1, 7, 160, 5000])
def test_pushes_are_as_long_as_they_should_be(speech, rate, milliseconds):
    rng = np.random.default_rng(0)
    blocks = [np.full(rng.integers(0, 900), i, np.float32) for i in range(1000)]
    source = types.SimpleNamespace(rate=rate, blocks=lambda: iter(blocks))
    parts = list(speech.pushes(source, 1.2345, milliseconds))
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(blocks)[: round(1.2345 * rate)])
    ends = np.cumsum([len(part) for part in parts])[:-1]
    assert (abs(ends - np.arange(1, len(parts)) * milliseconds * rate / 1000) < 1).all()
    assert min(map(len, parts)) > 0


def test_babble_is_reproducible_and_of_good_volume(speech):
    first, again = (np.concatenate(list(speech.pushes(speech.Babble(3), 10, ms))) for ms in (160, 333))
    np.testing.assert_array_equal(first, again)
    assert 0.2 < abs(first).max() < 1
    loudness = np.sqrt((first.reshape(-1, 400) ** 2).mean(axis=1))
    assert 0.05 < (loudness < 0.002).mean() < 0.6  # it pauses
    other = np.concatenate(list(speech.pushes(speech.Babble(4), 10, 160)))
    assert not np.array_equal(first, other)


# --------------------------------------------------------------------------------------------- the features


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("hertz", [200, 1000, 3000])
def test_a_sine_is_loudest_in_its_band(speech, rate, hertz):
    frames = speech.LogMel(rate).push(sine(hertz, rate))
    edges = speech.mel_edges(rate)
    band = abs(edges[1:-1] - hertz).argmin()
    assert (abs(frames.argmax(axis=1) - band) <= 1).all()
    # And there is almost nothing elsewhere; 9 bands are more than the window smears at 200 Hz.
    far = abs(np.arange(speech.BANDS) - band) > 9
    assert (frames[:, far].max(axis=1) < frames.max(axis=1) - 30).all()


def test_decibels(speech):
    loud, quiet = (speech.LogMel(16000).push(sine(1000, 16000, loudness=x)) for x in (1.0, 0.1))
    assert abs(loud.max(axis=1)).max() < 6  # about 0 dB at full scale
    np.testing.assert_allclose((loud - quiet).max(axis=1), 20, rtol=0, atol=3)
    np.testing.assert_allclose(loud.max(axis=1) - quiet.max(axis=1), 20, rtol=0, atol=1e-3)
    silence = speech.LogMel(16000).push(np.zeros(8000, np.float32))
    np.testing.assert_allclose(silence, speech.FLOOR_DB, rtol=1e-6)


@pytest.mark.parametrize("rate", [4000, 8000, 16000, 48000])
def test_no_band_is_deaf(speech, rate):
    filters = speech.mel_filters(rate, speech.LogMel(rate).fft_size)
    assert (filters.sum(axis=0) > 0).all()


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100])
def test_frames_do_not_depend_on_the_cuts(speech, rate):
    rng = np.random.default_rng(1)
    sound = rng.standard_normal(2 * rate, np.float32) * 0.1
    whole = speech.LogMel(rate).push(sound)
    assert whole.dtype == np.float32
    assert whole.shape == (speech.LogMel(rate).count(len(sound)), speech.BANDS)
    assert len(whole) == 198  # those whose 25 ms end within the two seconds
    for longest in (3, 100, 1000, 7000):
        cuts = np.cumsum(rng.integers(0, longest, 4 * len(sound) // longest))
        features = speech.LogMel(rate)
        parts = [features.push(part) for part in np.split(sound, cuts[cuts < len(sound)])]
        np.testing.assert_array_equal(np.concatenate(parts).view(np.uint32), whole.view(np.uint32))
        assert len(features.kept) < 0.03 * rate


def test_frames_are_where_they_should_be(speech):
    """A click appears in the frames whose window covers it."""
    sound = np.zeros(22050, np.float32)
    sound[11025] = 1
    loud = np.flatnonzero((speech.LogMel(22050).push(sound) > speech.FLOOR_DB).any(axis=1))
    np.testing.assert_array_equal(loud, [48, 49, 50][: len(loud)])
    assert len(loud) >= 2


def test_projection_does_not_depend_on_company(speech):
    frames = np.random.default_rng(2).uniform(-70, 0, (50, speech.BANDS)).astype(np.float32)
    project = speech.Projection(np.random.default_rng(0))
    whole = project(frames)
    for cut in (1, 2, 17):
        parts = zip(*(project(frames[at : at + cut]) for at in range(0, 50, cut)), strict=True)
        for all_at_once, part in zip(whole, parts, strict=True):
            assert all_at_once.shape == (speech.HEADS, 50, speech.HEAD_DIM)
            np.testing.assert_array_equal(np.concatenate(part, axis=1), all_at_once)
    assert [x.shape[1] for x in project(frames[:0])] == [0, 0]


def test_similar_sounds_attract(speech):
    """Two alternating vowels: nearly all of the weight is on the current vowel, wherever it is in the window."""
    vowels = [sum(sine(h, 16000, 0.1, 0.2) for h in formants) for formants in ((300, 2300), (700, 1200))]
    frames = speech.LogMel(16000).push(np.concatenate(vowels * 10))
    query_key, value = speech.Projection(np.random.default_rng(0))(frames)
    scale = speech.Projection(np.random.default_rng(0)).scale
    _, weights = fastattn.truncated_attention(
        query_key, query_key, value, 100, 10, query_offset=0, scale=scale, return_weights=True
    )
    weights = weights.mean(axis=0)
    frame = np.arange(len(frames))
    kind = np.where(frame % 10 < 8, frame // 10 % 2, 2)  # 2 is in between
    for own in (0, 1):
        rows = weights[kind == own]
        assert rows[:, kind == own].sum(axis=1).mean() > 0.7
        assert rows[:, kind == 1 - own].sum(axis=1).mean() < 0.1


# ----------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("milliseconds", [10, 37, 160, 2000])
@pytest.mark.parametrize(("left", "right"), [(100, 10), (7, 0), (3, 30)])
def test_streaming_equals_offline(speech, tmp_path, milliseconds, left, right):
    options = speech.parse_arguments(["--seconds", "3", "--push", str(milliseconds), "--right", str(right)])
    source, project = speech.Babble(1), speech.Projection(np.random.default_rng(1))
    window = {"left": left, "right": right, "scale": project.scale, "num_threads": 1}
    progress = []
    with open(tmp_path / "results", "wb") as file:
        report = speech.stream(
            source, options, project, fastattn.StreamingAttention(**window), file, lambda n: progress.append(n)
        )
    assert report.num_frames == sum(progress) == 298
    assert report.num_pushes == len(progress) == len(report.seconds)
    assert not np.isnan(report.seconds).any()
    again = []
    verdict, same = speech.compare_offline(
        source, options, project, fastattn.truncated_attention, window, tmp_path / "results", again.append
    )
    assert same, verdict
    assert sum(again) == 298
    assert f"equal bits in all {298 * 4 * 32:,} numbers" in verdict


def test_a_difference_is_found(speech, tmp_path):
    options = speech.parse_arguments(["--seconds", "1"])
    source, project = speech.Babble(1), speech.Projection(np.random.default_rng(1))
    window = {"left": 9, "right": 1, "scale": project.scale, "num_threads": 1}
    with open(tmp_path / "results", "wb") as file:
        speech.stream(source, options, project, fastattn.StreamingAttention(**window), file, lambda n: None)
    numbers = np.memmap(tmp_path / "results", np.float32, "r+")
    numbers[777] += 0.25
    numbers.flush()
    verdict, same = speech.compare_offline(
        source, options, project, fastattn.truncated_attention, window, tmp_path / "results", lambda n: None
    )
    assert not same
    assert re.search(r" 1 of [\d,]+ numbers are not those streamed, but up to 0.25 away", verdict)


# ---------------------------------------------------------------------------------------------- the script


def run_script(*arguments, without=None, cwd=None, path=None):
    """Run streaming_speech.py in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if path is not None:
        environment["PATH"] = str(path)
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment, cwd=cwd)


def check_report(run):
    assert run.returncode == 0, run.stderr + run.stdout
    assert "heard    5 s, 498 frames, 32 pushes of 160 ms" in run.stdout
    assert "latency  100 ms of look-ahead and up to 160 ms until a push is full" in run.stdout
    assert re.search(r"then [\d.]+ ms of computing \(median; [\d.]+ ms at worst\)", run.stdout)
    assert re.search(r"attention [\d,]+ times as fast as the sound, features and attention [\d,]+ times", run.stdout)
    assert "equal bits in all 63,744 numbers" in run.stdout
    assert "498/498" in run.stderr  # the progress bar


@needs_tqdm
def test_script_streams_babble(tmp_path):
    run = run_script("--seconds", "5", without="matplotlib", cwd=tmp_path, path=tmp_path)
    check_report(run)
    assert "babble of synthetic syllables" in run.stdout
    assert "Where each frame looked, from 1.0 s to 4.9 s" in run.stdout
    assert re.search(r"^ *\+10 to \+100  .*[#%@]", run.stdout, re.M)
    assert "pip install matplotlib" in run.stdout
    assert not list(tmp_path.iterdir())


@needs_tqdm
@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.parametrize("seconds", ["1", "5"])
def test_script_draws_a_recording(tmp_path, seconds):
    sound = np.concatenate([sine(500, 22050, 0.3), sine(2000, 22050, 0.4), np.zeros(5000)])
    recording = write_wav(tmp_path / "beeps.wav", [sound, 0 * sound], rate=22050, width=3)
    picture = tmp_path / "drawn.png"
    run = run_script(str(recording), "--seconds", seconds, "--output", str(picture), cwd=tmp_path)
    assert f"Listening to {recording}: 0.9 s, 24-bit, 22050 Hz" in run.stdout
    assert "not 16000 Hz: frames are cut from it at its own rate" in run.stdout
    if seconds == "5":
        check_report(run)
    assert run.returncode == 0, run.stderr
    assert f"Drawn in {picture}" in run.stdout
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    assert 500 < width < 3000
    assert 500 < height < 3000


@needs_tqdm
@pytest.mark.skipif(os.name != "posix", reason="the stand-in for espeak-ng is a shell script")
@pytest.mark.parametrize("works", [True, False])
def test_espeak_speaks_where_it_is_installed(tmp_path, works):
    sound = write_wav(tmp_path / "spoken.wav", [sine(440, 22050, 1.0)], rate=22050)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "espeak-ng"
    copy = f'[ "$3" = -w ] && /bin/cp {sound} "$4"' if works else "echo no voice >&2; exit 1"
    program.write_text(f"#!/bin/sh\n{copy}\n", encoding="utf-8")
    program.chmod(0o755)
    run = run_script("--seconds", "1", without="matplotlib", cwd=tmp_path, path=tmp_path / "bin")
    assert run.returncode == 0, run.stderr
    assert ("speech of espeak-ng: 1.0 s, 16-bit, 22050 Hz" in run.stdout) == works
    assert ("babble" in run.stdout) != works
    assert ("did not speak: no voice" in run.stderr) != works


@pytest.mark.parametrize("package", [pytest.param("fastattn", marks=needs_tqdm), "tqdm"])
def test_missing_package_is_explained(package):
    run = run_script("--seconds", "1", without=package)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"package {package} is not installed" in run.stderr
    assert 'pip install ".[examples]"' in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "0.5"], "at least 1, not 0.5"),
        (["--seconds", "inf"], "at least 1, not inf"),
        (["--left", "-1"], "at least 0, not -1"),
        (["--push", "0"], "at least 1, not 0"),
        (["--output", "picture.txt"], "must end in .png"),
        (["--output", "nowhere/picture.png"], "no folder 'nowhere'"),
    ],
)
def test_unusable_options_are_explained(speech, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        speech.parse_arguments(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_unusable_recordings_are_explained(speech, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("This is no sound, but it is long enough for a header.", encoding="utf-8")
    write_wav(tmp_path / "silent.wav", [np.zeros(0)])
    header = write_wav(tmp_path / "cut.wav", [np.zeros(100)]).read_bytes()[:44]
    (tmp_path / "cut.wav").write_bytes(header)
    write_wav(tmp_path / "slow.wav", [np.zeros(10)], rate=1000)
    for name, words in [
        ("nowhere.wav", "cannot be read as a WAV file"),
        ("empty.wav", "cannot be read as a WAV file: it ends too early"),
        ("text.wav", "cannot be read as a WAV file"),
        ("silent.wav", "holds no sound"),
        ("cut.wav", "holds no sound"),
        ("slow.wav", "1000 samples a second"),
    ]:
        with pytest.raises(speech.SoundError, match=words):
            speech.Recording(tmp_path / name)


@needs_tqdm
def test_script_explains_unusable_recordings(tmp_path):
    run = run_script("nowhere.wav", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("error: nowhere.wav cannot be read as a WAV file")
    assert "Traceback" not in run.stderr
