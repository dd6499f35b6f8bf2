"""Pictures of attention weights: heat maps with matplotlib, and the arrays that BertViz reads.

`import fastattn` does not import this module, which imports matplotlib only when `heatmap` is called: ``pip install
"fastattn[plot]"``.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._checks import integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text
    from numpy.typing import ArrayLike, NDArray

__all__ = ["bertviz", "heatmap"]

# Lengths are in inches, font sizes in points, 72 to the inch.
DPI = 150
CELL = 0.3  # the side of a cell if there is room for it
SIDE = 10.0  # the most that the cells of one head, or of all heads of a grid together, may take
PANEL = 2.0  # but a head of a grid is not shrunk below this for the sake of the others
MARGIN, GAP = 0.15, 0.15
FONT, SMALL_FONT = 10.0, 6.5
LINE = 1.25  # line height, as a multiple of the font size
LINES_FROM = 0.08  # smaller cells are drawn without grid lines
ELONGATED = 4  # largest aspect ratio of a head's picture with square cells
LONGEST_LABEL = 24
GRAY, PALE, HIDDEN = "0.6", "0.9", "0.9"

# matplotlib's own font has no Chinese, Japanese, Korean or Indic letters and few emoji; these fonts, if installed, are
# the fallbacks. Fonts of coloured bitmaps cannot be used.
FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "PingFang HK",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
    "Nirmala UI",
    "Noto Emoji",
    "Segoe UI Emoji",
    "Segoe UI Symbol",
    "Symbola",
    "Unifont",
)


def heatmap(
    weights: ArrayLike,
    query_labels: Iterable[str] | None = None,
    key_labels: Iterable[str] | None = None,
    *,
    title: str | None = None,
    titles: Iterable[str] | None = None,
    columns: int | None = None,
    band: tuple[int, int] | None = None,
    query_offset: int | None = None,
    ax: Axes | None = None,
    cmap: str | Colormap = "Blues",
    vmin: float | None = 0.0,
    vmax: float | None = None,
    colorbar: bool = True,
) -> Figure:
    """
    Draw the weights of one head, or of several side by side: one row per query, one column per key.

    Parameters
    ----------
    weights : array_like, shape (L, S) or (heads, L, S)
        What `return_weights=True` returns; leading axes of length 1 are dropped. Several heads become a grid with one
        colour scale.
    query_labels, key_labels : iterable of str, optional
        The tokens, L and S of them, for the rows and the columns; drawn literally ("$" and "_" have no special
        meaning), but cut at 24 characters. Default: positions. If there is no room for all, every second, third ... is
        drawn, and a tick marks its row or column.
    title : str, optional
        Placed above everything; above the axes if `ax` is given.
    titles : iterable of str, optional
        One per head, above its picture. Default: "head 0", "head 1" ... if there are several.
    columns : int, optional
        Heads side by side; chosen if not given.
    band : tuple of two int, optional
        (left, right), for weights of ``return_weights="band"``, whose last axis has left + right + 1 entries. With
        `key_labels` they are drawn at their keys, with grey outside the band; without, as a band whose columns are
        labelled with the distance between key and query.
    query_offset : int, optional
        Position of query 0 among the keys, for a band with `key_labels`. Default, as in attention: S - L.
    ax : matplotlib Axes, optional
        Draws one head there instead of in a new figure. Sizes are then up to the caller; ``layout="constrained"`` makes
        room for the labels.
    cmap : str or matplotlib Colormap, default "Blues"
    vmin, vmax : float, optional
        The ends of the colour scale. Default 0 and the largest weight of all heads; ``vmin=None`` is the smallest.
    colorbar : bool, default True
        Whether to draw the scale.

    Returns
    -------
    figure : matplotlib Figure
        ``figure.savefig("attention.png")`` writes it; ``figure.axes`` has the axes of the heads in their order, then
        that of the scale.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError, TypeError
        If an argument is not as above; the message names it.

    Notes
    -----
    The size of the figure follows the number of tokens. Cells are square, unless one side has more than four times as
    many tokens as the other.

    pyplot is not used, so nothing has to be closed and no window opens. A notebook displays a figure that is the last
    expression of a cell, after ``%matplotlib inline``.

    Letters that matplotlib's font lacks are taken from common fonts for Chinese, Japanese, Korean and emoji; if none is
    installed, matplotlib warns and draws a box. Any other font can be put into ``matplotlib.rcParams["font.family"]``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.plot import heatmap
    >>> rng = np.random.default_rng(0)
    >>> tokens = ["[CLS]", "the", "cat", "was", "sleep", "##ing", "[SEP]"]
    >>> x = rng.normal(size=(4, 7, 8))  # (heads, tokens, head_dim)
    >>> out, weights = fastattn.dot_product_attention(x, x, x, return_weights=True)
    >>> figure = heatmap(weights, tokens, tokens)
    >>> [axes.get_title(loc="left") for axes in figure.axes[:4]]
    ['head 0', 'head 1', 'head 2', 'head 3']
    >>> figure.savefig("attention.png")  # doctest: +SKIP

    One head, in a window of two keys before and one after:

    >>> out, weights = fastattn.truncated_attention(x, x, x, 2, 1, return_weights="band")
    >>> weights.shape
    (4, 7, 4)
    >>> figure = heatmap(weights[0], tokens, tokens, band=(2, 1), title="The first head")
    """
    heads = _heads(weights)
    if band is not None:
        left, right = _sides(band, heads.shape[2])
        if key_labels is not None:
            key_labels = _strings(key_labels, "key_labels")
            heads = _on_the_diagonal(heads, left, len(key_labels), query_offset)
    if query_offset is not None and (band is None or key_labels is None):
        raise ValueError("query_offset places a band among its keys: it is allowed only with band and key_labels")
    count, num_queries, num_keys = heads.shape
    rows = _names(query_labels, "query", num_queries, "rows")
    if band is not None and key_labels is None:
        offsets = range(-left, right + 1)
        texts = [f"{n:+d}".replace("-", "\N{MINUS SIGN}") if n else "0" for n in offsets]
        across = _Names("key \N{MINUS SIGN} query", texts, offsets, True)
    else:
        across = _names(key_labels, "key", num_keys, "columns")
    if titles is not None:
        titles = _strings(titles, "titles")
        if len(titles) != count:
            raise ValueError(f"titles has {len(titles)} strings, weights has {count} heads: one title a head is needed")
    else:
        titles = [f"head {h}" for h in range(count)] if count > 1 else [""]
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a string, not {type(title).__name__}")
    if columns is not None:
        columns = integer(columns, "columns", "an integer of at least 1", 1)
    if ax is not None and count > 1:
        raise ValueError(f"ax takes one head, not {count}: choose one, as in weights[0], or leave ax out")
    vmin, vmax = _scale(heads, vmin, vmax)

    try:
        import matplotlib
        from matplotlib.axes import Axes
    except ModuleNotFoundError as error:
        message = 'fastattn.plot.heatmap needs matplotlib: pip install "fastattn[plot]"'
        raise ImportError(message, name="matplotlib") from error

    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"ax must be matplotlib Axes, not {type(ax).__name__}")
    # Grey, which is not on the scale, marks NaN and what is outside a band.
    colors = {"cmap": matplotlib.colormaps.get_cmap(cmap).with_extremes(bad=HIDDEN), "vmin": vmin, "vmax": vmax}
    if ax is not None:
        if title is not None and titles[0]:
            title = f"{title}\n{titles[0]}"
        return _draw_into(ax, heads[0], rows, across, title or titles[0], colors, colorbar)
    return _draw_grid(heads, rows, across, title, titles, columns, colors, colorbar)


def bertviz(weights: ArrayLike | Sequence[ArrayLike]) -> tuple[NDArray[np.float32], ...]:
    """
    Arrange weights as BertViz reads them: one array (1, heads, L, S) per layer.

    Parameters
    ----------
    weights : sequence of array_like
        The weights of each layer, (heads, L, S) or (1, heads, L, S), all of the same shape. An array (layers, heads, L,
        S) is such a sequence too: the first axis is layers, never a batch. The weights of a single layer go in a list.

    Returns
    -------
    attention : tuple of ndarray, shape (1, heads, L, S), float32
        One per layer, C-contiguous.

    Raises
    ------
    ValueError, TypeError
        If a layer has neither of these shapes, or differs from the others.

    Notes
    -----
    BertViz works on PyTorch tensors, which this library does not need. Two more lines, in a notebook::

        attention = tuple(torch.from_numpy(layer) for layer in fastattn.plot.bertviz(weights))
        bertviz.head_view(attention, tokens)  # or model_view; tokens is a list of str, as long as L and S

    For attention between two sequences use ``head_view(cross_attention=attention, decoder_tokens=...,
    encoder_tokens=...)``: queries come from the decoder.

    References
    ----------
    .. [1] J. Vig, "A multiscale visualization of attention in the Transformer model", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.plot import bertviz
    >>> layers = []
    >>> x = np.random.default_rng(0).normal(size=(1, 12, 7, 8))  # (batch, heads, tokens, head_dim)
    >>> for _ in range(6):
    ...     x, weights = fastattn.dot_product_attention(x, x, x, return_weights=True)
    ...     layers.append(weights)
    >>> attention = bertviz(layers)
    >>> len(attention), attention[0].shape, attention[0].dtype
    (6, (1, 12, 7, 7), dtype('float32'))
    """
    layers: Any = weights
    is_array = isinstance(layers, np.ndarray) and layers.ndim > 0
    if isinstance(layers, (str, bytes)) or not (is_array or isinstance(layers, Sequence)):
        raise TypeError(f"weights must be a sequence with an array a layer, not {layers!r}")
    if len(layers) == 0:
        raise ValueError("weights must have at least one layer")
    attention: list[NDArray[np.float32]] = []
    for i, layer in enumerate(layers):
        x = _numbers(layer, f"weights[{i}]")
        allowed = f"weights[{i}] must have shape (heads, L, S) or (1, heads, L, S), not {x.shape}"
        if x.ndim == 4 and x.shape[0] != 1:
            raise ValueError(f"{allowed}: BertViz shows one sequence of a batch, as in weights[{i}][:1]")
        if x.ndim == 2:
            raise ValueError(f"{allowed}: one head is x[None], and one layer goes in a list, as in bertviz([weights])")
        if x.ndim not in (3, 4):
            raise ValueError(allowed)
        x = x.reshape(1, *x.shape[-3:])
        if 0 in x.shape:
            raise ValueError(f"weights[{i}] has nothing to show: its shape is {x.shape}")
        if attention and x.shape != attention[0].shape:
            raise ValueError(
                f"weights[{i}] has shape {x.shape[1:]}, weights[0] has {attention[0].shape[1:]}: "
                "BertViz needs the same heads, queries and keys in all layers"
            )
        # torch.from_numpy accepts no negative strides, and warns about read-only arrays.
        attention.append(np.require(x, np.float32, ["C", "W"]))
    return tuple(attention)


# --------------------------------------------------------------------------------------------- the arguments


class _Names(NamedTuple):
    """The labels of rows or columns; the numbers decide which are drawn if there is no room for all."""

    title: str
    texts: list[str]
    numbers: range
    counted: bool  # the texts are the numbers


def _numbers(x: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(x)
    # bfloat16 has kind "V" in NumPy; it becomes float32 like the other small dtypes.
    if array.dtype.kind not in "biufV" or array.dtype.names:
        raise TypeError(f"{name} must be an array of real numbers, not of {array.dtype}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _heads(weights: ArrayLike) -> NDArray[Any]:
    """Return the weights as (heads, L, S)."""
    x = _numbers(weights, "weights")
    if x.ndim < 2 or any(size != 1 for size in x.shape[:-3]):
        where = "" if x.ndim < 2 else f"; one of a batch is weights[{', '.join('0' * (x.ndim - 3))}]"
        raise ValueError(f"weights must have shape (L, S) or (heads, L, S), not {x.shape}{where}")
    x = x.reshape(-1, *x.shape[-2:]) if x.size else x
    if not x.size:
        raise ValueError(f"weights has nothing to draw: its shape is {x.shape}")
    return x


def _sides(band: Any, width: int) -> tuple[int, int]:
    if not isinstance(band, (tuple, list)) or len(band) != 2:
        raise TypeError(f"band must be two integers (left, right), not {band!r}")
    left, right = (integer(side, "band's left and right", "integers of at least 0", 0) for side in band)
    if left + right + 1 != width:
        raise ValueError(
            f"band=({left}, {right}) has {left + right + 1} keys a query, the last axis of weights {width}: "
            'it must be the window that the weights of return_weights="band" were made with'
        )
    return left, right


def _on_the_diagonal(bands: NDArray[Any], left: int, num_keys: int, query_offset: Any) -> NDArray[Any]:
    """Return (heads, L, num_keys) with entry w of row i at key i + query_offset - left + w; NaN elsewhere."""
    count, num_queries, width = bands.shape
    offset = num_keys - num_queries
    if query_offset is not None:
        offset = integer(query_offset, "query_offset", "an integer or None")
    i, w = np.indices((num_queries, width))
    j = i + offset - left + w
    inside = (j >= 0) & (j < num_keys)
    places = np.full((count, num_queries, num_keys), np.nan, bands.dtype)
    places[:, i[inside], j[inside]] = bands[:, inside]
    return places


def _strings(x: Any, name: str) -> list[str]:
    if isinstance(x, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of strings, not one string; its characters are list({name})")
    if not isinstance(x, Iterable):
        raise TypeError(f"{name} must be a sequence of strings, not {type(x).__name__}")
    strings = list(x)
    for i, text in enumerate(strings):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be a string, not {type(text).__name__} ({text!r})")
    return strings


def _names(labels: Any, title: str, count: int, what: str) -> _Names:
    if labels is None:
        return _Names(title, [str(n) for n in range(count)], range(count), True)
    strings = _strings(labels, f"{title}_labels")
    if len(strings) != count:
        raise ValueError(f"{title}_labels has {len(strings)} strings, weights has {count} {what}: one each is needed")
    return _Names(title, [_printable(text) for text in strings], range(count), False)


def _printable(text: str) -> str:
    """Return the text on one line and not too long; control characters are escaped as in Python."""
    text = "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)
    if text.isspace():
        return "\N{OPEN BOX}" * min(len(text), LONGEST_LABEL)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _scale(heads: NDArray[Any], vmin: float | None, vmax: float | None) -> tuple[float, float]:
    finite = heads[np.isfinite(heads)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    for name, end in (("vmin", vmin), ("vmax", vmax)):
        if end is not None and not (isinstance(end, (int, float, np.number)) and math.isfinite(end)):
            raise ValueError(f"{name} must be None or a finite number, not {end!r}")
    low = least if vmin is None else float(vmin)
    high = most if vmax is None else float(vmax)
    if high <= low:
        if vmin is not None and vmax is not None:
            raise ValueError(f"vmin must be less than vmax, not {low:g} and {high:g}")
        # All weights are equal, e.g. zeros: any scale of nonzero length will do.
        low, high = (low, low + 1) if vmax is None else (high - 1, high)
    return low, high


# ----------------------------------------------------------------------------------------------- the drawing


def _draw_grid(
    heads: NDArray[Any],
    down: _Names,
    across: _Names,
    title: str | None,
    titles: list[str],
    columns: int | None,
    colors: dict[str, Any],
    colorbar: bool,
) -> Figure:
    """Draw all heads with the same cell size, then make the figure as large as they and their labels need."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, num_queries, num_keys = heads.shape
    columns = min(columns or _columns(count, num_queries / num_keys), count)
    cell_width, cell_height = _cell(num_queries, num_keys, -(-count // columns), columns)
    width, height = cell_width * num_keys, cell_height * num_queries

    figure = Figure(figsize=(SIDE, SIDE), dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def overhang(axes: Axes) -> NDArray[Any]:
        """The space that its labels need to the left, right, top and bottom of the axes."""
        box, whole = axes.bbox, axes.get_tightbbox(renderer)
        if whole is None:
            return np.zeros(4)
        return np.array([box.x0 - whole.x0, whole.x1 - box.x1, whole.y1 - box.y1, box.y0 - whole.y0]) / DPI

    panels = []
    for h, (weights, text) in enumerate(zip(heads, titles, strict=True)):
        row, column = divmod(h, columns)
        axes = figure.add_axes((0.3, 0.3, width / SIDE, height / SIDE), label=f"head {h}")
        # The tokens are the same for all heads: labels at the left and at the top are enough.
        labels = (down if column == 0 else None, across if row == 0 else None)
        image = _draw_head(axes, weights, *labels, cell_width, cell_height, "auto", colors)
        _write_title(axes, text, max(width, 1.2))
        panels.append((row, column, axes, overhang(axes)))
    bar = _draw_bar(figure.add_axes((0.9, 0.3, 0.014, 0.1), label="scale"), image) if colorbar else None

    # Where each row and column of the grid begins, in inches from the upper left corner.
    num_rows = -(-count // columns)
    lefts, rights = np.zeros(columns), np.zeros(columns)
    tops, bottoms = np.zeros(num_rows), np.zeros(num_rows)
    for row, column, _, (to_left, to_right, to_top, to_bottom) in panels:
        lefts[column] = max(lefts[column], to_left)
        rights[column] = max(rights[column], to_right)
        tops[row] = max(tops[row], to_top)
        bottoms[row] = max(bottoms[row], to_bottom)
    x = MARGIN + np.cumsum(lefts) + np.cumsum(rights) - rights + (width + GAP) * np.arange(columns)
    right = x[-1] + width + rights[-1]
    bar_height = 0.0
    if bar is not None:
        bar_height = min(max(x[-1] + width - x[0], 1.2), max(height * num_rows, 1.2), 3.5)
        bar_left = max(x[-1] + width, right) + GAP
        right = bar_left + 0.14 + overhang(bar)[1]
    head = MARGIN
    if title is not None:
        right = max(right, 4.0)
        heading = figure.text(0, 1, _wrap(title, right - MARGIN, 13), fontsize=13, fontweight="bold", va="top")
        _as_it_is([heading])
        box = heading.get_window_extent(renderer)
        right = max(right, MARGIN + box.width / DPI)
        head += box.height / DPI + GAP
    y = head + np.cumsum(tops) + np.cumsum(bottoms) - bottoms + (height + GAP) * np.arange(num_rows)
    whole_width = right + MARGIN
    whole_height = max(y[-1] + height + bottoms[-1], y[0] + bar_height + 0.06) + MARGIN

    figure.set_size_inches(whole_width, whole_height)

    def place(axes: Axes, left: float, top: float, width: float, height: float) -> None:
        bottom = 1 - (top + height) / whole_height
        axes.set_position((left / whole_width, bottom, width / whole_width, height / whole_height))

    for row, column, axes, _ in panels:
        place(axes, x[column], y[row], width, height)
    if bar is not None:
        place(bar, bar_left, y[0], 0.14, bar_height)
    if title is not None:
        heading.set_position((MARGIN / whole_width, 1 - MARGIN / whole_height))
    return figure


def _draw_into(
    axes: Axes, weights: NDArray[Any], down: _Names, across: _Names, title: str, colors: dict[str, Any], colorbar: bool
) -> Figure:
    """Draw one head into axes that the caller has placed."""
    num_queries, num_keys = weights.shape
    figure = axes.figure.figure  # the whole figure, even if the axes are in a subfigure
    box = axes.get_window_extent()
    width, height = box.width / figure.dpi / num_keys, box.height / figure.dpi / num_queries
    square = max(num_queries, num_keys) <= ELONGATED * min(num_queries, num_keys)
    if square:
        width = height = min(width, height)
    image = _draw_head(axes, weights, down, across, width, height, "equal" if square else "auto", colors)
    _write_title(axes, title, max(width * num_keys, 1.2))
    if colorbar:
        # As high as the cells, whatever room the layout gives.
        _draw_bar(axes.inset_axes((1.03, 0, 0.035, 1)), image)
    return figure


def _columns(count: int, aspect: float) -> int:
    """Return how many heads of this aspect (height / width) to put side by side for an about square grid, its last row
    full if possible."""
    ideal = min(max(math.ceil(math.sqrt(count * min(max(aspect, 1 / ELONGATED), ELONGATED))), 1), count)
    return next((n for n in range(ideal, min(2 * ideal, count) + 1) if count % n == 0), ideal)


def _cell(num_queries: int, num_keys: int, rows: int, columns: int) -> tuple[float, float]:
    """Return width and height of a cell."""
    side = min(
        CELL,
        max(SIDE, PANEL * columns) / (columns * num_keys),
        max(SIDE, PANEL * rows) / (rows * num_queries),
    )

    def stretched(count: int, other: int) -> float:
        # Otherwise one query with hundreds of keys would be a hairline.
        return min(max(CELL, side), side * max(1.0, other / count / ELONGATED))

    return stretched(num_keys, num_queries), stretched(num_queries, num_keys)


def _draw_head(
    axes: Axes,
    weights: NDArray[Any],
    down: _Names | None,
    across: _Names | None,
    cell_width: float,
    cell_height: float,
    aspect: Any,
    colors: dict[str, Any],
) -> AxesImage:
    """Draw the cells of one head, with labels if names are given."""
    num_queries, num_keys = weights.shape
    image = axes.imshow(weights, aspect=aspect, **colors)
    axes.grid(False)
    axes.spines[:].set_color(GRAY)
    axes.spines[:].set_linewidth(0.8)
    font = min(FONT, max(SMALL_FONT, 0.62 * 72 * min(cell_width, cell_height)))
    axes.tick_params(labelsize=font, pad=2, color=GRAY, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    if min(cell_width, cell_height) >= LINES_FROM:
        axes.vlines(np.arange(0.5, num_keys - 1), -0.5, num_queries - 0.5, colors=PALE, linewidths=0.5)
        axes.hlines(np.arange(0.5, num_queries - 1), -0.5, num_keys - 0.5, colors=PALE, linewidths=0.5)
        axes.set(xlim=(-0.5, num_keys - 0.5), ylim=(num_queries - 0.5, -0.5))
    axes.minorticks_off()
    axes.set_yticks([])
    axes.set_xticks([])
    if down is not None:
        step = _step(down, LINE * font / 72, cell_height)
        shown = [i for i, n in enumerate(down.numbers) if n % step == 0]
        axes.set_yticks(shown, [down.texts[i] for i in shown])
        axes.tick_params(axis="y", length=0 if step == 1 else 2.5)
        axes.set_ylabel(down.title, fontsize=font, color="0.4")
    if across is not None:
        widest = max(map(_ems, across.texts)) * font / 72
        # Numbers are skipped rather than rotated.
        turned = not across.counted and widest + 0.04 > cell_width
        step = _step(across, LINE * font / 72 if turned else widest + 0.04, cell_width)
        shown = [j for j, n in enumerate(across.numbers) if n % step == 0]
        axes.set_xticks(shown, [across.texts[j] for j in shown], rotation=90 if turned else 0)
        axes.tick_params(axis="x", length=0 if step == 1 else 2.5)
        axes.set_xlabel(across.title, fontsize=font, color="0.4")
    _as_it_is([*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label])
    return image


def _draw_bar(axes: Axes, image: AxesImage) -> Axes:
    bar = axes.figure.colorbar(image, cax=axes)
    bar.set_label("weight", fontsize=9)
    bar.outline.set_edgecolor(GRAY)
    axes.tick_params(labelsize=9, color=GRAY)
    return axes


def _write_title(axes: Axes, text: str, width: float) -> None:
    if text:
        _as_it_is([axes.set_title(_wrap(text, width, FONT), fontsize=FONT, loc="left")])


def _as_it_is(texts: list[Text]) -> None:
    """Draw tokens literally, not as formulas, with fallback fonts."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    fallbacks = [name for name in FALLBACK_FONTS if name in installed]
    for text in texts:
        text.set_parse_math(False)
        text.set_usetex(False)
        text.set_fontfamily([*text.get_fontfamily(), *fallbacks])


def _wrap(text: str, width: float, font: float) -> str:
    """Break a text into lines of about this many inches."""
    each = font / 72 * _ems(text) / max(len(text), 1)
    letters = max(int(width / max(each, 0.01)), 8)
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())


def _ems(text: str) -> float:
    """Return the approximate width of a text, as a multiple of the font size."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.64 for c in text)


def _step(names: _Names, needed: float, cell: float) -> int:
    """Return n such that every n-th name has room."""
    if not names.counted:
        return max(math.ceil(needed / cell), 1)
    # Numbers are easy to interpolate: show round ones, well apart.
    if needed > cell:
        needed *= 2
    power = 1
    while 5 * power * cell < needed:
        power *= 10
    return next(n for n in (power, 2 * power, 5 * power) if n * cell >= needed)
