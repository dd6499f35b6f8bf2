"""Pictures of weights: literal labels, sizes that follow the tokens, helpful errors; and BertViz's shapes."""

import io
import itertools
import sys
import warnings

import fresh_process
import numpy as np
import pytest

import fastattn
from fastattn import plot

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402  (what follows needs it)

TOKENS = ["[CLS]", "the", "$x_1$", "##ing", "_", "^2", "\\frac{", "$", "\n", " ", "\N{GRINNING FACE}", "naïve"]


def weights_of(*shape, seed=0):
    return fastattn.softmax(2 * np.random.default_rng(seed).normal(size=shape))


def png(figure):
    """The figure as a PNG, with warnings as errors."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    return buffer.getvalue()


def texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def boxes(figure):
    """The boxes of all texts, in pixels, and of the figure."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    found = list(figure.texts)
    for axes in figure.axes:
        found += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        found += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    return [text.get_window_extent(renderer) for text in found if text.get_text()]


# ------------------------------------------------------------------------------------------------ one head


def test_one_head():
    weights = weights_of(12, 12)
    figure = plot.heatmap(weights, TOKENS, TOKENS)
    assert isinstance(figure, Figure)
    axes, scale = figure.axes
    np.testing.assert_array_equal(axes.images[0].get_array(), weights)
    assert axes.images[0].get_clim() == (0, weights.max())
    assert axes.get_title(loc="left") == ""
    assert scale.get_ylabel() == "weight"
    png(figure)


@pytest.mark.parametrize("usetex", [False, True])
def test_tokens_are_written_as_they_are(usetex):
    """No mathematics, no LaTeX; and invisible characters made visible."""
    with matplotlib.rc_context({"text.usetex": usetex}):
        figure = plot.heatmap(weights_of(12, 12), TOKENS, TOKENS, title="$a_b$", titles=["$x^"], colorbar=False)
    shown = ["\\n" if token == "\n" else "\N{OPEN BOX}" if token == " " else token for token in TOKENS]
    axes = figure.axes[0]
    assert texts(axes.xaxis) == texts(axes.yaxis) == shown
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), *figure.texts, axes._left_title):
        assert not text.get_parse_math()
        assert not text.get_usetex()
    if not usetex:
        png(figure)


def test_other_scripts_are_drawn():
    """With or without a font for them: at worst matplotlib warns, and draws boxes."""
    labels = ["注意力", "मेरा", "\N{ROBOT FACE}", "שלום"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        figure = plot.heatmap(weights_of(4, 4), labels, labels)
        assert texts(figure.axes[0].yaxis) == labels
        png_of_boxes = io.BytesIO()
        figure.savefig(png_of_boxes, format="png")


def test_fallback_fonts_are_asked(monkeypatch):
    """A letter that matplotlib's first font lacks comes from the next one."""
    letter = "\N{SCRIPT SMALL G}"
    monkeypatch.setattr(plot, "FALLBACK_FONTS", ("No such font", "STIXGeneral"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(plot.heatmap(np.eye(2), [f"a{letter}", "b"], titles=[letter]))


def test_long_labels_are_cut():
    labels = ["internationalization" * 3, "x"]
    shown = texts(plot.heatmap(np.eye(2), labels).axes[0].yaxis)
    assert shown == [("internationalization" * 3)[:23] + "…", "x"]


def test_labels_without_room_are_thinned():
    """The remaining labels do not overlap, are at their own rows, and have ticks."""
    names = [f"token{i}" for i in range(300)]
    figure = plot.heatmap(weights_of(300, 300), names, names)
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert 40 < len(texts(axis)) < 150
        assert texts(axis) == [names[round(at)] for at in axis.get_ticklocs()]
        assert axis.get_major_ticks()[0].tick1line.get_markersize() > 0
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for labels, side in ((axes.get_yticklabels(), "y"), (axes.get_xticklabels(), "x")):
        spans = sorted(getattr(label.get_window_extent(renderer), f"interval{side}").tolist() for label in labels)
        assert all(min(a) < max(a) <= min(b) for a, b in itertools.pairwise(spans))


def test_positions_where_no_labels_are_given():
    axes = plot.heatmap(weights_of(7, 100)).axes[0]
    assert texts(axes.yaxis) == [str(n) for n in range(7)]
    assert texts(axes.xaxis) == [str(n) for n in range(0, 100, int(texts(axes.xaxis)[1]))]


@pytest.mark.parametrize(
    ("shape", "labelled"),
    [
        ((1, 1), True),
        ((2, 2), False),
        ((12, 12), True),
        ((60, 60), True),
        ((1, 200), True),
        ((200, 13), False),
        ((5, 2, 3), True),
        ((6, 12, 12), True),
        ((3, 1, 50), False),
        ((2, 150, 4), True),
    ],
)
def test_nothing_is_clipped_and_titles_do_not_touch(shape, labelled):
    """For any shape, with long labels and titles: everything is within the figure, which is not too large."""
    labels = [[f"{TOKENS[0]}{i}-long-as-it-is"[: 3 + i % 20] for i in range(n)] for n in shape[-2:]]
    title = "A title that is quite a bit longer than the picture of so few tokens"
    titles = [f"head {h}, whose title is also long" for h in range(np.prod(shape[:-2], dtype=int))]
    figure = plot.heatmap(
        weights_of(*shape), *(labels if labelled else ()), title=title, titles=titles if labelled else None
    )
    found = boxes(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for box in found:
        assert -1 <= box.x0 <= box.x1 <= width + 1
        assert -1 <= box.y0 <= box.y1 <= height + 1
    assert width < 15 * figure.dpi
    assert height < 18 * figure.dpi
    heading = found[0]
    assert not any(heading.overlaps(box) for box in found[1:])


@pytest.mark.parametrize("shape", [(3, 3), (30, 90), (6, 20, 20), (2, 40, 12)])
def test_cells_are_squares(shape):
    figure = plot.heatmap(weights_of(*shape))
    width, height = figure.get_size_inches()
    box = figure.axes[0].get_position()
    assert box.width * width / shape[-1] == pytest.approx(box.height * height / shape[-2], rel=1e-6)


def test_size_follows_the_tokens():
    sizes = [plot.heatmap(weights_of(n, n)).get_size_inches().max() for n in (3, 6, 12, 24)]
    assert sizes == sorted(sizes)
    assert 2 * sizes[0] < sizes[-1]


def test_a_single_query_is_no_hairline():
    figure = plot.heatmap(weights_of(1, 300))
    assert figure.axes[0].get_position().height * figure.get_size_inches()[1] > 0.1


# ---------------------------------------------------------------------------------------------- several heads


def test_grid_of_heads():
    weights = weights_of(12, 5, 7)
    figure = plot.heatmap(weights, TOKENS[:5], TOKENS[:7])
    *heads, scale = figure.axes
    assert len(heads) == 12
    assert [axes.get_title(loc="left") for axes in heads] == [f"head {h}" for h in range(12)]
    for axes, expected in zip(heads, weights, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        assert axes.images[0].get_clim() == (0, weights.max())
    assert scale.get_ylim() == (0, weights.max())
    assert texts(heads[0].xaxis) == texts(heads[1].xaxis) != []
    assert texts(heads[1].yaxis) == texts(heads[-1].xaxis) == []
    png(figure)


def test_columns_and_titles():
    figure = plot.heatmap(weights_of(5, 4, 4), columns=2, titles=["a", "b", "c", "$d$", "e"], colorbar=False)
    assert len(figure.axes) == 5
    corners = [(axes.get_position().x0, axes.get_position().y1) for axes in figure.axes]
    assert len({round(x, 6) for x, _ in corners}) == 2
    assert len({round(y, 6) for _, y in corners}) == 3
    assert figure.axes[3].get_title(loc="left") == "$d$"
    assert len(plot.heatmap(weights_of(2, 4, 4), columns=9).axes) == 3


def test_axes_of_length_one_are_left_out():
    weights = weights_of(1, 1, 3, 4, 5)
    assert len(plot.heatmap(weights).axes) == 4
    (axes, _) = plot.heatmap(weights[:, :, :1]).axes
    assert axes.get_title(loc="left") == ""


# -------------------------------------------------------------------------------------------------- the band


@pytest.mark.parametrize(("num_keys", "offset"), [(9, None), (12, None), (6, None), (9, 3), (9, -2)])
def test_band_at_its_places(num_keys, offset):
    """As the whole matrix, but grey outside of the band."""
    rng = np.random.default_rng(3)
    query, key = rng.normal(size=(2, 9, 4)), rng.normal(size=(2, num_keys, 4))
    rules = {"query_offset": offset}
    band = fastattn.truncated_attention(query, key, key, 2, 1, return_weights="band", **rules)[1]
    full = fastattn.truncated_attention(query, key, key, 2, 1, return_weights=True, **rules)[1]
    figure = plot.heatmap(band, key_labels=[f"k{j}" for j in range(num_keys)], band=(2, 1), query_offset=offset)
    first = num_keys - 9 if offset is None else offset
    distance = np.arange(num_keys) - np.arange(9)[:, None] - first
    for axes, expected in zip(figure.axes[:2], full, strict=True):
        drawn = axes.images[0].get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn), (distance < -2) | (distance > 1))
        np.testing.assert_allclose(drawn.filled(0), expected, atol=1e-15)
    png(figure)


def test_band_of_many_rows():
    weights = weights_of(200, 13)
    figure = plot.heatmap(weights, band=(8, 4))
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), weights)
    assert texts(axes.xaxis)[7:10] == ["−1", "0", "+1"]  # noqa: RUF001
    png(figure)


def test_distance_zero_is_always_labelled():
    shown = texts(plot.heatmap(weights_of(300, 301), band=(150, 150)).axes[0].xaxis)
    assert "0" in shown
    assert len(shown) < 60


# ------------------------------------------------------------------------------------------- into other axes


def test_into_axes_of_others():
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert plot.heatmap(weights_of(12, 12), TOKENS, TOKENS, ax=left, title="left") is figure
    plot.heatmap(weights_of(1, 3, 90), ax=right, colorbar=False, titles=["right"], title="above")
    assert left.get_title(loc="left") == "left"
    assert right.get_title(loc="left") == "above\nright"
    assert texts(left.yaxis)[2] == "$x_1$"
    assert tuple(figure.get_size_inches()) == (8, 4)
    png(figure)
    part = figure.subfigures(1, 1).subplots()
    assert plot.heatmap(weights_of(3, 3), ax=part) is figure


def test_pyplot_is_left_alone():
    """No figure has to be closed, pyplot is not even imported; nor does `import fastattn` import matplotlib."""
    code = """
import sys, numpy as np, fastattn
assert "fastattn.plot" not in sys.modules
import fastattn.plot
fastattn.plot.bertviz([np.ones((1, 2, 2))])
assert "matplotlib" not in sys.modules
fastattn.plot.heatmap(np.eye(3)).savefig(__import__("io").BytesIO())
assert "matplotlib.pyplot" not in sys.modules
print("done")
"""
    assert "done" in fresh_process.run(code)


def test_settings_are_left_alone():
    with matplotlib.rc_context({"axes.grid": True, "image.origin": "upper", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        png(plot.heatmap(weights_of(2, 4, 4)))
        assert dict(matplotlib.rcParams) == before


# ------------------------------------------------------------------------------------------------- the scale


def test_scale():
    weights = weights_of(3, 4, 4)
    clim = plot.heatmap(weights, vmin=None, vmax=1, cmap="viridis").axes[0].images[0].get_clim()
    assert clim == (weights.min(), 1)
    for same in (np.zeros((2, 2)), np.full((2, 2), np.nan), np.full((2, 2), -3.0)):
        png(plot.heatmap(same))
        png(plot.heatmap(same, vmin=None))
    hidden = np.eye(3)
    hidden[0, 1] = np.nan
    hidden[0, 2] = np.inf
    assert plot.heatmap(hidden).axes[0].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, bool, "bfloat16"])
def test_dtypes(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    png(plot.heatmap(np.eye(3).astype(dtype)))
    assert plot.bertviz([np.eye(3).astype(dtype)[None]])[0].dtype == np.float32


# ------------------------------------------------------------------------------------------------ the errors


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weights": np.ones(3)}, ValueError, r"weights must have shape \(L, S\) or \(heads, L, S\), not \(3,\)"),
        ({"weights": np.ones((2, 4, 3, 3))}, ValueError, r"not \(2, 4, 3, 3\); one of a batch is weights\[0\]"),
        ({"weights": np.ones((2, 1, 4, 3, 3))}, ValueError, r"weights\[0, 0\]"),
        ({"weights": np.ones((0, 3))}, ValueError, r"weights has nothing to draw: its shape is \(0, 3\)"),
        ({"weights": np.ones((0, 3, 3))}, ValueError, "weights has nothing to draw"),
        ({"weights": [["a"]]}, TypeError, "weights must be an array of real numbers"),
        ({"weights": EYE * 1j}, TypeError, "weights .* complex128"),
        ({"query_labels": ["a"]}, ValueError, "query_labels has 1 strings, weights has 3 rows"),
        ({"key_labels": list("abcd")}, ValueError, "key_labels has 4 strings, weights has 3 columns"),
        ({"key_labels": "abc"}, TypeError, r"list\(key_labels\)"),
        ({"query_labels": 3}, TypeError, "query_labels must be a sequence of strings, not int"),
        ({"query_labels": ["a", b"b", "c"]}, TypeError, r"query_labels\[1\] must be a string, not bytes"),
        ({"titles": ["a", "b"]}, ValueError, "titles has 2 strings, weights has 1 heads"),
        ({"titles": "a"}, TypeError, "titles must be a sequence of strings"),
        ({"title": 3}, TypeError, "title must be a string, not int"),
        ({"columns": 0}, ValueError, "columns must be an integer of at least 1, not 0"),
        ({"columns": 1.5}, TypeError, "columns must be an integer of at least 1, not 1.5"),
        ({"band": 1}, TypeError, r"band must be two integers \(left, right\), not 1"),
        ({"band": (1, -1)}, ValueError, "left and right must be integers of at least 0"),
        ({"band": (2, 1)}, ValueError, r"band=\(2, 1\) has 4 keys a query, the last axis of weights 3"),
        ({"band": (1, 1), "key_labels": list("abc"), "query_offset": 0.5}, TypeError, "query_offset .* not 0.5"),
        ({"query_offset": 1}, ValueError, "only with band and key_labels"),
        ({"vmin": np.nan}, ValueError, "vmin must be None or a finite number"),
        ({"vmax": "1"}, ValueError, "vmax must be None or a finite number, not '1'"),
        ({"vmin": 2, "vmax": 1}, ValueError, "vmin must be less than vmax, not 2 and 1"),
        ({"cmap": "no such map"}, ValueError, "no such map"),
        ({"weights": np.ones((2, 3, 3)), "ax": "any"}, ValueError, "ax takes one head, not 2"),
        ({"ax": "any"}, TypeError, "ax must be matplotlib Axes, not str"),
    ],
)
def test_errors_teach(arguments, error, words):
    with pytest.raises(error, match=words):
        plot.heatmap(**{"weights": EYE, **arguments})


def test_missing_matplotlib_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "fastattn\[plot\]"'):
        plot.heatmap(EYE)


# --------------------------------------------------------------------------------------------------- BertViz


def format_attention(attention):
    """What BertViz does with its input, in NumPy."""
    for layer in attention:
        assert layer.ndim == 4
        assert layer.shape[0] == 1
    return np.stack([layer.squeeze(0) for layer in attention])


@pytest.mark.parametrize("heads", [1, 4])
def test_bertviz(heads):
    expected = weights_of(3, heads, 5, 7)
    for weights in (expected, list(expected), expected[:, None], tuple(expected[:, None]), list(expected.tolist())):
        attention = plot.bertviz(weights)
        assert isinstance(attention, tuple)
        assert format_attention(attention).shape == (3, heads, 5, 7)
        np.testing.assert_array_equal(format_attention(attention), expected.astype(np.float32))
        for layer in attention:
            assert layer.dtype == np.float32
            assert layer.flags.c_contiguous
            assert layer.flags.writeable


def test_bertviz_takes_any_layout():
    """Read-only views with negative strides, which PyTorch would refuse."""
    weights = weights_of(1, 2, 4, 4).astype(np.float32)[..., ::-1]
    weights.flags.writeable = False
    (layer,) = plot.bertviz([weights])
    np.testing.assert_array_equal(layer, weights)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    assert torch.from_numpy(layer).shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ([np.ones((2, 4, 3, 3))], ValueError, r"\(1, heads, L, S\), not \(2, 4, 3, 3\): .* weights\[0\]\[:1\]"),
        (np.ones((4, 3, 3)), ValueError, r"bertviz\(\[weights\]\)"),
        ([np.ones(3)], ValueError, r"weights\[0\] must have shape"),
        ([np.ones((0, 3, 3))], ValueError, r"weights\[0\] has nothing to show"),
        ([], ValueError, "at least one layer"),
        ([np.ones((2, 3, 3)), np.ones((2, 3, 4))], ValueError, r"weights\[1\] has shape \(2, 3, 4\), weights\[0\]"),
        ([np.array([[["a"]]])], TypeError, r"weights\[0\] must be an array of real numbers"),
        (3, TypeError, "a sequence with an array a layer, not 3"),
        ("abc", TypeError, "not 'abc'"),
        (np.array(1.0), TypeError, "a sequence"),
    ],
)
def test_bertviz_errors_teach(weights, error, words):
    with pytest.raises(error, match=words):
        plot.bertviz(weights)
