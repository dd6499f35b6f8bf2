"""Markdown tables of compare.py's results; on request with the goals of goals.py."""

from dataclasses import dataclass

import goals
import measure
from peers import (
    ADDITIVE_PEERS,
    BLOCKS_PEERS,
    GRAPH_PEERS,
    NEIGHBORHOOD_PEERS,
    PEERS,
    PRODUCTS_AND_ATTENTION,
    TRUNCATED_PEERS,
)

COLUMNS = ("NumPy", "SciPy", "entmax", *PEERS)
SHAPE = "B, H, L, S, D"
BACK_SHAPE = "B, H, L, D"
ADDITIVE_SHAPE = "B, H, L, S, hidden"
WINDOW_SHAPE = "B, H, L, D (left, right)"
STORED_SHAPE = "B, H, key heads, L, S, D"
DECODE_SHAPE = "B, H, key heads, L, S, D"
MULTI_HEAD_SHAPE = "B, L, d_model, H"
ROTARY_SHAPE = "B, H, L, D"
LINEAR_SHAPE = "B, H, L, D, rule"
STEP_SHAPE = "B, H, D"
GRAPH_SHAPE = "nodes, edges, H, D"
MINILM_SHAPE = "sentences, tokens of the longest"

# What the numbers of a section mean to users of the library, by the first words of its title.
MEANINGS = {
    "Attention": "How long one call takes, and how much of what the multipliers can do it uses; the operations that "
    "causality hides do not count.",
    "Softmax": "A softmax has to read and write each number once, so a copy of the array is its limit; `out=` spares "
    "the time in which the operating system makes room for the result.",
    "Gradients of softmax": "Two arrays are read for one that is written; a copy of half the bytes of all three is the "
    "limit.",
    "Sparse weights": "sparsemax and 1.5-entmax read a row twice and write it once, so a copy of the array is near "
    "their limit.",
    "Additive attention": "Additive scores need a tanh for every triple of query, key and channel; the limit is the "
    "speed of the shortest known sequence of instructions for it, and dividing several triples at once can pass that.",
    "Additive attention, there and back": "The output, then the gradients for query, key, value and the weights of the "
    "score; beside the limit of the way there alone.",
    "Attention there and back": "The output, then the gradients for query, key and value; PyTorch's by autograd. The "
    "way back alone is five matrix products for two on the way there. A bias of heads and keys with its gradient, and "
    "keys that four heads share, are beside the same without: plain.",
    "Attention in a window": "A query pays for the keys in its window and not for the length of the sequence; a mask "
    "on full attention pays for all of them.",
    "Nanoseconds a row in a window": "If the cost of a row depended on the window alone, a line would show one number; "
    "what grows is the time in which longer arrays come from slower memory.",
    "Few queries over a cache": "What a decoder does for each token: with one query the time is that of reading keys "
    "and values once, and the speed of reading those very arrays is the limit.",
    "Keys and values of 16 and 8 bits": "With one query the time is that of reading them, so half the bytes should "
    "take half the time; with many, arithmetic decides, and fewer bits only save memory. The column float32 is "
    "fastattn's own. All three multiply bfloat16 by AMX where the CPU has it. The 8 bits of ONNX Runtime "
    "have one scale for all tokens.",
    "Multi-head attention": "Most of a layer's time is its four matrix products. Products and attention, beside it: "
    "NumPy's products (OpenBLAS) and fastattn's attention, without biases and checks.",
    "Rotary positions": "Turning has to read and write each number once, so a copy of the array is its limit.",
    "Causal linear attention": "Each number of a head's state is updated and read once a token, which is the least "
    "work known; the share is of what the multipliers can do.",
    "One token of linear attention": "A step reads and writes the state, whatever came before; a copy is the limit.",
    "BigBird in blocks": "Three neighbouring blocks, the first and the last, and three random ones in each row: the "
    "others are skipped. The dense call's share is the time of all pairs, times the share of them that count.",
    "Along the edges of a graph": "The rows of key and value that the edges name have to be read, and are scattered in "
    "memory: the limit is the speed of reading them in that order, some edges ahead.",
    "Along the edges of a graph, there and back": "The output, then the gradients for query, key and value; beside the "
    "same limit, although rows of queries and of the output's gradient have to be read as well.",
    "Sentences a second through MiniLM": "A whole encoder: as in the layer above, the matrix products around "
    "attention decide.",
    "Another instruction set, float32": "The same machine without AVX-512, against what AVX2 can do on it.",
    "Another instruction set, additive": "The same for additive attention.",
    "Gain from threads": "How many times faster a call gets with the threads, beside what pure arithmetic gains.",
    "Memory and import": "What a call needs beside its inputs and its result, and what importing costs.",
}


@dataclass
class Table:
    """Columns headed "goal" or "outcome" are printed only on request."""

    title: str
    heads: list
    rows: list

    def markdown(self, with_goals, with_meaning):
        shown = [i for i, head in enumerate(self.heads) if with_goals or head not in ("goal", "outcome")]
        align = ["---" if i == 0 or self.heads[i] == "outcome" else "---:" for i in range(len(self.heads))]
        lines = ["| " + " | ".join(str(line[i]) for i in shown) + " |" for line in (self.heads, align, *self.rows)]
        return "\n\n".join([f"### {self.title}", *([meaning(self.title)] if with_meaning else []), "\n".join(lines)])


def meaning(title):
    """The sentence for the longest prefix of the title."""
    return MEANINGS[max((words for words in MEANINGS if title.startswith(words)), key=len)]


def markdown(everything, with_goals=False):
    records = everything["records"]
    parts = [
        _how(everything),
        *_attention(records_of(records, "libraries", kind="attention")),
        *_attention_back(records_of(records, "libraries", kind="attentionback")),
        *_softmax(records_of(records, "libraries", kind="softmax")),
        *_beside_a_copy(records_of(records, "libraries", kind="softmaxback"), "shape", "Gradients of softmax"),
        *_sparse(records_of(records, "libraries", kind="sparse")),
        *_additive(records_of(records, "libraries", kind="additive"), "Additive attention"),
        *_additive(records_of(records, "libraries", kind="additiveback"), "Additive attention, there and back"),
        *_truncated(records_of(records, "libraries", kind="truncated")),
        *_lengths(records_of(records, "lengths")),
        *_decode(records_of(records, "libraries", kind="decode")),
        *_stored(records_of(records, "libraries", kind="stored")),
        *_multihead(records_of(records, "libraries", kind="multihead")),
        *_multihead_steps(records_of(records, "libraries", kind="multiheadstep")),
        *_rotary(records_of(records, "libraries", kind="rotary")),
        *_linear(records_of(records, "libraries", kind="linear")),
        *_linear_steps(records_of(records, "libraries", kind="linearstep")),
        *_graph(records_of(records, "libraries", kind="graph"), "Along the edges of a graph"),
        *_graph(records_of(records, "libraries", kind="graphback"), "Along the edges of a graph, there and back"),
        *_blocks(records_of(records, "libraries", kind="blocks")),
        *_neighborhood(records_of(records, "libraries", kind="neighborhood")),
        *_minilm(records_of(records, "libraries", kind="minilm")),
        *left_out(everything["missing"]),
        _other_isa(records_of(records, "isa", kind="attention")),
        *_stored(records_of(records, "isa", kind="stored"), "avx2"),
        _additive_other_isa(records_of(records, "isa", kind="additive")),
        _gain(records_of(records, "scaling")),
        _memory_and_import(records),
    ]
    texts, before = [], None
    for part in parts:
        if isinstance(part, Table) and part.rows:
            # Tables of the same kind, for other threads or dtypes, are explained once.
            texts.append(part.markdown(with_goals, with_meaning=meaning(part.title) != before))
            before = meaning(part.title)
        elif isinstance(part, str):
            texts.append(part)
    return "\n\n".join(texts) + "\n"


def variants(records):
    """The fastest variant of each case in each library, or why it is left out: {library: {note: cases}}."""
    found = {}
    for record in records:
        for name, note in record.get("notes", {}).items():
            where = f"{record['case']} ({threads_in_words(record['threads'])})"
            found.setdefault(name, {}).setdefault(note, []).append(where)
    return {name: dict(sorted(notes.items())) for name, notes in sorted(found.items())}


def records_of(records, job, **wanted):
    return [
        record
        for record in records
        if record["job"] == job and all(record.get(key) == value for key, value in wanted.items())
    ]


def threads_in_words(number):
    return f"{number} thread" + "s" * (number > 1)


def _how(everything):
    machine, versions = everything["machine"], everything["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['isa']}; {libraries}. Medians of "
        f"{everything['rounds']} interleaved rounds, every answer checked; in brackets, how many times "
        "faster fastattn is (the median of the ratios within a round)." + _disturbance(everything)
    )


def _disturbance(everything):
    busy = everything["disturbance"]
    return f" **Other processes kept up to {busy:.1f} CPUs busy meanwhile.**" if busy > 0.05 else ""


def _attention(records):
    for threads in sorted({record["threads"] for record in records}):
        for dtype in ("float32", "float64"):
            chosen = [r for r in records if r["threads"] == threads and r["dtype"] == dtype]
            if not chosen:
                continue
            names = _columns(chosen)
            heads = [SHAPE, "fastattn", "of FMA peak", "goal", *names, "outcome"]
            rows = []
            for record in chosen:
                samples, (share, goal) = record["seconds"], goals.share(record)
                numbers = [_time(measure.median(samples, "fastattn")), _percent(share), _percent(goal)]
                others = [_beside(samples, name) for name in names]
                rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
            yield Table(f"Attention, {dtype}, {threads_in_words(threads)}", heads, rows)


def _attention_back(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = [BACK_SHAPE, "fastattn", "the way back", "of FMA peak", "goal", "to plain", *names, "outcome"]
        rows = []
        for record in chosen:
            samples, (share, goal), (times, _) = record["seconds"], goals.share(record), goals.times_of_plain(record)
            numbers = [_time(measure.median(samples, name)) for name in ("fastattn", "fastattn, back")]
            others = [_beside(samples, name) for name in names]
            plain = f"{times:.2f}x" if times else "-"
            outcome = _outcome(goals.missed(record))
            rows.append([record["label"], *numbers, _percent(share), _percent(goal), plain, *others, outcome])
        yield Table(f"Attention there and back, {threads_in_words(threads)}", heads, rows)


def _softmax(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = ["shape", "fastattn", "into `out=`", "of a copy's speed", "goal", *names, "outcome"]
        rows = []
        for record in chosen:
            samples, (share, goal) = record["seconds"], goals.share(record)
            label = record["label"] + (" float64" if record["dtype"] == "float64" else "")
            numbers = [_time(measure.median(samples, name)) for name in ("fastattn", "fastattn out=")]
            others = [_beside(samples, name) for name in names]
            outcome = _outcome(goals.missed(record))
            rows.append([label, *numbers, _percent(share), _percent(goal), *others, outcome])
        yield Table(f"Softmax, {threads_in_words(threads)}", heads, rows)


def _additive(records, title):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen, ADDITIVE_PEERS)
        heads = [ADDITIVE_SHAPE, "fastattn", "triples/s", "of five instructions", "goal", *names, "outcome"]
        rows = []
        for record in chosen:
            others = [_beside(record["seconds"], name) for name in names]
            rows.append([record["label"], *_additive_numbers(record), *others, _outcome(goals.missed(record))])
        yield Table(f"{title}, {threads_in_words(threads)}", heads, rows)


def _additive_numbers(record):
    """fastattn's time and speed, its share of the limit, and the goal."""
    time, (share, goal) = measure.median(record["seconds"], "fastattn"), goals.share(record)
    speed = f"{record['work'] / time / 1e9:.2f} G" if time else "-"
    return [_time(time), speed, _percent(share), _percent(goal)]


def _truncated(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen, TRUNCATED_PEERS)
        heads = [WINDOW_SHAPE, "fastattn", "ns a row", "of FMA peak", "goal", *names, "outcome"]
        rows = []
        for record in chosen:
            time, (share, goal) = measure.median(record["seconds"], "fastattn"), goals.share(record)
            numbers = [_time(time), _nanoseconds(time, record["rows"]), _percent(share), _percent(goal)]
            others = [_beside(record["seconds"], name) for name in names]
            rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
        yield Table(f"Attention in a window, float32, {threads_in_words(threads)}", heads, rows)


def _lengths(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        seqlens = chosen[0]["seqlens"]
        rows = []
        for record in chosen:
            samples, (shares, goal) = record["seconds"], goals.length_shares(record)
            numbers = [
                f"{_nanoseconds(measure.median(samples, f'fastattn, {seqlen}'))} ({_percent(share)})"
                for seqlen, share in zip(seqlens, shares, strict=True)
            ]
            # The time to read a row of query, key and value and to write a row of the result.
            memory = [sum(parts) for parts in zip(samples["read"], samples["copy"], strict=True)]
            flatness = goals.flatness(record)
            numbers += [_nanoseconds(measure.median({"": memory}, "")), f"{flatness:.2f}x" if flatness else "-"]
            wanted = f"<= {goals.FLATNESS:g}x" + (f", {_percent(goal)}" if goal else "")
            rows.append([record["label"], *numbers, wanted, _outcome(goals.missed_lengths(record))])
        heads = ["(left, right)", *(f"L = {seqlen}" for seqlen in seqlens)]
        heads += ["memory alone, the longest", "longest : shortest", "goal", "outcome"]
        title = f"Nanoseconds a row in a window (share of the FMA peak), 1 head, D = 64, {threads_in_words(threads)}"
        yield Table(title, heads, rows)


def _decode(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = [DECODE_SHAPE, "key and value", "fastattn", "GB/s", "of reading them", "goal", *names, "outcome"]
        rows = []
        for record in chosen:
            time, (share, goal) = measure.median(record["seconds"], "fastattn"), goals.share(record)
            speed = f"{record['work'] / time / 1e9:.1f}" if time else "-"
            numbers = [f"{record['work'] / 1e6:.0f} MB", _time(time), speed, _percent(share), _percent(goal)]
            others = [_beside(record["seconds"], name) for name in names]
            rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
        yield Table(f"Few queries over a cache, float32, {threads_in_words(threads)}", heads, rows)


def _stored(records, isa=""):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = [STORED_SHAPE, "fastattn", "of its limit", "goal", "float32", *names, "outcome"]
        rows = []
        for record in chosen:
            samples, (share, goal) = record["seconds"], goals.share(record)
            numbers = [_time(measure.median(samples, "fastattn")), f"{_percent(share)} of {record['limit']}"]
            others = [_beside(samples, name) for name in ("fastattn, float32", *names)]
            outcome = _outcome(goals.missed(record))
            rows.append([record["label"], *numbers, _percent(goal), *others, outcome])
        where = f", `FASTATTN_ISA={isa}`" if isa else ""
        yield Table(f"Keys and values of 16 and 8 bits, {threads_in_words(threads)}{where}", heads, rows)


def _multihead(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = [MULTI_HEAD_SHAPE, "fastattn", "of FMA peak", PRODUCTS_AND_ATTENTION, "fastattn : these", "goal"]
        rows = []
        for record in chosen:
            samples, (share, _), (times, goal) = record["seconds"], goals.share(record), goals.overhead(record)
            alone = _time(measure.median(samples, PRODUCTS_AND_ATTENTION))
            numbers = [_time(measure.median(samples, "fastattn")), _percent(share), alone]
            numbers += [f"{times:.2f}x" if times else "-", f"<= {goal:g}x" if goal else ""]
            others = [_beside(samples, name) for name in names]
            rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
        title = f"Multi-head attention with its projections, float32, {threads_in_words(threads)}"
        yield Table(title, [*heads, *names, "outcome"], rows)


def _multihead_steps(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        rows = []
        for record in chosen:
            samples, (share, _) = record["seconds"], goals.share(record)
            numbers = [_time(measure.median(samples, "fastattn")), _percent(share)]
            rows.append([record["label"], *numbers, *(_beside(samples, name) for name in names)])
        title = f"Multi-head attention with its projections, there and back, float32, {threads_in_words(threads)}"
        yield Table(title, [MULTI_HEAD_SHAPE, "fastattn", "of FMA peak", *names], rows)


def _sparse(records):
    return _beside_a_copy(records, "shape", "Sparse weights")


def _blocks(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen, BLOCKS_PEERS)
        rows = []
        for record in chosen:
            samples, (share, goal) = record["seconds"], goals.share(record)
            numbers = [_time(measure.median(samples, "fastattn")), _percent(share), _percent(goal)]
            numbers.append(f"{goals.blocks_time(record):.2f}x")
            others = [_beside(samples, name) for name in names]
            rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
        heads = ["B, H, L, S, D", "fastattn", "of FMA peak", "goal", "of the dense call's share", *names, "outcome"]
        yield Table(f"BigBird in blocks of 64, float32, {threads_in_words(threads)}", heads, rows)


def _neighborhood(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen, NEIGHBORHOOD_PEERS)
        rows = []
        for record in chosen:
            samples, (share, goal) = record["seconds"], goals.share(record)
            numbers = [_time(measure.median(samples, "fastattn")), _percent(share), _percent(goal)]
            others = [_beside(samples, name) for name in names]
            rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
        heads = ["H, space, D", "fastattn", "of FMA peak", "goal", *names, "outcome"]
        yield Table(f"Attention in a neighbourhood, float32, {threads_in_words(threads)}", heads, rows)


def _rotary(records):
    return _beside_a_copy(records, ROTARY_SHAPE, "Rotary positions")


def _beside_a_copy(records, shape, title):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = [shape, "fastattn", "into `out=`", "of a copy's speed", *names, "outcome"]
        rows = []
        for record in chosen:
            samples, (share, _) = record["seconds"], goals.share(record)
            numbers = [_time(measure.median(samples, name)) for name in ("fastattn", "fastattn out=")]
            others = [_beside(samples, name) for name in names]
            rows.append([record["label"], *numbers, _percent(share), *others, _outcome(goals.missed(record))])
        yield Table(f"{title}, float32, {threads_in_words(threads)}", heads, rows)


def _linear(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = [LINEAR_SHAPE, "fastattn", "ns a token and head", "of FMA peak", "goal", *names, "outcome"]
        rows = []
        for record in chosen:
            time, (share, goal) = measure.median(record["seconds"], "fastattn"), goals.share(record)
            numbers = [_time(time), _nanoseconds(time, record["tokens"]), _percent(share), _percent(goal)]
            others = [_beside(record["seconds"], name) for name in names]
            rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
        yield Table(f"Causal linear attention, float32, {threads_in_words(threads)}", heads, rows)


def _linear_steps(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        heads = [STEP_SHAPE, "state", "fastattn", "of a copy's speed", "goal", *names, "outcome"]
        rows = []
        for record in chosen:
            time, (share, goal) = measure.median(record["seconds"], "fastattn"), goals.share(record)
            numbers = [f"{record['work'] / 1e6:.1f} MB", _time(time), _percent(share), _percent(goal)]
            others = [_beside(record["seconds"], name) for name in names]
            rows.append([record["label"], *numbers, *others, _outcome(goals.missed(record))])
        yield Table(f"One token of linear attention, float32, {threads_in_words(threads)}", heads, rows)


def _graph(records, title):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen, GRAPH_PEERS)
        heads = [GRAPH_SHAPE, "fastattn", "into `out=`", "ns an edge", "of reading the rows", "goal", *names, "outcome"]
        rows = []
        for record in chosen:
            samples, (share, goal) = record["seconds"], goals.share(record)
            numbers = [_time(measure.median(samples, name)) for name in ("fastattn", "fastattn out=")]
            numbers.append(_nanoseconds(measure.median(samples, "fastattn out="), record["work"]))
            others = [_beside(samples, name) for name in names]
            label = record["label"]
            rows.append([label, *numbers, _percent(share), _percent(goal), *others, _outcome(goals.missed(record))])
        yield Table(f"{title}, float32, {threads_in_words(threads)}", heads, rows)


def _minilm(records):
    for threads in sorted({record["threads"] for record in records}):
        chosen = [record for record in records if record["threads"] == threads]
        names = _columns(chosen)
        rows = [[record["label"], *(_sentences(record, name) for name in ("fastattn", *names))] for record in chosen]
        titles = {"NumPy": "with attention in NumPy"}
        heads = [MINILM_SHAPE, "fastattn", *(titles.get(name, name) for name in names)]
        yield Table(f"Sentences a second through MiniLM, float32, {threads_in_words(threads)}", heads, rows)


def _sentences(record, name):
    """Rate per second, and fastattn's relative to it."""
    samples = record["seconds"]
    if name not in samples:
        return "-"
    speed = f"{record['work'] / measure.median(samples, name):,.0f}"
    ratio = None if name == "fastattn" else measure.ratio(samples, name, "fastattn")
    return f"{speed} ({ratio:.2f}x)" if ratio else speed


def left_out(missing):
    """A note on the model, if packages that it needs are missing."""
    if missing:
        yield f"MiniLM is left out: {', '.join(missing)} not installed (README.md says how)."


def _additive_other_isa(records):
    rows = [
        [record["label"], record["isa"], *_additive_numbers(record), _outcome(goals.missed(record))]
        for record in records
    ]
    heads = [ADDITIVE_SHAPE, "`FASTATTN_ISA`", "fastattn", "triples/s", "of its own five instructions", "goal"]
    return Table("Another instruction set, additive attention, float32, 1 thread", [*heads, "outcome"], rows)


def _other_isa(records):
    rows = []
    for record in records:
        share, goal = goals.share(record)
        time = _time(measure.median(record["seconds"], "fastattn"))
        outcome = _outcome(goals.missed(record))
        rows.append([record["label"], record["isa"], time, _percent(share), _percent(goal), outcome])
    heads = [SHAPE, "`FASTATTN_ISA`", "fastattn", "of its own FMA peak", "goal", "outcome"]
    return Table("Another instruction set, float32, 1 thread", heads, rows)


def _gain(records):
    rows = []
    for record in records:
        samples, threads = record["seconds"], record["threads"]
        times = [_time(measure.median(samples, f"fastattn, {number}")) for number in (1, threads)]
        ours, possible = goals.gains(record)
        words = [] if ours >= goals.SHARE_OF_GAIN * possible else [f"{ours / possible:.0%} of the hardware's"]
        rows.append([record["label"], threads, *times, f"{ours:.2f}x", f"{possible:.2f}x", _outcome(words)])
    heads = [SHAPE, "threads", "on one", "on all", "gain", "the hardware's own gain", "outcome"]
    return Table("Gain from threads, float32", heads, rows)


def _memory_and_import(records):
    rows = []
    for record in records_of(records, "memory"):
        what = f"extra memory, {record['label']}, {record['library']}, {threads_in_words(record['threads'])}"
        goal, outcome = "", ""
        if record["library"] == "fastattn":
            goal = f"< {_mebibytes(goals.EXTRA_BYTES)}"
            outcome = _outcome([] if record["bytes"] < goals.EXTRA_BYTES else ["too much"])
        rows.append([what, _mebibytes(record["bytes"]), goal, outcome])
    for record in records_of(records, "import"):
        outcome = _outcome([] if record["seconds"] <= goals.IMPORT_SECONDS else ["too slow"])
        goal = f"<= {_time(goals.IMPORT_SECONDS)}"
        rows.append(["import, added to NumPy's", _time(record["seconds"]), goal, outcome])
    return Table("Memory and import", ["what", "measured", "goal", "outcome"], rows)


def _columns(records, among=COLUMNS):
    return [name for name in among if any(name in record["seconds"] for record in records)]


def _beside(samples, name):
    ratio = measure.ratio(samples, name, "fastattn")
    time = _time(measure.median(samples, name))
    return f"{time} ({ratio:.2f}x)" if ratio else time


def _outcome(words):
    """The outcome for the goals missed, in words; None: there was no goal."""
    if words is None:
        return ""
    return "**missed**: " + ", ".join(words) if words else "met"


def _time(seconds):
    if seconds is None:
        return "-"
    unit, size = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("µs", 1e-6))
    value = seconds / size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def _nanoseconds(seconds, rows=1):
    return "-" if seconds is None else f"{1e9 * seconds / rows:.{0 if 1e9 * seconds >= 100 * rows else 1}f}"


def _percent(share):
    return "" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _mebibytes(count):
    return f"{count / 2**20:.1f} MiB"
