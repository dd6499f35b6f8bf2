"""Plots of compare.py's results: shares of the machine's limits, four jobs in milliseconds, the cost of windows.

And of encoder.py's: a whole model beside ONNX Runtime.
"""

import statistics

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import measure
from report import records_of, threads_in_words

COLOURS = {
    "fastattn": "#d1495b",
    "NumPy": "#c9cdd3",
    "SciPy": "#9aa1ab",
    "PyTorch": "#eab676",
    "NumPy, best band": "#9aa1ab",
    "PyTorch, masked": "#eab676",
    "PyTorch, flex": "#c98a3c",
    "ONNX Runtime": "#6c9bc4",
    "OpenVINO": "#86b98e",
    "JAX": "#b39ac6",
}
SMALL_PRINT = {"va": "center", "fontsize": 9, "color": "#777777"}
# What a user waits for.
JOBS = {
    "attention-1x8x512x512x64": "A page of 512 tokens, all seen: 8 heads of 64",
    "attention-1x8x2048x2048x64-causal": "A prompt of 2048 tokens, causal: 8 heads of 64",
    "decode-1x8x8x1x32768x64": "The next token, over a cache of 32768: 8 heads of 64",
    "truncated-1x1x4096x64-64x64": "4096 frames that see 64 on either side: 1 head of 64",
}
# Below this a call is mostly overhead, and its share of the peak means nothing.
LEAST_FLOPS_IN_PLOT = 1e6


def draw(everything, path):
    """Writes the shares to `path`, four jobs to jobs.* and the cost of windows to truncated.* next to it."""
    _draw_shares(everything, path)
    _draw_jobs(everything, path.with_stem("jobs"))
    _draw_windows(everything, path.with_stem("truncated"))


def _draw_jobs(everything, path):
    """The milliseconds of each library for JOBS on one thread, one panel per job, the shortest bar on top."""
    records = {record["case"]: record for record in records_of(everything["records"], "libraries", threads=1)}
    if not all(case in records for case in JOBS):
        return
    figure = Figure(figsize=(11.0, 4.6))
    FigureCanvasAgg(figure)
    for axis, (case, title) in zip(figure.subplots(2, 2).flat, JOBS.items(), strict=True):
        samples = records[case]["seconds"]
        times = sorted((1e3 * measure.median(samples, name), name) for name in COLOURS if name in samples)
        _job(axis, title, [(time, name, name) for time, name in times])
    _save_jobs(figure, f"one thread, float32, {everything['machine']['cpu']}", path)


def draw_encoder(results, libraries, machine, path):
    """Writes encoder.py's results, (title, threads, seconds of each library, ratio), to `path`, one panel per job."""
    panels = {}
    for title, threads, *seconds, _ in results:
        bars = panels.setdefault(title, [])
        words = threads_in_words(threads)
        bars += [(1e3 * time, name, f"{name}, {words}") for name, time in zip(libraries, seconds, strict=True)]
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11.0, 0.7 + 1.75 * rows))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False)
    for axis, (title, bars) in zip(axes.flat, panels.items(), strict=False):
        _job(axis, title, bars)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    _save_jobs(figure, f"float32, {machine}", path)


def _job(axis, title, bars):
    """One panel of bars: milliseconds, library, label."""
    for row, (time, name, _) in enumerate(bars):
        axis.barh(row, time, 0.78, color=COLOURS[name], zorder=2)
        style = {"color": COLOURS["fastattn"], "weight": "bold"} if name == "fastattn" else {"color": "#555555"}
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(f"{time:.{2 if time < 10 else 1 if time < 100 else 0}f} ms", (time, row), **place, **style)
    axis.set_yticks(range(len(bars)), [label for *_, label in bars], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(time for time, *_ in bars))
    axis.set_xticks([])
    axis.set_title(title, loc="left", fontsize=10.5)
    axis.tick_params(which="both", length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _save_jobs(figure, small_print, path):
    figure.text(0.99, 0.02, small_print, ha="right", **SMALL_PRINT)
    figure.tight_layout(rect=(0, 0.04, 1, 1), h_pad=1.6, w_pad=2.0)
    figure.savefig(path, dpi=120)


def _draw_shares(everything, path):
    panels = [panel for panel in _panels(everything["records"]) if panel[2]]
    if not panels:
        return
    groups = max(len(records) for _, _, records in panels)
    width, height = max(9.0, 1.5 + 1.15 * groups), 2.9 * len(panels) + 0.9
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)
    shown = {}
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        shown |= _bars(axis, *panel)
    # One legend, in the order of the colours, above all panels; sized in inches, whatever the number of panels.
    names = [name for name in COLOURS if name in shown]
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.65 / height), h_pad=2.0)
    style = {"ncols": len(names), "frameon": False, "fontsize": 10, "handlelength": 1.0}
    left, top = axes[0, 0].get_position().x0, 1 - 0.28 / height
    bars = [shown[name] for name in names]
    figure.legend(bars, names, loc="center left", bbox_to_anchor=(left, top), **style)
    figure.text(0.99, top, everything["machine"]["cpu"], ha="right", **SMALL_PRINT)
    figure.savefig(path, dpi=150)


def _panels(records):
    """Title, limit and records of each panel; some may have no records."""
    everything = records_of(records, "libraries")
    for threads in sorted({record["threads"] for record in everything}):
        words = threads_in_words(threads)
        for dtype in ("float32", "float64"):
            chosen = records_of(everything, "libraries", kind="attention", threads=threads, dtype=dtype)
            chosen = [record for record in chosen if record["work"] >= LEAST_FLOPS_IN_PLOT]
            yield f"Attention, {dtype}, {words}: share of the FMA peak", "FMA peak", chosen
        chosen = records_of(everything, "libraries", kind="softmax", threads=threads)
        yield f"Softmax, {words}: share of the speed of a copy", "copy", chosen
        chosen = records_of(everything, "libraries", kind="decode", threads=threads)
        yield f"Few queries over a cache, float32, {words}: share of the speed of reading it", "read", chosen


def _bars(axis, title, limit, records):
    """One panel; returns one bar per library for the legend."""
    names = [name for name in COLOURS if any(name in record["seconds"] for record in records)]
    width, shown, top = 0.84 / max(1, len(names)), {}, 0.0
    for index, record in enumerate(records):
        for position, name in enumerate(names):
            share = measure.ratio(record["seconds"], limit, name)
            if share is None:
                continue
            percent = 100 * share
            top = max(top, percent)
            x = index - 0.42 + (position + 0.5) * width
            shown[name] = axis.bar(x, percent, width * 0.94, color=COLOURS[name], zorder=2)
            if name == "fastattn":
                above = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{percent:.0f}", (x, percent), **above, color=COLOURS[name], weight="bold")
    _frame(axis, title)
    axis.set_xticks(range(len(records)), [_tick(record) for record in records], fontsize=8.5)
    axis.set_xlim(-0.6, len(records) - 0.4)
    axis.set_ylim(0, 1.15 * top if limit == "copy" else max(100, 1.1 * top))
    axis.locator_params(axis="y", nbins=5, integer=True)
    axis.yaxis.set_major_formatter("{x:.0f} %")
    return shown


def _frame(axis, title):
    axis.set_title(title, loc="left", fontsize=11, pad=10)
    axis.tick_params(axis="y", labelsize=9, labelcolor="#555555")
    axis.grid(axis="y", color="#e6e8eb", zorder=0)
    axis.tick_params(which="both", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _draw_windows(everything, path):
    """The cost of a row against the length, for the window measured at the most lengths, and against the window."""
    records = records_of(everything["records"], "libraries", kind="truncated")
    records = [record for record in records if record["threads"] == min(r["threads"] for r in records)]
    by_window, by_length = _largest_group(records, "window"), _largest_group(records, "seqlen")
    if len(by_window) < 2 or len(by_length) < 2:
        return
    figure = Figure(figsize=(11.0, 5.2))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    window, seqlen = tuple(by_window[0]["window"]), by_length[0]["seqlen"]
    shown = _lines(left, {record["seqlen"]: [record] for record in by_window})
    _frame(left, f"Nanoseconds a row against the length, window {window}")
    left.set_xticks(sorted(record["seqlen"] for record in by_window))
    left.set_xticklabels(f"{tick:.0f}" for tick in left.get_xticks())
    left.set_xlabel("queries and keys", fontsize=9, color="#555555")
    sizes = {}
    for record in by_length:
        sizes.setdefault(sum(record["window"]) + 1, []).append(record)
    shown |= _lines(right, sizes)
    _frame(right, f"Nanoseconds a row against the window, {seqlen} queries and keys")
    ticks = {size: "\n".join(str(tuple(record["window"])) for record in same) for size, same in sizes.items()}
    right.set_xticks(list(ticks), list(ticks.values()))
    right.set_xlabel("keys seen before and after (left, right)", fontsize=9, color="#555555")
    for axis in (left, right):
        axis.tick_params(axis="x", labelsize=8.5)
        axis.margins(x=0.08, y=0.1)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    names = [name for name in COLOURS if name in shown]
    figure.tight_layout(rect=(0, 0, 1, 0.91), w_pad=2.5)
    style = {"ncols": len(names), "frameon": False, "fontsize": 10, "handlelength": 1.4, "columnspacing": 1.5}
    place = (left.get_position().x0, 0.95)
    figure.legend([shown[name] for name in names], names, loc="center left", bbox_to_anchor=place, **style)
    where = f"{everything['machine']['cpu']}, {threads_in_words(records[0]['threads'])}"
    figure.text(0.99, 0.95, where, ha="right", **SMALL_PRINT)
    figure.savefig(path, dpi=150)


def _largest_group(records, key):
    """The records with the most frequent value of `key`."""
    groups = {}
    for record in records:
        groups.setdefault(str(record[key]), []).append(record)
    return max(groups.values(), key=len, default=[])


def _lines(axis, groups):
    """Nanoseconds per row of each library against the keys of `groups`, both axes logarithmic; returns one line each.

    If a group has several records, each has a dot, and the line passes between them.
    """
    shown = {}
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for name in COLOURS:
        dots = [
            (place, 1e9 * measure.median(record["seconds"], name) / record["rows"])
            for place, same in sorted(groups.items())
            for record in same
            if name in record["seconds"]
        ]
        if not dots:
            continue
        is_ours = name == "fastattn"
        middle = {place: statistics.geometric_mean(y for x, y in dots if x == place) for place, _ in dots}
        style = {"color": COLOURS[name], "zorder": 4 if is_ours else 3}
        (shown[name],) = axis.plot(*zip(*middle.items(), strict=True), linewidth=2.6 if is_ours else 1.8, **style)
        axis.plot(*zip(*dots, strict=True), "o", markersize=6 if is_ours else 4.5, **style)
        if is_ours:
            for place, number in middle.items():
                below = {"xytext": (0, -15), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{number:.0f}", (place, number), **below, color=COLOURS[name], weight="bold")
    return shown


def _tick(record):
    if record["kind"] == "softmax":
        return record["label"].replace(", ", " x ") + ("\nfloat64" if record["dtype"] == "float64" else "")
    if record["kind"] == "decode":
        batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim = record["label"].split(", ")
        grouped = "" if heads == kv_heads else f" on {kv_heads}"
        return f"{batch} x {heads} heads{grouped}\n{seqlen_q} x {seqlen_k}\nD {head_dim}"
    label = record["label"].removesuffix(" causal")
    batch, heads, seqlen_q, seqlen_k, head_dim = label.split(", ")
    causal = ", causal" if label != record["label"] else ""
    return f"{batch} x {heads} heads\n{seqlen_q} x {seqlen_k}\nD {head_dim}{causal}"
