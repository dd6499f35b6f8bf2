"""Attend to speech while it is being spoken: an hour of sound in constant memory, a tenth of a second behind it.

    python examples/streaming_speech.py talk.wav

reads a recording as if it arrived live, cuts it into frames of 10 ms with 80 mel bands each, and pushes them through
`fastattn.StreamingAttention`: every frame attends to the second before it and to 100 ms after it. It says how late
the results are, what memory they need and how much faster than the sound they come; then it computes the same once
more offline, the whole sequence at once, and compares the bits. A picture shows what was heard and where the frames
looked: in streaming_speech.png when matplotlib is installed, as text otherwise.

Without a recording, espeak-ng speaks one if it is installed; if not, the script makes a babble of syllables itself.

Nothing is learned here. Queries and keys are the same random projections of a frame's spectrum, so that a frame attends
to those nearby that sound alike: to its own vowel, to the same syllable half a second ago. In a trained speech encoder
the projections are learned, and the rest is as it is here.
"""

import argparse
import contextlib
import importlib.util
import itertools
import math
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import wave
from pathlib import Path

import numpy as np

# fastattn and tqdm are imported in main(), once the arguments are known to be good: then a person who lacks one
# reads how to get it. matplotlib is imported by draw() alone.

INSTALL = 'pip install ".[examples]"'
INSTALL_MATPLOTLIB = "pip install matplotlib"

FRAMES_PER_SECOND = 100
FRAME_MS = 1000 // FRAMES_PER_SECOND
WINDOW_MS = 25
BANDS = 80
LOWEST_HZ, HIGHEST_HZ = 50, 8000
FLOOR_DB = -70  # below a sine of full scale; what is quieter counts as silence

HEADS, HEAD_DIM = 4, 32
SHARPNESS = 14  # the score of two frames that sound exactly alike; e**14 times the weight of unrelated ones
SHOWN_SECONDS = 4


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        from tqdm import tqdm

        import fastattn
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = find_source(options, Path(folder))
        except SoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(source.description, flush=True)
        project = Projection(np.random.default_rng(options.seed))
        window = {"left": options.left, "right": options.right, "scale": project.scale, "num_threads": options.threads}

        frames = LogMel(source.rate).count(round(options.seconds * source.rate))
        results = Path(folder) / "results"
        attention = fastattn.StreamingAttention(**window)
        with open(results, "wb") as file, tqdm(total=frames, unit=" frames", unit_scale=True) as bar:
            report = stream(source, options, project, attention, file, bar.update)
        print(report.describe(options), flush=True)

        with tqdm(total=frames, unit=" frames", unit_scale=True, desc="Offline") as bar:
            verdict, same = compare_offline(
                source, options, project, fastattn.truncated_attention, window, results, bar.update
            )
        print(verdict, flush=True)

        picture = look(source, options, project, fastattn.truncated_attention, window)
    if importlib.util.find_spec("matplotlib") is None:
        print(describe(*picture))
        print(f"\nTo have it drawn as a picture: {INSTALL_MATPLOTLIB}")
    else:
        draw(*picture, options.output)
        print(f"Drawn in {options.output}")
    return 0 if same else 1


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def at_least(least, kind=int):
        def number(text):
            value = kind(text)
            if not least <= value < math.inf:
                raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
            return value

        return number

    def picture(text):
        path = Path(text)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .svg or .pdf")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
        return path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "recording",
        nargs="?",
        type=Path,
        metavar="FILE.wav",
        help="a WAV file of 8, 16, 24 or 32-bit PCM at any rate, of which the first channel is heard; "
        "default: one that espeak-ng speaks or, without it, a babble of syllables",
    )
    parser.add_argument(
        "--seconds",
        type=at_least(1, float),
        default=3600.0,
        metavar="S",
        help="how long to listen (default 3600); what is shorter is repeated",
    )
    parser.add_argument(
        "--left", type=at_least(0), default=100, metavar="N", help="frames of 10 ms seen before (default 100)"
    )
    parser.add_argument(
        "--right", type=at_least(0), default=10, metavar="N", help="frames of look-ahead (default 10: 100 ms)"
    )
    parser.add_argument(
        "--push", type=at_least(1), default=160, metavar="MS", help="milliseconds of sound a push (default 160)"
    )
    parser.add_argument(
        "--output",
        type=picture,
        default="streaming_speech.png",
        metavar="FILE",
        help="the picture (default streaming_speech.png)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="start of all that is random (default 0)"
    )
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        metavar="N",
        help="threads of the attention (default 1, which is enough for what a push brings)",
    )
    return parser.parse_args(arguments)


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    return (
        f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n"
        f"    {INSTALL}\n\nFor the picture: {INSTALL_MATPLOTLIB}"
    )


# ------------------------------------------------------------------------------------------------ the sound


class SoundError(Exception):
    """There is nothing to listen to; the message says why."""


def find_source(options, folder):
    """Return what to listen to: the recording that was asked for, or the best that can be made here."""
    if options.recording is not None:
        return Recording(options.recording)
    program = shutil.which("espeak-ng")
    if program is not None:
        path = folder / "spoken.wav"
        run = subprocess.run(
            [program, "-v", "en", "-w", str(path), "--", TEXT], capture_output=True, encoding="utf-8", check=False
        )
        if run.returncode == 0 and path.exists():
            return Recording(path, "speech of espeak-ng")
        print(f"espeak-ng is installed but did not speak: {run.stderr.strip()}", file=sys.stderr)
    return Babble(options.seed)


TEXT = (
    "Attention looks back. It looks back a second, and a second is a long time: a word, and a word, and the pause "
    "between them. It looks ahead a little, a little, a little at a time, and then it has to say what it has heard."
)


class Recording:
    """A WAV file, heard again from the beginning when it ends."""

    def __init__(self, path, name=None):
        self.path = path
        try:
            with wave.open(str(path)) as file:
                self.rate, count, width = file.getframerate(), file.getnframes(), file.getsampwidth()
                silent = not file.readframes(1)
        except (OSError, EOFError, wave.Error) as error:
            raise SoundError(f"{path} cannot be read as a WAV file: {str(error) or 'it ends too early'}") from error
        if silent:
            raise SoundError(f"{path} holds no sound")
        if width not in (1, 2, 3, 4):
            raise SoundError(f"{path} has {8 * width}-bit samples; 8, 16, 24 and 32 bits can be read")
        if self.rate < 4000:
            raise SoundError(f"{path} has {self.rate} samples a second; speech needs at least 4000")
        self.description = f"Listening to {name or path}: {count / self.rate:.1f} s, {8 * width}-bit, {self.rate} Hz"
        if self.rate != 16000:
            band = f"bands reach to {min(HIGHEST_HZ, self.rate / 2):.0f} Hz"
            self.description += f"\nThat is not 16000 Hz: frames are cut from it at its own rate, and their {band}"

    def blocks(self):
        """Yield blocks of samples without end."""
        while True:
            yield from read_wav(self.path)


def read_wav(path, size=1 << 14):
    """Yield the first channel of a PCM WAV file as float32 blocks of up to `size` samples, from -1 to 1."""
    with wave.open(str(path)) as file:
        width, channels = file.getsampwidth(), file.getnchannels()
        while data := file.readframes(size):
            data = data[: len(data) // (width * channels) * width * channels]
            samples = np.frombuffer(data, np.uint8).reshape(-1, channels, width)[:, 0]
            # The bytes of a number are the highest ones of an int32, with zeros below them; 8 bits have no sign.
            wide = np.zeros((len(samples), 4), np.uint8)
            wide[:, 4 - width :] = samples ^ 0x80 if width == 1 else samples
            yield (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)


class Babble:
    """Words of a language that nobody speaks, out of harmonics, formants and noise, with pauses between them."""

    rate = 16000
    description = "Listening to a babble of synthetic syllables at 16000 Hz (no recording given, no espeak-ng found)"

    # The first three formants of vowels and nasals in Hz, and the band of noise of the others.
    vowels = ((750, 1200, 2500), (520, 1900, 2500), (290, 2300, 3000), (480, 850, 2400), (320, 1000, 2200))
    nasals = ((250, 1100, 2200), (250, 1600, 2600))
    hisses = ((4500, 7500, 0.11), (2200, 4500, 0.11), (3500, 6500, 0.025), (1400, 2600, 0.03))  # with seconds

    def __init__(self, seed, num_words=24):
        self.seed = seed
        rng = random.Random(seed)
        noise = np.random.default_rng(seed)
        self.words = [self.speak(rng, noise) for _ in range(num_words)]

    def blocks(self):
        """Yield the words of one sentence after the other, without end, over a little noise."""
        rng = random.Random(self.seed)
        noise = np.random.default_rng(self.seed)
        while True:
            # A few words that come again and again give the attention something to find.
            topic = rng.sample(self.words, 3)
            for _ in range(rng.randint(5, 8)):
                silence = np.zeros(int(rng.uniform(0.03, 0.09) * self.rate), np.float32)
                yield from (self.over_noise(part, noise) for part in (rng.choice(topic), silence))
            yield self.over_noise(np.zeros(int(rng.uniform(0.3, 0.7) * self.rate), np.float32), noise)

    def over_noise(self, samples, noise):
        return samples + 0.001 * noise.standard_normal(len(samples), np.float32)

    def speak(self, rng, noise):
        """Return the samples of a word of two or three syllables."""
        # Marks along the word, between which all glides: time, formants, voice from 0 to 1. Hisses are added last.
        now, marks, hisses = 0.0, [], []
        pitch = rng.uniform(105, 135)
        for _ in range(rng.randint(2, 3)):
            vowel = rng.choice(self.vowels)
            if rng.random() < 0.35:
                nasal = rng.choice(self.nasals)
                marks += [(now, nasal, 0.0), (now + 0.02, nasal, 0.3), (now + 0.07, nasal, 0.3)]
                now += 0.09
            else:
                *band, length = rng.choice(self.hisses)
                hisses.append((now + 0.01, length, band))
                now += length + 0.03
                marks.append((now - 0.02, [0.85 * formant for formant in vowel], 0.0))
            length = rng.uniform(0.1, 0.18)
            marks += [(now + 0.02, vowel, 1.0), (now + length, vowel, 0.8)]
            now += length + 0.03
            marks.append((now, vowel, 0.0))
        count = int(now * self.rate)
        at = np.arange(count) / self.rate
        times = [mark[0] for mark in marks]
        formants = [np.interp(at, times, [mark[1][i] for mark in marks]) for i in range(3)]
        voice = np.interp(at, times, [mark[2] for mark in marks])
        melody = pitch * (1.1 - 0.25 * at / now + 0.02 * np.sin(2 * np.pi * 5 * at))
        phase = 2 * np.pi * np.cumsum(melody) / self.rate
        samples = np.zeros(count)
        for harmonic in range(1, int(5000 / melody.max())):
            hertz = harmonic * melody
            loudness = sum((0.4**i) / (1 + ((hertz - formant) / 90) ** 2) for i, formant in enumerate(formants))
            samples += loudness * harmonic**-0.5 * np.sin(harmonic * phase)
        samples *= voice
        samples *= 0.4 / abs(samples).max()
        for start, length, (low, high) in hisses:
            size = int(length * self.rate)
            spectrum = np.fft.rfft(noise.standard_normal(size))
            hertz = np.fft.rfftfreq(size, 1 / self.rate)
            spectrum *= np.exp(-(((hertz - (low + high) / 2) / (high - low)) ** 2) * 4)
            samples[int(start * self.rate) :][:size] += 0.06 * np.hanning(size) * np.fft.irfft(spectrum, size)
        return samples.astype(np.float32)


def pushes(source, seconds, milliseconds):
    """Cut what a source yields into pushes of that many milliseconds, `seconds` of it in all."""
    total, sent = round(seconds * source.rate), 0
    kept = np.zeros(0, np.float32)
    blocks = source.blocks()
    for push in itertools.count(1):
        # The n-th push ends where n pushes end, to the nearest sample: also where a push is no whole number of them.
        size = min(push * milliseconds * source.rate // 1000, total) - sent
        while len(kept) < size:
            kept = np.concatenate([kept, next(blocks)])
        yield kept[:size]
        kept, sent = kept[size:], sent + size
        if sent == total:
            return


# --------------------------------------------------------------------------------------------- the features


class LogMel:
    """Sound in, frames of `BANDS` mel bands in decibels out: one each 10 ms, over a window of 25 ms.

    It does not matter how the sound is cut: the frames are the same, to the last bit.
    """

    def __init__(self, rate):
        self.rate = rate
        self.size = round(rate * WINDOW_MS / 1000)
        self.fft_size = 1 << math.ceil(math.log2(2 * self.size))
        taper = np.hanning(self.size + 2)[1:-1]
        self.taper = (taper * 2 / taper.sum()).astype(np.float32)  # a sine of full scale has power 1 at its frequency
        self.filters = mel_filters(rate, self.fft_size)
        self.kept = np.zeros(0, np.float32)
        self.sample = 0  # where `kept` begins
        self.frame = 0  # the next frame

    def push(self, samples):
        """Return the frames (n, BANDS) that these samples complete."""
        self.kept = np.concatenate([self.kept, samples])
        # Frame i begins at sample i * rate // 100: on the spot at 16 kHz, to the nearest sample below at 22.05 kHz.
        stop = self.count(self.sample + len(self.kept))
        starts = np.arange(self.frame, stop + 1) * self.rate // FRAMES_PER_SECOND - self.sample
        frames = np.empty((0, BANDS), np.float32)
        if stop > self.frame:
            frames = self.compute(np.lib.stride_tricks.sliding_window_view(self.kept, self.size)[starts[:-1]])
        drop = min(starts[-1], len(self.kept))
        self.kept, self.sample, self.frame = self.kept[drop:], self.sample + drop, stop
        return frames

    def count(self, samples):
        """Return the number of frames whose windows end within that many first samples."""
        return max(0, ((samples - self.size + 1) * FRAMES_PER_SECOND - 1) // self.rate + 1)

    def compute(self, windows):
        """Return the bands of windows of samples (n, size) in decibels, all of them in one go."""
        spectrum = np.fft.rfft(windows * self.taper, self.fft_size)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        # A product for each frame (1, bins) @ (bins, BANDS), because the bits of one product of them all depend on how
        # many frames there are. It costs the same.
        bands = (power[:, None] @ self.filters)[:, 0]
        return 10 * np.log10(np.maximum(bands, np.float32(10 ** (FLOOR_DB / 10))))


def mel_edges(rate):
    """Return the BANDS + 2 frequencies in Hz between which the bands rise and fall, equally far apart in mel."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (LOWEST_HZ, min(HIGHEST_HZ, rate / 2)))
    return 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)


def mel_filters(rate, fft_size):
    """Return the weights (bins, BANDS) of the bands: triangles, with an emphasis on what is high as speech needs it."""
    hertz = np.fft.rfftfreq(fft_size, 1 / rate)[:, None]
    edges = mel_edges(rate)
    below, centre, above = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.clip(np.minimum((hertz - below) / (centre - below), (above - hertz) / (above - centre)), 0, None)
    emphasis = (hertz / 1000) ** 2 / (1 + (hertz / 4000) ** 2)  # 6 dB an octave up to 4 kHz; 1 kHz stays as it is
    return (triangles * (0.1 + emphasis)).astype(np.float32)


class Projection:
    """Frames to queries, keys and values of a few heads, each of them a random part of what there is to hear."""

    def __init__(self, rng):
        def orthogonal():
            return np.linalg.qr(rng.standard_normal((BANDS, HEAD_DIM)))[0]

        self.w_query_key = np.concatenate([orthogonal() for _ in range(HEADS)], axis=1).astype(np.float32)
        self.w_value = np.concatenate([orthogonal() for _ in range(HEADS)], axis=1).astype(np.float32)
        # A product of two projections is HEAD_DIM / BANDS of that of the frames, more or less.
        self.scale = SHARPNESS * BANDS / HEAD_DIM

    def __call__(self, frames):
        """Return queries, which are the keys too, and values: (HEADS, n, HEAD_DIM) each."""
        # The shape of the spectrum, without its loudness: rows of length 1, so that products are correlations. What
        # is flatter than 3 dB is noise or silence; it stays short and does not look at anything in particular.
        shape = frames - frames.mean(axis=-1, keepdims=True)
        shape /= np.sqrt((shape**2).sum(axis=-1, keepdims=True) + np.float32(BANDS * 3**2))
        # And here too, a product for each frame.
        return [
            (shape[:, None] @ w).reshape(-1, HEADS, HEAD_DIM).swapaxes(0, 1) for w in (self.w_query_key, self.w_value)
        ]


# -------------------------------------------------------------------------------------- streaming, offline


def stream(source, options, project, attention, file, progress):
    """Listen, attend, and write the results (frames, HEADS, HEAD_DIM) to a file; return what there is to say."""
    num_samples = round(options.seconds * source.rate)
    report = Report(-(-1000 * num_samples // (options.push * source.rate)))
    features = LogMel(source.rate)

    def write(rows):
        report.num_frames += rows.shape[-2]
        file.write(np.ascontiguousarray(rows.swapaxes(0, 1)))

    for samples in pushes(source, options.seconds, options.push):
        start = time.perf_counter()
        frames = features.push(samples)
        query_key, value = project(frames)
        between = time.perf_counter()
        rows = attention.push(query_key, query_key, value)
        end = time.perf_counter()
        write(rows)
        report.push(between - start, end - between)
        progress(len(frames))
    write(attention.flush())
    return report


class Report:
    """What was measured while the sound came in: itself in memory that does not grow."""

    def __init__(self, num_pushes):
        self.seconds = np.full((num_pushes, 2), np.nan)  # of computing features, attention
        self.num_pushes = self.num_frames = 0
        self.first_memory = self.most_memory = 0

    def push(self, features, attention):
        self.seconds[self.num_pushes] = features, attention
        self.num_pushes += 1
        memory = memory_in_use()
        if memory is not None:
            if self.num_pushes <= 1 + len(self.seconds) // 20:
                self.first_memory = max(self.first_memory, memory)
            self.most_memory = max(self.most_memory, memory)

    def describe(self, options):
        (_, attention), both = self.seconds.sum(axis=0), self.seconds.sum(axis=1)
        memory = "not known on this system"
        if self.first_memory:
            more = (self.most_memory - self.first_memory) / 2**20
            memory = f"{self.first_memory / 2**20:.1f} MiB in use at the beginning, at most {more:.1f} MiB more later"
        latency = f"{FRAME_MS * options.right} ms of look-ahead and up to {options.push} ms until a push is full"
        lines = {
            "heard": f"{options.seconds:,.0f} s, {self.num_frames:,} frames, {len(both):,} pushes of {options.push} ms",
            "latency": f"{latency},",
            "": f"then {1e3 * np.median(both):.2f} ms of computing (median; {1e3 * both.max():.2f} ms at worst)",
            "memory": memory,
            "speed": f"attention {options.seconds / attention:,.0f} times as fast as the sound, "
            f"features and attention {options.seconds / both.sum():,.0f} times",
        }
        return "\n".join(f"  {name:8} {text}" for name, text in lines.items())


def memory_in_use():
    """Return the bytes of memory that this process has in use, or None where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * 4096
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
    return None


def compare_offline(source, options, project, truncated_attention, window, results, progress):
    """Compute everything once more, all frames at once; return what to say of it, and whether the bits agree."""
    streamed = np.memmap(results, np.float32, mode="r").reshape(-1, HEADS, HEAD_DIM)
    query_key, value = np.zeros((2, HEADS, len(streamed), HEAD_DIM), np.float32)
    features = LogMel(source.rate)
    for samples in pushes(source, options.seconds, 1000):  # cut in another way, on purpose
        frames = features.push(samples)
        here = slice(features.frame - len(frames), features.frame)
        query_key[:, here], value[:, here] = project(frames)
        progress(len(frames))
    elapsed, differ, largest = 0.0, 0, 0.0
    for head in range(HEADS):  # to hold the results of one head only
        start = time.perf_counter()
        out = truncated_attention(query_key[head], query_key[head], value[head], query_offset=0, **window)
        elapsed += time.perf_counter() - start
        differ += np.count_nonzero(out.view(np.uint32) != streamed[:, head].view(np.uint32))
        largest = max(largest, np.abs(out - streamed[:, head]).max())
    verdict = f"  offline  the whole in one call a head: {elapsed:.2g} s of attention;"
    if differ:
        verdict += f" {differ:,} of {streamed.size:,} numbers are not those streamed, but up to {largest:.2g} away"
    else:
        verdict += f" largest difference {largest:.2g},\n           equal bits in all {streamed.size:,} numbers"
    return verdict, not differ


# ---------------------------------------------------------------------------------------------- the picture


def look(source, options, project, truncated_attention, window):
    """Return the first seconds of sound in mel bands, and where each of their frames looked.

    Returns: the number of the first frame shown; the frames (n, BANDS); their weights (left + right + 1, n), mean of
    the heads, first row the frame furthest in the past; left; the frequencies of the bands.
    """
    seconds = min(options.seconds, SHOWN_SECONDS + (options.left + options.right + 5) / FRAMES_PER_SECOND)
    features = LogMel(source.rate)
    frames = np.concatenate([features.push(samples) for samples in pushes(source, seconds, 1000)])
    query_key, value = project(frames)
    _, weights = truncated_attention(query_key, query_key, value, query_offset=0, return_weights="band", **window)
    # Preferably where the window is full of frames, on both sides.
    first = options.left if len(frames) >= options.left + options.right + 50 else 0
    last = max(first + 1, min(len(frames) - (options.right if first else 0), first + SHOWN_SECONDS * FRAMES_PER_SECOND))
    return first, frames[first:last], weights.mean(axis=0)[first:last].T, options.left, mel_edges(source.rate)[1:-1]


def describe(first, frames, weights, left, hertz):
    """Return the loudness of the frames and their weights as text: across, the time; down, how far away they looked."""
    columns = np.array_split(np.arange(len(frames)), min(100, len(frames)))
    rows = np.array_split(np.arange(len(weights))[::-1], min(12, len(weights)))
    loudness = np.array([frames[column].mean() for column in columns])
    loudness = (loudness - loudness.min()) / max(np.ptp(loudness), 1e-9)
    # The sum of the weights of some 100 ms.
    shares = np.array([[weights[row][:, column].sum(axis=0).mean() for column in columns] for row in rows])

    def shade(numbers):
        return "".join(" .:-=+*#%@"[min(int(10 * number), 9)] for number in numbers)

    lines = [
        f"\nWhere each frame looked, from {first * FRAME_MS / 1000:.1f} s to "
        f"{(first + len(frames)) * FRAME_MS / 1000:.1f} s. Down: how far away, in ms; the darker, the more.\n",
        f"{'loudness':>14}  {shade(loudness)}",
    ]
    for row, share in zip(rows, shares, strict=True):
        span = f"{(row[-1] - left) * FRAME_MS:+d} to {(row[0] - left) * FRAME_MS:+d}"
        lines.append(f"{span:>14}  {shade(share / shares.max())}")
    return "\n".join(lines)


TITLE = "Where frames of speech look"
CAPTION = (
    "Above: what is heard, in mel bands. Below: a column is the attention of the frame above it, and sums to 1. Its "
    "own place is at 0 ms; what came before it lies below, the look-ahead above. What was heard moves into the past "
    "as time goes on: a sound that the frames after it look at draws a stripe down to the right. Silence "
    "looks everywhere alike. Mean of {heads} heads."
)


def draw(first, frames, weights, left, hertz, path):
    """Draw the mel bands and, below them on the same time axis, the band of weights."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 8), dpi=150)
    begin, end = first * FRAME_MS / 1000, (first + len(frames)) * FRAME_MS / 1000
    reach = ((-left - 0.5) * FRAME_MS, (len(weights) - left - 0.5) * FRAME_MS)
    panels = []
    for bottom, height, colour_label in ((0.655, 0.26, "dB"), (0.185, 0.435, "share of the attention")):
        axes = figure.add_axes((0.085, bottom, 0.81, height))
        panels.append((axes, figure.add_axes((0.91, bottom, 0.014, height)), colour_label))

    images = [
        panels[0][0].imshow(
            frames.T, origin="lower", aspect="auto", cmap="magma", extent=(begin, end, -0.5, BANDS - 0.5)
        ),
        panels[1][0].imshow(
            weights,
            origin="lower",
            aspect="auto",
            cmap="magma",
            norm=PowerNorm(0.5, 0, np.quantile(weights, 0.998)),
            extent=(begin, end, *reach),
        ),
    ]
    for (axes, bar_axes, label), image in zip(panels, images, strict=True):
        bar = figure.colorbar(image, cax=bar_axes, extend="neither" if label == "dB" else "max")
        bar.set_label(label)
        bar.outline.set_edgecolor("0.6")
        axes.spines[:].set_color("0.6")
    heard, looked = panels[0][0], panels[1][0]
    marks = [mark for mark in (100, 250, 500, 1000, 2000, 4000, 8000) if mark < 1.1 * hertz[-1]]
    heard.set_yticks(np.interp(marks, hertz, np.arange(BANDS)), [f"{mark:,}" for mark in marks])
    heard.set_ylabel("frequency (Hz)")
    heard.tick_params(labelbottom=False)
    looked.axhline(0, color="white", linewidth=0.6, alpha=0.5)
    looked.set_ylabel("looked at, relative to now (ms)")
    looked.set_xlabel("time (s)")
    figure.text(0.085, 0.945, TITLE, fontsize=15, fontweight="bold")
    caption = textwrap.fill(CAPTION.format(heads=HEADS), 138)
    figure.text(0.085, 0.03, caption, fontsize=9.5, color="0.25", linespacing=1.5)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
