"""The plot of what compare.py measured: shares of the machine's limits, library by library."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import measure
from report import records_of, threads_in_words

COLOURS = {
    "fastattn": "#d1495b",
    "NumPy": "#c9cdd3",
    "SciPy": "#9aa1ab",
    "PyTorch": "#eab676",
    "ONNX Runtime": "#6c9bc4",
    "OpenVINO": "#86b98e",
    "JAX": "#b39ac6",
}
# Below this a call is all overhead, and its share of the peak says nothing.
LEAST_FLOPS_IN_PLOT = 1e6


def draw(everything, path):
    """Writes the plot to `path`, in the format of its suffix."""
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
    # One legend, in the order of the colours, above all panels; inches, whatever the number of panels.
    names = [name for name in COLOURS if name in shown]
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.65 / height), h_pad=2.0)
    style = {"ncols": len(names), "frameon": False, "fontsize": 10, "handlelength": 1.0}
    left, top = axes[0, 0].get_position().x0, 1 - 0.28 / height
    bars = [shown[name] for name in names]
    figure.legend(bars, names, loc="center left", bbox_to_anchor=(left, top), **style)
    figure.text(0.99, top, everything["machine"]["cpu"], ha="right", va="center", fontsize=9, color="#777777")
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


def _bars(axis, title, limit, records):
    """One panel; returns a bar of each library for the legend."""
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
    axis.set_title(title, loc="left", fontsize=11, pad=10)
    axis.set_xticks(range(len(records)), [_tick(record) for record in records], fontsize=8.5)
    axis.set_xlim(-0.6, len(records) - 0.4)
    axis.set_ylim(0, max(100, 1.1 * top) if limit == "FMA peak" else 1.15 * top)
    axis.locator_params(axis="y", nbins=5, integer=True)
    axis.yaxis.set_major_formatter("{x:.0f} %")
    axis.tick_params(axis="y", labelsize=9, labelcolor="#555555")
    axis.grid(axis="y", color="#e6e8eb", zorder=0)
    axis.tick_params(length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    return shown


def _tick(record):
    if record["kind"] == "softmax":
        return record["label"].replace(", ", " x ") + ("\nfloat64" if record["dtype"] == "float64" else "")
    label = record["label"].removesuffix(" causal")
    batch, heads, seqlen_q, seqlen_k, head_dim = label.split(", ")
    causal = ", causal" if label != record["label"] else ""
    return f"{batch} x {heads} heads\n{seqlen_q} x {seqlen_k}\nD {head_dim}{causal}"
