"""A small Long Range Arena for CPUs: time, memory and error of efficient variants beside full attention, by length.

    python benchmarks/variants.py                                         lengths 256 to 16384, some minutes
    python benchmarks/variants.py --quick                                 to 4096, less than a minute
    python benchmarks/variants.py --markdown tables.md --plot variants.png

It prints tables, and the length from which each form is faster than full attention. The forms are those of the course's
page on them (docs/course/16-cheaper-than-all-pairs.md), for several heads; whatever a model would learn or draw once,
such as a pattern or random directions, is made beforehand. Errors are measured on three inputs, since none of the forms
suits all: with the weight on what is nearby, on few alike keys anywhere, and on everything. The mean of all values has
an error of 1.

With tqdm there is a progress bar. Memory is measured in new processes, on Linux only.
"""

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import fastattn
from measure import Candidate, interleave

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK = (256, 1024, 4096)
HEADS, D = 4, 64
INPUTS = ("nearby", "kind", "everywhere")
FULL = "full attention"
NUMPY = "its formula in NumPy"
NUMPY_LONGEST = 4096  # its scores take 256 MiB there

SEEN = 256  # keys that a query sees in a window and in chunks, and to which Linformer projects
BLOCK = 64
FEATURES = 256  # of Performer
POOL = 4  # keys in one


def scaled(x, length):
    return x / np.linalg.norm(x, axis=-1, keepdims=True) * length


def make_input(name, length, rng):
    """Vectors (HEADS, length, D) that are queries and keys, as Reformer shares them."""
    if name == "nearby":  # sums over the last 40 steps: neighbours are alike
        walk = np.cumsum(rng.standard_normal((HEADS, length + 40, D)), axis=1)
        x = scaled(walk[:, 40:] - walk[:, :-40], 9)
    elif name == "kind":  # topics of 8 vectors each, anywhere
        topics = scaled(rng.standard_normal((length // 8, D)), 1)[rng.integers(length // 8, size=(HEADS, length))]
        x = scaled(topics + 0.005 * rng.standard_normal((HEADS, length, D)), 8)
    else:  # three directions, small scores
        x = scaled(rng.standard_normal((HEADS, length, 3)) @ rng.standard_normal((3, D)), 4)
    return x.astype(np.float32)


# Each of these makes what the form needs for a length, and returns a function of (x, value).


def full(length, rng):
    return lambda x, value: fastattn.dot_product_attention(x, x, value)


def formula(length, rng):
    def attend(x, value):
        weights = x @ x.swapaxes(-1, -2)
        weights /= np.float32(np.sqrt(D))
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights @ value

    return attend


def window(length, rng):
    sizes = SEEN // 2, SEEN // 2 - 1
    return lambda x, value: fastattn.dot_product_attention(x, x, value, window_size=sizes)


def bigbird(length, rng):
    n = -(-length // BLOCK)
    i, j = np.arange(n)[:, None], np.arange(n)
    pattern = (abs(i - j) <= 1) | np.isin(i, (0, n - 1)) | np.isin(j, (0, n - 1))
    for row in pattern:
        row[rng.choice(n, min(3, n), replace=False)] = True
    return lambda x, value: fastattn.dot_product_attention(x, x, value, block_mask=pattern, block_size=BLOCK)


def linear(length, rng):
    return lambda x, value: fastattn.linear_attention(x, x, value)


def performer(length, rng):
    blocks = [np.linalg.qr(rng.standard_normal((D, D)))[0] for _ in range(-(-FEATURES // D))]
    directions = np.concatenate(blocks)[:FEATURES]
    directions *= np.linalg.norm(rng.standard_normal((FEATURES, D)), axis=1)[:, None]
    directions = np.float32(directions / D**0.25)

    def powers(x, axis):
        logs = x @ directions.T
        logs -= (x**2).sum(axis=-1, keepdims=True) / np.float32(2 * np.sqrt(D))
        logs -= logs.max(axis=axis, keepdims=True)
        return np.exp(logs, out=logs)

    maps = (lambda x: powers(x, -1)), (lambda x: powers(x, (-2, -1)))
    return lambda x, value: fastattn.linear_attention(x, x, value, feature_map=maps, eps=1e-30)


def linformer(length, rng):
    mix = rng.exponential(size=(min(SEEN, length), length)).astype(np.float32)
    mix /= mix.sum(axis=1, keepdims=True)
    return lambda x, value: fastattn.dot_product_attention(x, mix @ x, mix @ value)


def reformer(length, rng):
    hashes = max(2, 4 * length // SEEN)  # as in the paper, a chunk is twice as long as the vectors of a hash
    directions = rng.standard_normal((D, hashes // 2), dtype=np.float32)

    def attend(x, value):
        turned = x @ directions
        best = np.abs(turned).argmax(axis=-1)
        negative = np.take_along_axis(turned, best[..., None], axis=-1)[..., 0] < 0
        order = (2 * best + negative).argsort(axis=-1, kind="stable")[..., None]
        alike, theirs = (np.take_along_axis(a, order, axis=-2) for a in (x, value))
        found = fastattn.dot_product_attention(alike, alike, theirs, chunk_size=SEEN // 2, left_chunks=1)
        out = np.empty_like(found)
        np.put_along_axis(out, order, found, axis=-2)
        return out

    return attend


def pooled(length, rng):
    def mean(x):
        return x.reshape(*x.shape[:-2], length // POOL, POOL, D).mean(axis=-2)

    return lambda x, value: fastattn.dot_product_attention(x, mean(x), mean(value))


FORMS = {
    FULL: full,
    NUMPY: formula,
    f"window of {SEEN}": window,
    f"BigBird, blocks of {BLOCK}": bigbird,
    "linear attention": linear,
    f"Performer, {FEATURES} features": performer,
    f"Linformer, {SEEN} keys": linformer,
    f"Reformer, chunks of {SEEN // 2}": reformer,
    f"pooled by {POOL}": pooled,
}


def forms_for(length):
    return [name for name in FORMS if name != NUMPY or length <= NUMPY_LONGEST]


# --------------------------------------------------------------------------------------------------- measuring


def resident(field):
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def print_memory(name, length):
    """In a process of its own: print the bytes by which one call raises its memory, besides the result."""
    rng = np.random.default_rng(0)
    attend = FORMS[name](length, rng)
    small = make_input("everywhere", 256, rng)
    FORMS[name](256, rng)(small, small)  # libraries loaded, threads started
    x = make_input("everywhere", length, rng)
    value = rng.standard_normal((HEADS, length, D), dtype=np.float32)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    out = attend(x, value)
    print(max(0, resident("VmHWM") - before - out.nbytes))


def measure_memory(name, length, threads):
    """Bytes, or None where they cannot be measured."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", name, str(length)]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # what is freed is given back, and seen when used anew
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return int(run.stdout) if run.returncode == 0 else None


def measure_errors(attend, exact, value):
    """Against full attention on each input, in parts of the error of the mean of all values."""
    mean = value.mean(axis=-2, keepdims=True)
    return {
        name: np.linalg.norm(attend(x, value) - out) / np.linalg.norm(out - mean) for name, (x, out) in exact.items()
    }


def measure(lengths, rounds, threads, progress):
    """{(form, length): (seconds, bytes or None, {input: error})}"""
    results = {}
    for length in lengths:
        rng = np.random.default_rng(length)
        attend = {name: FORMS[name](length, rng) for name in forms_for(length)}
        value = rng.standard_normal((HEADS, length, D), dtype=np.float32)
        inputs = {name: make_input(name, length, rng) for name in INPUTS}
        exact = {name: (x, attend[FULL](x, value)) for name, x in inputs.items()}
        errors = {}
        for name in attend:
            errors[name] = measure_errors(attend[name], exact, value)
            progress()
        x = inputs["everywhere"]
        candidates = [Candidate(name, functools.partial(call, x, value)) for name, call in attend.items()]
        seconds = interleave(candidates, rounds, progress)
        for name in attend:
            memory = measure_memory(name, length, threads)
            progress()
            results[name, length] = np.median(seconds[name]), memory, errors[name]
    return results


def wins_from(results, name):
    """The shortest measured length from which on the form takes at most 0.95 of full attention's time, or None."""
    lengths = sorted(length for form, length in results if form == name)
    faster = [results[name, length][0] < 0.95 * results[FULL, length][0] for length in lengths]
    since = next((i for i in range(len(lengths)) if all(faster[i:])), None)
    return None if since is None else lengths[since]


# --------------------------------------------------------------------------------------------------- reporting


def number(x):
    """Three digits."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def report(results, lengths):
    """The tables in Markdown."""
    heads = [str(length) for length in lengths]
    names = [name for name in FORMS if any((name, length) in results for length in lengths)]

    def cell(name, length, show):
        return show(results[name, length]) if (name, length) in results else "-"

    lines = [row("milliseconds", *heads, "faster than full attention"), "|---|" + "---:|" * len(heads) + "---|"]
    for name in names:
        since = wins_from(results, name)
        when = "" if name == FULL else "at none of these lengths" if since is None else f"from {since} on"
        lines.append(row(name, *(cell(name, n, lambda result: number(1000 * result[0])) for n in lengths), when))
    lines += ["", row("MiB besides the result", *heads), "|---|" + "---:|" * len(heads)]
    for name in names:

        def mebibytes(result):
            return "?" if result[1] is None else f"{result[1] / 2**20:.1f}"

        lines.append(row(name, *(cell(name, n, mebibytes) for n in lengths)))
    ends = sorted({lengths[0], lengths[-1]})
    lines += ["", row("error", *(f"{name}, {n}" for n in ends for name in INPUTS)), "|---|" + "---:|" * 3 * len(ends)]
    for name in names:
        if name not in (FULL, NUMPY):
            lines.append(row(name, *(f"{results[name, n][2][kind]:.2f}" for n in ends for kind in INPUTS)))
    return "\n".join(lines) + "\n"


def plot(results, lengths, path):
    """Time and memory against the length, and the errors at the longest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    time, memory, error = figure.subplots(1, 3)
    names = [name for name in FORMS if (name, lengths[0]) in results]
    for index, name in enumerate(names):
        style = {"color": "black", "linewidth": 2.5} if name == FULL else {"color": f"C{index}"}
        style |= {"linestyle": "--"} if name == NUMPY else {}
        ns = [n for n in lengths if (name, n) in results]
        time.plot(ns, [1000 * results[name, n][0] for n in ns], marker="o", markersize=4, label=name, **style)
        known = [n for n in ns if results[name, n][1] is not None]
        # below 0.05 MiB it is the granularity of the measure
        memory.plot(known, [max(results[name, n][1] / 2**20, 0.05) for n in known], marker="o", markersize=4, **style)
        if name not in (FULL, NUMPY):
            marks = [results[name, lengths[-1]][2][kind] for kind in INPUTS]
            error.plot(np.arange(3) + (index - 5) / 16, marks, "o", color=style["color"], markersize=7, alpha=0.8)
    for axes, title in (time, "milliseconds"), (memory, "MiB besides the result"):
        axes.set(title=title, xscale="log", yscale="log", xlabel="length")
        axes.set_xticks(lengths, lengths)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    error.axhline(1, color="0.6", linewidth=1, linestyle="--")
    error.text(2.4, 1.03, "the mean of all values", ha="right", va="bottom", fontsize=8, color="0.4")
    error.set(title=f"error at {lengths[-1]}", yscale="symlog", ylim=(-0.05, None), xlim=(-0.4, 2.4))
    error.set_xticks(range(3), ["weight\nnearby", "on alike\nkeys", "everywhere"])
    error.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=100)


class Bar:
    """A tqdm bar if there is one; call it for each step."""

    def __init__(self, steps):
        self.bar = None
        if importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=steps, unit="step", leave=False)

    def __call__(self):
        if self.bar:
            self.bar.update()

    def close(self):
        if self.bar:
            self.bar.close()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"lengths to {QUICK[-1]}, one round")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="L", help=f"multiples of {POOL}")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    lengths = sorted(options.lengths or (QUICK if options.quick else LENGTHS))
    rounds = options.rounds or (1 if options.quick else 5)
    if any(length < POOL or length % POOL for length in lengths):
        parser.error(f"--lengths must be multiples of {POOL}, not {lengths}")
    with threadpool_limits(options.threads):
        fastattn.set_num_threads(options.threads)
        if options.memory_of:
            print_memory(options.memory_of[0], int(options.memory_of[1]))
            return
        progress = Bar(sum(2 * len(forms_for(length)) + rounds for length in lengths))
        try:
            results = measure(lengths, rounds, options.threads, progress)
        finally:
            progress.close()
    tables = report(results, lengths)
    print(f"{HEADS} heads of {D}, float32, {options.threads} thread(s)\n\n{tables}", end="")
    if options.markdown:
        options.markdown.write_text(tables, encoding="utf-8")
    if options.plot:
        plot(results, lengths, options.plot)


if __name__ == "__main__":
    main()
