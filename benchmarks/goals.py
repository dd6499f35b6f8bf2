"""The goals of fastattn, and whether they were reached.

Shares are of the hardware's limit, which for attention is the FMA peak for the operations that affect the result;
ratios say how many times faster fastattn is. Both are medians over the rounds of one run (see measure.py).
"""

import measure
from peers import COMPILED, PEERS, PRODUCTS_AND_ATTENTION

# By shape and dtype, on one thread. float64, and instruction sets other than the best, may be lower by OTHER_KIND.
SHARES = {
    "1x12x128x128x64": 0.78,
    "1x8x512x512x64": 0.86,
    "1x8x2048x2048x64": 0.90,
    "1x8x2048x2048x128": 0.93,
    "1x8x2048x2048x64-causal": 0.86,
    "1x8x2048x2048x128-causal": 0.88,
}
OTHER_KIND = 0.05
# Of the way back alone, and of both ways relative to PyTorch, by threads; what a rule may cost.
BACK_SHARES = {
    "1x12x128x64": 0.64,
    "1x8x512x64": 0.74,
    "1x8x2048x64": 0.78,
    "1x8x2048x128": 0.78,
    "1x8x2048x64-causal": 0.72,
    "1x8x2048x128-causal": 0.72,
    "1x8x2048x64-64x64": 0.45,
    "1x8x2048x64-256x256": 0.60,
}
BACK_RATIOS = {
    "1x12x128x64": {1: 1.5, 2: 1.5},
    "1x8x512x64": {1: 1.7, 2: 1.7},
    "1x8x2048x64": {1: 1.8, 2: 1.8},
    "1x8x2048x128": {1: 1.7, 2: 1.7},
    "1x1x2048x64": {1: 1.7, 2: 2.2},
    "1x8x2048x64-causal": {1: 2.2, 2: 2.2},
    "1x8x2048x64-64x64": {1: 10.0, 2: 10.0},
    "1x8x2048x64-256x256": {1: 4.0, 2: 4.0},
}
PLAIN_TIMES = {"bias": 1.35, "grouped": 1 / 0.95}
# Softmax reads and writes each element once, as a copy does, and computes an exponential in between.
SHARE_OF_COPY = 0.3

# Additive scores: of the speed of five instructions per vector of terms, including one reciprocal. Sharing a reciprocal
# among several terms can exceed it.
ADDITIVE_CASE = "additive-1x8x512x512x64"
ADDITIVE_SHARE = 0.8
ADDITIVE_BACK_CASE = "additiveback-1x8x512x512x64"

# Windows: of the FMA peak, counting useful operations, at the widest; and the most that a row at the longest length may
# cost relative to the shortest.
WINDOW_SHARES = {"256x256": 0.70}
FLATNESS = 1.25
WINDOW_RATIOS = {"truncated-1x1x4096x64-64x64": {"NumPy, best band": 2.5, "PyTorch, masked": 15.0}}

# One query over a cache: of the speed at which the bytes of key and value can be read.
DECODE_SHARE = 0.85

# The same with fewer bits, relative to one's own float32 where that waits for memory: by instruction set and storage,
# for one row a key head and for the four that share one; and with many queries, where arithmetic decides.
STORED_RATIOS = {
    "avx512": {"float16": (1.9, 1.9, 0.95), "bfloat16": (1.9, 1.9, 0.95), "int8": (3.2, 3.2, 0.95)},
    "avx2": {"float16": (1.8, 1.4, 0.93), "bfloat16": (1.6, 1.4, 0.93), "int8": (2.5, 2.2, 0.9)},
    "neon": {"float16": (1.9, 1.9, 0.95), "bfloat16": (1.9, 1.9, 0.95), "int8": (2.5, 2.5, 0.95)},
    "baseline": {"float16": (1.0, 1.0, 0.85), "bfloat16": (1.6, 1.6, 0.85), "int8": (2.0, 2.0, 0.85)},
}
STORED_PEERS = {
    "float16": {"PyTorch": 3.0, "ONNX Runtime": 2.0},
    "bfloat16": {"PyTorch": 3.0},
    "int8": {"ONNX Runtime": 2.5},
}
# With two threads memory is the limit for both.
STORED_INT8_THREADS = 2.0
PAIRS_SHARES = {"64": 0.75, "128": 0.80}

# Along the edges of a graph: of the speed at which the rows of key and value that they name are read.
GRAPH_SHARES = {"dot": 0.5, "gat": 0.4}
GRAPH_RATIOS = {
    "graph-arxiv-dot": {"PyTorch Geometric": 6.0, "SciPy": 1.8, "PyTorch, sparse": 1.5},
    "graph-arxiv-gat": {"PyTorch Geometric": 5.0, "SciPy": 2.5},
    "graph-mesh-dot": {"PyTorch Geometric": 10.0, "SciPy": 2.5, "PyTorch, sparse": 1.4},
    "graph-wide-dot": {"PyTorch Geometric": 6.0, "SciPy": 2.5, "PyTorch, sparse": 1.4},
    "graph-cora-dot": {"PyTorch Geometric": 5.0, "SciPy": 5.0},
    "graph-cora-gat": {"PyTorch Geometric": 5.0, "SciPy": 5.0},
}
GRAPH_BACK_RATIOS = {"PyTorch Geometric": 4.0}  # output and gradients

# A layer, on one thread: the most time it may take, relative to its matrix products and its attention alone.
MULTI_HEAD_CASES = ("multihead-1x128x768x12", "multihead-1x512x768x12")
OVERHEAD = 1.05

BEST_PEER = "best peer"
BEST_COMPILED = "best compiled"
RATIOS = {BEST_PEER: 1.15, "PyTorch": 2.0}
SMALL_CALLS = {
    "attention-1x1x1x8x8": {BEST_PEER: 1.15, "PyTorch": 4.0},
    "attention-1x8x16x16x64": {BEST_PEER: 1.15, "PyTorch": 2.5, "ONNX Runtime": 1.25},
}
SOFTMAX_RATIOS = {"SciPy": 4.0, "PyTorch": 1.5}
SPARSE_RATIOS = {"entmax": 6.0}
ADDITIVE_RATIOS = {"NumPy, best": 8.0, "PyTorch": 80.0, BEST_COMPILED: 1.6}
ADDITIVE_BACK_RATIOS = {"PyTorch": 30.0, BEST_COMPILED: 3.0}  # output and gradients

MULTI_HEAD_RATIOS = {"PyTorch": 1.0}

# Attention in True blocks: of the FMA peak, relative to compiled flex_attention, and the most time, relative to their
# share of the dense call's.
BLOCKS_SHARE = 0.6
BLOCKS_RATIOS = {"PyTorch, flex": 1.8}
BLOCKS_TIME = 1.25

# Of the products of pixels that see each other: at the edges lanes see different ones, and some lanes are idle.
NEIGHBORHOOD_SHARES = {"4x56x56x32-k7": 0.30, "4x28x28x32-k7": 0.25, "4x16x16x16x32-k3": 0.18}
NEIGHBORHOOD_RATIOS = {
    "4x56x56x32-k7": {"PyTorch, gather": 12.0, "PyTorch, masked": 25.0, "PyTorch, flex": 15.0},
    "4x28x28x32-k7": {"PyTorch, gather": 10.0, "PyTorch, masked": 6.0, "PyTorch, flex": 8.0},
    "4x16x16x16x32-k3": {"PyTorch, gather": 5.0, "PyTorch, masked": 20.0, "PyTorch, flex": 6.0},
}

# Causal linear attention: of the FMA peak in 4 D E operations a token, 6 D E by the delta rule; one step: of a copy of
# the state. Ratios by head_dim.
LINEAR_SHARES = {"linear": 0.55, "gated delta": 0.45}
STEP_SHARE = 0.7
LINEAR_RATIOS = {64: {"PyTorch": 4.0, "NumPy": 4.0}, 128: {"PyTorch": 2.5, "NumPy": 2.5}}
LINEAR_DELTA_RATIOS = {"PyTorch": 3.0}
STEP_RATIOS = {"PyTorch": 2.0}

# Of the speedup of the same threads in the FMA probe.
SHARE_OF_GAIN = 0.97
# Relative to the best peer, by size of the cache: larger ones are limited by memory.
SMALL_CACHE_BYTES = 40e6
DECODE_RATIOS = {True: {BEST_PEER: 1.3}, False: {BEST_PEER: 1.0}}
EXTRA_BYTES = 64 * 2**20
IMPORT_SECONDS = 0.020


def share(record):
    """The share of the limit that fastattn reached, and the goal; None where there is none."""
    if record["kind"] == "softmax":
        return measure.ratio(record["seconds"], "copy", "fastattn out="), SHARE_OF_COPY
    if record["kind"] in ("softmaxback", "sparse", "rotary"):
        return measure.ratio(record["seconds"], "copy", "fastattn out="), None
    if record["kind"] == "linear":
        goal = LINEAR_SHARES[record["rule"]] if record["threads"] == 1 else None
        return measure.ratio(record["seconds"], "FMA peak", "fastattn"), goal
    if record["kind"] == "linearstep":
        return measure.ratio(record["seconds"], "copy", "fastattn"), STEP_SHARE if record["threads"] == 1 else None
    if record["kind"] in ("multihead", "multiheadstep"):
        return measure.ratio(record["seconds"], "FMA peak", "fastattn"), None
    if record["kind"] == "graphback":
        return measure.ratio(record["seconds"], "rows read", "fastattn out="), None
    if record["kind"] == "graph":
        name = "fastattn out=" if "fastattn out=" in record["seconds"] else "fastattn"
        return measure.ratio(record["seconds"], "rows read", name), _graph_share(record)
    goal = None
    if record["kind"] == "stored":
        if record["limit"] == "peak of pairs":
            goal = PAIRS_SHARES[record["label"].split()[-2]] if record["threads"] == 1 else None
        return measure.ratio(record["seconds"], record["limit"], "fastattn"), goal
    if record["kind"] == "decode":
        goal = DECODE_SHARE if record["seqlen_q"] == 1 else None
        return measure.ratio(record["seconds"], "read", "fastattn"), goal
    if record["kind"] == "truncated":
        goal = _window_share(record)
        return measure.ratio(record["seconds"], "FMA peak", "fastattn"), goal
    if record["kind"] == "additive":
        if record["threads"] == 1 and record["case"].endswith(ADDITIVE_CASE):
            goal = ADDITIVE_SHARE - (OTHER_KIND if record.get("isa") else 0)
        return measure.ratio(record["seconds"], "five instructions", "fastattn"), goal
    if record["kind"] == "additiveback":
        return measure.ratio(record["seconds"], "five instructions", "fastattn"), None
    if record["kind"] == "attentionback":
        goal = BACK_SHARES.get(record["case"].partition("-")[2]) if record["threads"] == 1 else None
        return measure.ratio(record["seconds"], "FMA peak", "fastattn, back"), goal
    if record["kind"] == "blocks":
        return measure.ratio(record["seconds"], "FMA peak", "fastattn"), _of_long_blocks(record, BLOCKS_SHARE)
    if record["kind"] == "neighborhood":
        goal = _of_neighborhood(record, NEIGHBORHOOD_SHARES)
        return measure.ratio(record["seconds"], "FMA peak", "fastattn"), goal
    if record["threads"] == 1:
        shape = record["case"].partition("attention-")[2].removesuffix("-float64")
        goal = SHARES.get(shape)
    if goal and (record["dtype"] == "float64" or record.get("isa")):
        goal -= OTHER_KIND
    return measure.ratio(record["seconds"], "FMA peak", "fastattn"), goal


def overhead(record):
    """The time of a layer relative to its products and attention alone, and the goal, or None."""
    goal = OVERHEAD if _is_goal_layer(record) else None
    return measure.ratio(record["seconds"], "fastattn", PRODUCTS_AND_ATTENTION), goal


def times_of_plain(record):
    """The time of the way back relative to that without a rule that should cost little, and the goal, or None."""
    if record["kind"] != "attentionback":
        return None, None
    return measure.ratio(record["seconds"], "fastattn, back", "fastattn, plain"), PLAIN_TIMES.get(
        record["case"].rpartition("-")[2]
    )


def _is_goal_layer(record):
    return record["threads"] == 1 and record["case"] in MULTI_HEAD_CASES


def best_peer(samples, peers=PEERS):
    """How many times faster fastattn is than the fastest peer, and which one that is; or None."""
    ratios = {name: measure.ratio(samples, name, "fastattn") for name in peers}
    return min(((ratio, name) for name, ratio in ratios.items() if ratio is not None), default=None)


def missed(record):
    """In words, the goals that a record misses; None if none of its goals was measured."""
    samples, words = record["seconds"], {}
    if "fastattn" not in samples:
        return ["failed"]
    reached, goal = share(record)
    checked = bool(reached and goal)
    if checked and reached < goal:
        words["share"] = f"{reached:.0%} < {goal:.0%}"
    times, most = overhead(record)
    if times and most:
        checked = True
        if times > most:
            words["overhead"] = f"{times:.2f}x > {most:g}x of {PRODUCTS_AND_ATTENTION}"
    times, most = times_of_plain(record)
    if times and most:
        checked = True
        if times > most:
            words["plain"] = f"{times:.2f}x > {most:.2f}x of the plain way back"
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
    if record["kind"] == "sparse":
        return SPARSE_RATIOS
    if record["kind"] == "truncated":
        return WINDOW_RATIOS.get(record["case"], {}) if record["threads"] == 1 else {}
    if record["kind"] == "stored":
        return _stored_ratios(record)
    if record["kind"] == "decode":
        return DECODE_RATIOS[record["work"] <= SMALL_CACHE_BYTES]
    if record["kind"] == "multihead":
        return MULTI_HEAD_RATIOS if _is_goal_layer(record) else {}
    if record["kind"] in ("softmaxback", "rotary", "multiheadstep"):
        return {}
    if record["kind"] == "linear":
        return LINEAR_DELTA_RATIOS if record["rule"] == "gated delta" else LINEAR_RATIOS[record["head_dim"]]
    if record["kind"] == "linearstep":
        return STEP_RATIOS
    if record["kind"] == "graphback":
        return GRAPH_BACK_RATIOS if record["threads"] == 1 else {}
    if record["kind"] == "graph":
        return GRAPH_RATIOS[record["case"]] if record["threads"] == 1 else {}
    if record["kind"] == "blocks":
        return _of_long_blocks(record, BLOCKS_RATIOS) or {}
    if record["kind"] == "neighborhood":
        return _of_neighborhood(record, NEIGHBORHOOD_RATIOS) or {}
    if record["kind"] == "additive":
        return ADDITIVE_RATIOS if record["threads"] == 1 and record["case"] == ADDITIVE_CASE else {}
    if record["kind"] == "attentionback":
        least = BACK_RATIOS.get(record["case"].partition("-")[2], {}).get(record["threads"])
        return {"PyTorch": least} if least else {}
    if record["kind"] == "additiveback":
        return ADDITIVE_BACK_RATIOS if record["threads"] == 1 and record["case"] == ADDITIVE_BACK_CASE else {}
    return SMALL_CALLS.get(record["case"], RATIOS)


def _stored_ratios(record):
    """Pairs of bfloat16 have a peak of their own; with more threads memory's share of the time differs."""
    storage, rows = record["storage"], record["rows"]
    peers = STORED_PEERS[storage] if rows < 16 else {}
    if record["threads"] > 1:
        return {name: STORED_INT8_THREADS for name in peers} if storage == "int8" else peers
    if record["limit"].startswith("peak of"):
        return {"PyTorch": 1.15}
    by_rows = STORED_RATIOS[record["set"].removesuffix("_bf16").removesuffix("_amx")][storage]
    return {**peers, "fastattn, float32": by_rows[0 if rows == 1 else 1 if rows < 16 else 2]}


def _graph_share(record):
    return GRAPH_SHARES[record["case"].rpartition("-")[2]] if record["threads"] == 1 else None


def _of_long_blocks(record, goal):
    return goal if record["threads"] == 1 and "8192" in record["case"] else None


def blocks_time(record):
    """The time relative to that of all pairs, times the share of the pairs that count."""
    return measure.ratio(record["seconds"], "fastattn", "fastattn, dense") / record["share"]


def _of_neighborhood(record, table):
    return table.get(record["case"].partition("-")[2]) if record["threads"] == 1 else None


def _window_share(record):
    return WINDOW_SHARES.get(record["case"].rpartition("-")[2]) if record["threads"] == 1 else None


def flatness(record):
    """The cost of a row at the longest length relative to the shortest."""
    names = (f"fastattn, {seqlen}" for seqlen in (record["seqlens"][-1], record["seqlens"][0]))
    return measure.ratio(record["seconds"], *names)


def length_shares(record):
    """The share of the FMA peak at each length, and the goal; None where there is none."""
    peak = record["seconds"]["FMA peak"]
    shares = []
    for seqlen, flops in zip(record["seqlens"], record["flops"], strict=True):
        samples = {"peak": [flops * second for second in peak]}
        samples |= {name: times for name, times in record["seconds"].items() if name == f"fastattn, {seqlen}"}
        shares.append(measure.ratio(samples, "peak", f"fastattn, {seqlen}"))
    return shares, _window_share(record)


def missed_lengths(record):
    """In words, the goals that a record of one window at several lengths misses; None if it has none."""
    shares, goal = length_shares(record)
    reached = flatness(record)
    if reached is None:
        return ["failed"]
    if record["threads"] > 1:
        return None
    words = [f"{reached:.2f}x > {FLATNESS:g}x"] if reached > FLATNESS else []
    words += [f"{share:.0%} < {goal:.0%}" for share in shares[-1:] if goal and share < goal]
    return words


def gains(record):
    """How many times faster all threads are than one: fastattn, and the FMA probe."""
    samples, threads = record["seconds"], record["threads"]
    pairs = ((f"{name}, 1", f"{name}, {threads}") for name in ("fastattn", "FMA peak"))
    return [measure.ratio(samples, one, all_of_them) for one, all_of_them in pairs]
