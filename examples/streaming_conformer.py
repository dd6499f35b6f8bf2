"""Encode speech with a conformer while it is being spoken, and say how late it is and what each push costs.

    python examples/streaming_conformer.py talk.wav --frame 40

reads a recording as if it arrived live, cuts it into frames of 40 ms (or 10) and pushes each through a stack of
conformer blocks: half a feed-forward step, attention with relative positions, a depthwise convolution, another half
step. Attention sees some seconds before a frame and one frame after it, so a block is a frame late, and the stack as
many frames as it has blocks. The script adds that up before it begins, checks it against what came out, and measures
the computing of each push. Then it runs the same blocks on all frames at once and compares.

Positions are those of Transformer-XL [1], as in most conformers: a score is a product of query and key, and one of
query and the embedding of their distance, each with a bias of its own. `fastattn.StreamingMultiHeadAttention` has the
first product, and takes the second as `relative_bias`, a row for each query.

Nothing is learned here: weights are random, of the size that training begins with. Without a recording, espeak-ng
speaks one if it is installed; if not, the script babbles.

[1] Z. Dai et al., "Transformer-XL", 2019, section 3.3; A. Gulati et al., "Conformer", 2020, section 2.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from streaming_speech import BANDS, FLOOR_DB, FRAME_MS, WINDOW_MS, LogMel, SoundError, find_source, pushes

# fastattn is imported in main(), once the arguments are known to be good: then a person who lacks it reads how to get
# it.

INSTALL = "pip install ."

CHANNELS, HEADS = 144, 4
WIDER = 4  # how many times CHANNELS the hidden layer of a feed-forward step has
MANY = 9  # rows of a product; of fewer, other loops multiply


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        import fastattn
    except ModuleNotFoundError as error:
        message = (
            f"error: the package {error.name} is not installed. In the folder with its README, run\n\n    {INSTALL}"
        )
        print(message, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = find_source(options, Path(folder))
        except SoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(source.description, flush=True)
        model = Conformer(options, fastattn)
        print(model.describe(), flush=True)
        stream = ConformerStream(model, fastattn)
        rows, report = listen(source, options, stream)
        print(report.describe(options, stream), flush=True)
        verdict, same = compare_offline(source, options, model, rows)
    print(verdict)
    return 0 if same and report.latency <= stream.latency else 1


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def at_least(least, kind=int):
        def number(text):
            value = kind(text)
            if not least <= value < math.inf:
                raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
            return value

        return number

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("recording", nargs="?", type=Path, metavar="FILE.wav", help="a WAV file; default: one that is spoken here")
    add("--seconds", type=at_least(1, float), default=60.0, metavar="S", help="how long to listen (default 60)")
    add("--frame", type=int, choices=(10, 40), default=40, help="milliseconds of a frame of the model (default 40)")
    add("--push", type=at_least(1), default=None, metavar="MS", help="milliseconds of sound a push (default: a frame)")
    add("--blocks", type=at_least(1), default=8, metavar="N", help="blocks of the stack (default 8)")
    add("--left", type=at_least(0), default=64, metavar="N", help="frames that attention sees before (default 64)")
    add("--right", type=at_least(0), default=1, metavar="N", help="frames it sees after, in each block (default 1)")
    add("--kernel", type=at_least(1), default=15, metavar="N", help="frames of a convolution (default 15)")
    add(
        "--kernel-right",
        type=at_least(0),
        default=0,
        metavar="N",
        help="how many of them come after the frame itself (default 0: a causal convolution)",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="start of all that is random (default 0)")
    add("--threads", type=at_least(1), default=1, metavar="N", help="threads of the attention (default 1)")
    options = parser.parse_args(arguments)
    if options.kernel_right >= options.kernel:
        parser.error(f"--kernel-right must be less than --kernel, {options.kernel}, not {options.kernel_right}")
    if options.push is None:
        options.push = options.frame
    return options


# ----------------------------------------------------------------------------------- what is done row by row


def product(x, linear, activation=None):
    """Return linear(x), whose rows have the bits of a product of all frames at once: loops of their own would multiply
    up to 8 rows, and round in another way, so zeros stand in for missing ones."""
    if len(x) >= MANY:
        return linear(x, activation=activation)
    more = np.zeros((MANY - len(x), x.shape[1]), x.dtype)
    return linear(np.concatenate([x, more]), activation=activation)[: len(x)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------------------------------------- the model


class Frames:
    """Mel bands in, frames of the model out: as many spectra side by side as a frame has, each band about one."""

    def __init__(self, rate, milliseconds):
        self.features, self.side_by_side = LogMel(rate), milliseconds // FRAME_MS
        self.kept = np.zeros((0, BANDS), np.float32)

    def push(self, samples):
        bands = np.concatenate([self.kept, self.features.push(samples)])
        whole = len(bands) // self.side_by_side * self.side_by_side
        self.kept = bands[whole:]
        frames = bands[:whole].reshape(-1, self.side_by_side * BANDS)
        return (frames - np.float32(FLOOR_DB / 2)) / np.float32(abs(FLOOR_DB) / 4)


class Conformer:
    """The weights, and the run over all frames at once."""

    def __init__(self, options, fastattn):
        rng = np.random.default_rng(options.seed)
        self.left, self.right, self.threads = options.left, options.right, options.threads
        self.w_in = fastattn.Linear(matrix(rng, options.frame // FRAME_MS * BANDS, CHANNELS))
        self.blocks = [Block(rng, options, fastattn) for _ in range(options.blocks)]

    def __call__(self, frames):
        """Return the rows (n, CHANNELS) for frames that are all there."""
        x = product(frames, self.w_in)
        for block in self.blocks:
            x = block(x)
        return x

    def describe(self):
        count = self.w_in.weight.size + sum(block.size() for block in self.blocks)
        return f"A conformer of {len(self.blocks)} blocks, {CHANNELS} channels and {HEADS} heads: {count:,} weights"


class Block:
    """Half a feed-forward step, attention, a convolution, the other half, and a norm."""

    def __init__(self, rng, options, fastattn):
        self.left, self.right, self.threads = options.left, options.right, options.threads
        self.layer_norm = fastattn.layer_norm
        # Two for feed-forward steps, one for attention, two around the convolution, and the last.
        self.norms = [(noisy(rng, 1), noisy(rng, 0)) for _ in range(6)]
        hidden = WIDER * CHANNELS
        shapes = (CHANNELS, hidden), (hidden, CHANNELS)
        self.steps = [[fastattn.Linear(matrix(rng, *shape)) for shape in shapes] for _ in range(2)]
        self.gates = fastattn.Linear(matrix(rng, CHANNELS, 2 * CHANNELS))
        self.mixture = fastattn.Linear(matrix(rng, CHANNELS, CHANNELS))
        self.kernel = (rng.standard_normal((options.kernel, CHANNELS)) / math.sqrt(options.kernel)).astype(np.float32)
        self.kernel_right = options.kernel_right

        head_dim = CHANNELS // HEADS
        w_query, w_key, w_value, w_out = (matrix(rng, CHANNELS, CHANNELS) for _ in range(4))
        b_query, of_contents, of_positions = (noisy(rng, 0) for _ in range(3))  # the last two are u and v of the paper
        # u is added to each query where it meets a key: it is a part of the bias.
        self.attention = fastattn.MultiHeadAttention(
            w_query, w_key, w_value, w_out, num_heads=HEADS, b_query=b_query + of_contents
        )
        # The embeddings r of distances: of the first key of the window, `left` frames before the query, to the last.
        width = options.left + options.right + 1
        distances = fastattn.sinusoidal_encoding(width, CHANNELS, offset=-options.right)[::-1]
        self.embeddings = (distances @ matrix(rng, CHANNELS, CHANNELS)).reshape(width, HEADS, head_dim)
        # (x w_query + b_query + v) r is a product of x with another matrix: those of weights are multiplied once, here.
        scale = 1 / math.sqrt(head_dim)
        by_head = w_query.reshape(CHANNELS, HEADS, head_dim)
        w_positions = np.einsum("mhd,whd->mhw", by_head, scale * self.embeddings).reshape(CHANNELS, -1)
        bias = (b_query + of_positions).reshape(HEADS, head_dim)
        b_positions = np.einsum("hd,whd->hw", bias, scale * self.embeddings).ravel()
        self.of_distances = fastattn.Linear(w_positions.astype(np.float32), b_positions.astype(np.float32))
        self.of_positions, self.b_query = of_positions, b_query

    def size(self):
        products = (self.gates, self.mixture, self.of_distances, *self.steps[0], *self.steps[1])
        arrays = [self.kernel, self.of_distances.bias, *(linear.weight for linear in products)]
        arrays += [a for pair in self.norms for a in pair]
        return sum(a.size for a in (*arrays, *self.attention.parameters().values()))

    def norm(self, which, x):
        return self.layer_norm(x, *self.norms[which])

    def __call__(self, x):
        """Return the rows for frames that are all there."""
        x = self.half_step(0, x)
        asked = self.norm(1, x)
        x = x + self.attention(
            asked,
            window_size=(self.left, self.right),
            relative_bias=self.positions(asked),
            num_threads=self.threads,
        )
        x = x + self.mixed(convolution(self.gated(x), self.kernel, self.kernel_right))
        return self.last(x)

    def half_step(self, which, x):
        w_in, w_out = self.steps[which]
        hidden = product(self.norm(4 * which, x), w_in, activation="silu")
        return x + product(hidden, w_out) / 2

    def positions(self, x):
        """Return what is added to the scores, (HEADS, n, left + right + 1)."""
        rows = product(x, self.of_distances)
        return rows.reshape(len(x), HEADS, self.left + self.right + 1).swapaxes(0, 1)

    def gated(self, x):
        x = product(self.norm(2, x), self.gates)
        return x[:, :CHANNELS] * sigmoid(x[:, CHANNELS:])

    def mixed(self, x):
        x = self.norm(3, x)
        return product(x * sigmoid(x), self.mixture)

    def last(self, x):
        return self.norm(5, self.half_step(1, x))


def matrix(rng, rows, columns):
    return (rng.standard_normal((rows, columns)) / math.sqrt(rows)).astype(np.float32)


def noisy(rng, middle):
    return (middle + 0.1 * rng.standard_normal(CHANNELS)).astype(np.float32)


def convolution(x, kernel, right):
    """Return each channel of x (n, channels) convolved with its own column of the kernel, of whose rows `right` come
    after the frame; zeros stand before the first frame and after the last."""
    zeros = np.zeros((len(kernel) - 1, x.shape[1]), np.float32)
    return within(np.concatenate([zeros[right:], x, zeros[:right]]), kernel)


def within(x, kernel):
    """Return the convolution where all of the kernel lies within x: len(kernel) - 1 rows fewer than x has."""
    rows = max(len(x) - len(kernel) + 1, 0)
    total = kernel[0] * x[:rows]
    for k in range(1, len(kernel)):
        total += kernel[k] * x[k : k + rows]
    return total


# ------------------------------------------------------------------------------------------------- the stream


class Waiting:
    """Rows that stand by until what is to be added to them is there."""

    def __init__(self):
        self.rows = np.zeros((0, CHANNELS), np.float32)

    def exchange(self, new, count):
        """Take new rows in, and give the first `count` out."""
        rows = np.concatenate([self.rows, new])
        self.rows = rows[count:].copy()
        return rows[:count]


class ConvolutionStream:
    """`convolution`, of frames as they come."""

    def __init__(self, kernel, right):
        self.kernel, self.latency = kernel, right
        self.kept = np.zeros((len(kernel) - 1 - right, CHANNELS), np.float32)

    def push(self, x, last):
        parts = [self.kept, x]
        if last:
            parts.append(np.zeros((self.latency, CHANNELS), np.float32))
        x = np.concatenate(parts)
        rows = within(x, self.kernel)
        self.kept = x[len(rows) :].copy()
        return rows


class BlockStream:
    """A `Block`, of frames as they come."""

    def __init__(self, block, fastattn):
        self.block = block
        self.attention = fastattn.StreamingMultiHeadAttention(
            block.attention, block.left, block.right, num_threads=block.threads
        )
        self.convolution = ConvolutionStream(block.kernel, block.kernel_right)
        self.before_attention, self.before_convolution = Waiting(), Waiting()
        self.latency = self.attention.latency + self.convolution.latency

    def push(self, x, last):
        """Take in the next frames, which are the last ones or not; return the rows that are complete."""
        block = self.block
        x = block.half_step(0, x)
        asked = block.norm(1, x)
        rows = self.attention.push(asked, block.positions(asked))
        if last:
            rows = np.concatenate([rows, self.attention.flush()])
        x = self.before_attention.exchange(x, len(rows)) + rows
        rows = self.convolution.push(block.gated(x), last)
        x = self.before_convolution.exchange(x, len(rows)) + block.mixed(rows)
        return block.last(x)


class ConformerStream:
    """A `Conformer`, of frames as they come."""

    def __init__(self, model, fastattn):
        self.w_in = model.w_in
        self.blocks = [BlockStream(block, fastattn) for block in model.blocks]
        # A block waits for the one below, so what they look ahead adds up.
        self.latency = sum(block.latency for block in self.blocks)

    def push(self, frames, last=False):
        x = product(frames, self.w_in)
        for block in self.blocks:
            x = block.push(x, last)
        return x

    def nbytes(self):
        """Return the bytes that the streams hold, which do not grow with time."""
        held = [block.attention.nbytes + block.convolution.kept.nbytes for block in self.blocks]
        waiting = [w.rows.nbytes for block in self.blocks for w in (block.before_attention, block.before_convolution)]
        return sum(held) + sum(waiting)


# --------------------------------------------------------------------------------------- streaming, offline


def listen(source, options, stream):
    """Push sound through the stream as it comes; return the rows, and what there is to say."""
    report, found = Report(), []
    frames, sound = Frames(source.rate, options.frame), pushes(source, options.seconds, options.push)
    for samples in sound:
        start = time.perf_counter()
        new = frames.push(samples)
        between = time.perf_counter()
        rows = stream.push(new)
        end = time.perf_counter()
        found.append(rows)
        report.push(len(new), len(rows), between - start, end - between, stream.nbytes())
    found.append(stream.push(np.zeros((0, frames.side_by_side * BANDS), np.float32), last=True))
    return np.concatenate(found), report


class Report:
    """What was measured while the sound came in."""

    def __init__(self):
        self.seconds = []  # of features and of the model, for each push that completed a frame
        self.taken_in = self.given_out = self.latency = 0
        self.held = []

    def push(self, taken_in, given_out, features, model, held):
        self.taken_in += taken_in
        self.given_out += given_out
        self.latency = max(self.latency, self.taken_in - self.given_out)
        if taken_in:
            self.seconds.append((features, model))
        self.held.append(held)

    def describe(self, options, stream):
        features, model = np.array(self.seconds or [(0, 0)]).T
        both = 1e3 * (features + model)
        block, count = stream.blocks[0], len(stream.blocks)
        looks = f"{block.attention.latency} + {block.convolution.latency}"
        first, most = max(self.held[: len(self.held) // 2 + 1]) / 2**20, max(self.held) / 2**20
        lines = {
            "heard": f"{options.seconds:,.0f} s, {self.taken_in:,} frames of {options.frame} ms, "
            f"pushes of {options.push} ms",
            "latency": f"{count} blocks x ({looks}) frames of look-ahead x {options.frame} ms = "
            f"{stream.latency * options.frame} ms: rows came {self.latency} frames late at most;",
            "": f"up to {max(options.frame, options.push)} ms until push and frame are full, whose last window ends "
            f"{WINDOW_MS - FRAME_MS} ms after it;",
            " ": f"then {np.median(both):.2f} ms of computing a push (median; {np.quantile(both, 0.99):.2f} for 99 in "
            f"100, {both.max():.2f} at worst), {1e3 * np.median(model):.2f} in the model",
            "memory": f"{first:.1f} MiB held by the streams in the first half of the time, {most:.1f} in all of it",
            "speed": f"{options.seconds / max(both.sum() / 1e3, 1e-9):,.1f} times as fast as the sound",
        }
        return "\n".join(f"  {name:8} {text}" for name, text in lines.items())


def compare_offline(source, options, model, streamed):
    """Run the model on all frames at once; return what to say of it, and whether the results are the same."""
    frames = Frames(source.rate, options.frame)
    # Cut in another way, on purpose.
    whole = np.concatenate([frames.push(samples) for samples in pushes(source, options.seconds, 1000)])
    start = time.perf_counter()
    expected = model(whole)
    elapsed = time.perf_counter() - start
    verdict = f"  offline  all {len(whole):,} frames at once: {elapsed:.2g} s;"
    if expected.shape != streamed.shape:
        return f"{verdict} {expected.shape} numbers, and {streamed.shape} streamed", False
    differ = np.count_nonzero(expected.view(np.uint32) != streamed.view(np.uint32))
    if not differ:
        return f"{verdict} equal bits in all {expected.size:,} numbers", True
    largest = np.abs(expected - streamed).max(initial=0)
    return f"{verdict} {differ:,} numbers of {expected.size:,} differ, by up to {largest:.1g}", False


if __name__ == "__main__":
    sys.exit(main())
