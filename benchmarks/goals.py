"""What fastattn sets out to reach, and whether it did.

Shares are of the hardware's limit, which for attention is the FMA peak for the operations that reach the answer;
ratios say how many times faster fastattn is. Both are medians over the rounds of one run (see measure.py).
"""

import measure
from peers import COMPILED, PEERS

# By shape and dtype, on one thread. float64, and another instruction set than the best, may lose OTHER_KIND.
SHARES = {
    "1x12x128x128x64": 0.78,
    "1x8x512x512x64": 0.86,
    "1x8x2048x2048x64": 0.90,
    "1x8x2048x2048x128": 0.93,
    "1x8x2048x2048x64-causal": 0.86,
    "1x8x2048x2048x128-causal": 0.88,
}
OTHER_KIND = 0.05
# Softmax reads and writes each number once, as a copy does, and computes an exponential in between.
SHARE_OF_COPY = 0.3

# Additive scores: of the speed at which five instructions do a vector of terms, one reciprocal for each. Sharing a
# reciprocal among several terms can pass it.
ADDITIVE_CASE = "additive-1x8x512x512x64"
ADDITIVE_SHARE = 0.8

BEST_PEER = "best peer"
BEST_COMPILED = "best compiled"
RATIOS = {BEST_PEER: 1.15, "PyTorch": 2.0}
SMALL_CALLS = {
    "attention-1x1x1x8x8": {BEST_PEER: 1.15, "PyTorch": 4.0},
    "attention-1x8x16x16x64": {BEST_PEER: 1.15, "PyTorch": 2.5, "ONNX Runtime": 1.25},
}
SOFTMAX_RATIOS = {"SciPy": 4.0, "PyTorch": 1.5}
ADDITIVE_RATIOS = {"NumPy, best": 8.0, "PyTorch": 80.0, BEST_COMPILED: 1.6}

# Of what the same threads gain in the FMA probe.
SHARE_OF_GAIN = 0.97
EXTRA_BYTES = 64 * 2**20
IMPORT_SECONDS = 0.020


def share(record):
    """The share of the limit that fastattn reached, and the goal; None where there is none."""
    if record["kind"] == "softmax":
        return measure.ratio(record["seconds"], "copy", "fastattn out="), SHARE_OF_COPY
    goal = None
    if record["kind"] == "additive":
        if record["threads"] == 1 and record["case"].endswith(ADDITIVE_CASE):
            goal = ADDITIVE_SHARE - (OTHER_KIND if record.get("isa") else 0)
        return measure.ratio(record["seconds"], "five instructions", "fastattn"), goal
    if record["threads"] == 1:
        shape = record["case"].partition("attention-")[2].removesuffix("-float64")
        goal = SHARES.get(shape)
    if goal and (record["dtype"] == "float64" or record.get("isa")):
        goal -= OTHER_KIND
    return measure.ratio(record["seconds"], "FMA peak", "fastattn"), goal


def best_peer(samples, peers=PEERS):
    """How many times faster fastattn is than the fastest peer, and which one that is; or None."""
    ratios = {name: measure.ratio(samples, name, "fastattn") for name in peers}
    return min(((ratio, name) for name, ratio in ratios.items() if ratio is not None), default=None)


def missed(record):
    """In words, the goals that a record does not reach; None if it has no goal that was measured."""
    samples, words = record["seconds"], {}
    if "fastattn" not in samples:
        return ["failed"]
    reached, goal = share(record)
    checked = bool(reached and goal)
    if checked and reached < goal:
        words["share"] = f"{reached:.0%} < {goal:.0%}"
    for name, least in _ratios(record).items():
        if name in (BEST_PEER, BEST_COMPILED):
            ratio, name = best_peer(samples, COMPILED if name == BEST_COMPILED else PEERS) or (None, name)
        else:
            ratio = measure.ratio(samples, name, "fastattn")
        if ratio:
            checked = True
            if ratio < least:
                words[name] = f"{name} {ratio:.2f}x < {least:g}x"
    return list(words.values()) if checked else None


def _ratios(record):
    if record["kind"] == "softmax":
        return SOFTMAX_RATIOS
    if record["kind"] == "additive":
        return ADDITIVE_RATIOS if record["threads"] == 1 and record["case"] == ADDITIVE_CASE else {}
    return SMALL_CALLS.get(record["case"], RATIOS)


def gains(record):
    """How many times faster all threads are than one: fastattn, and the FMA probe."""
    samples, threads = record["seconds"], record["threads"]
    pairs = ((f"{name}, 1", f"{name}, {threads}") for name in ("fastattn", "FMA peak"))
    return [measure.ratio(samples, one, all_of_them) for one, all_of_them in pairs]
