"""Learn to rewrite dates, and draw where the model looked: the figure that made additive attention famous.

    python examples/alignment.py "Thursday, 3 May 1979"

trains in about ten seconds a small model that turns dates as people write them into ISO dates (1979-05-03), says
how many of the dates kept from it come out right, and shows which characters of the source it looked at for each
character that it wrote: as text, and as a heat map in alignment.png when matplotlib is installed.

The model is that of Bahdanau, Cho and Bengio ("Neural machine translation by jointly learning to align and
translate", 2014) without its recurrent parts, in plain NumPy. One call of `fastattn.additive_attention` aligns a
batch of sources of unequal lengths with what is written; `fastattn.additive_attention_vjp` is its way back.

    query   where in the result we are, and the last two characters written
    key     a character of the source with its neighbours: by the keys the model finds the place
    value   the character alone: what it writes can only come from the characters that it looked at

Shapes, in the words used below: B texts, S characters in the longest of them, L = 10 characters in an ISO date.
"""

import argparse
import datetime
import importlib.util
import random
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

# fastattn and tqdm are imported in main(), once the arguments are known to be good: then a person who lacks one
# reads how to get it. matplotlib is imported by draw() alone.

INSTALL = 'pip install ".[examples]"'
INSTALL_MATPLOTLIB = "pip install matplotlib"
TEXTS = ("Thursday, 3 May 1979", "05/03/79", "the 20th of July 1969", "9.11.1989")
MAX_CHARACTERS = 48

MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# With slashes the month comes first, as in the United States; with dots the day does, as in Europe.
SPELLINGS = (
    "{day} {month} {year}",
    "{day}-{month}-{year}",
    "{weekday} {day} {month} {year}",
    "{weekday}, {day} {month} {year}",
    "{weekday}, {month} {day}, {year}",
    "{month} {day}, {year}",
    "{month} {nth} {year}",
    "{month} {nth}, {year}",
    "{nth} of {month}, {year}",
    "the {nth} of {month} {year}",
    "{m}/{d}/{year}",
    "{m}/{d}/{year}",
    "{d}.{m}.{year}",
    "{d}.{m}.{year}",
    "{d}. {m}. {year}",
    "{full_year}-{m}-{d}",
)

# From the first year up to the second; half of the dates are from the century that two digits may stand for.
YEARS = ((1969, 2069), (1000, 3000))

# What the model reads: 0 is what lies before the first and after the last character, 1 is the space.
SOURCE_CODES = {character: code for code, character in enumerate(" abcdefghijklmnopqrstuvwxyz0123456789.,/-'", 1)}
SPACE = SOURCE_CODES[" "]
NUM_SOURCE = 1 + len(SOURCE_CODES)
REACH = 3  # neighbours on each side that a key shows

# What it writes; one code more stands for what lies before the first character written.
TARGET_CHARACTERS = "0123456789-"
NUM_TARGET = len(TARGET_CHARACTERS)
LENGTH = len("1979-05-03")


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        from tqdm import tqdm

        import fastattn
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1

    attention = fastattn.additive_attention, fastattn.additive_attention_vjp
    model = Aligner(*attention, np.random.default_rng(options.seed))
    rng = random.Random(options.seed)
    print(f"Learning from {options.steps * options.batch:,} spellings of dates", flush=True)
    start = time.perf_counter()
    with tqdm(train(model, rng, options.steps, options.batch), total=options.steps, unit=" steps") as bar:
        for loss in bar:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    elapsed = time.perf_counter() - start
    sources, targets = random_dates(options.held_out, rng, held_out=True)
    right = np.mean([written == target for written, target in zip(model.translate(sources)[0], targets, strict=True)])
    print(f"Trained in {elapsed:.1f} seconds. Of {len(sources):,} dates kept from it, it writes {right:.1%} right.\n")

    alignments = []
    for source, written, weights in zip(options.texts, *model.translate(options.texts), strict=True):
        alignments.append((source, written, weights[:, : len(source)]))
        print(describe(*alignments[-1]), end="\n\n")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"To have it drawn as a heat map: {INSTALL_MATPLOTLIB}")
    else:
        draw(alignments, options.output)
        print(f"Drawn in {options.output}")
    return 0


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
        return number

    def date_text(text):
        text = " ".join(text.split())
        if not 0 < len(text) <= MAX_CHARACTERS:
            raise argparse.ArgumentTypeError(f"a date has 1 to {MAX_CHARACTERS} characters, not {len(text)}")
        return text

    def picture(text):
        path = Path(text)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .svg or .pdf")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
        return path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "texts",
        nargs="*",
        type=date_text,
        metavar="text",
        help='a date as people write it, as in "3 May 1979", 05/03/79 (month first) or 3.5.1979 (day first)',
    )
    parser.add_argument(
        "--output", type=picture, default="alignment.png", metavar="FILE", help="the picture (default alignment.png)"
    )
    parser.add_argument("--steps", type=count, default=1500, metavar="N", help="steps of training (default 1500)")
    parser.add_argument("--batch", type=count, default=48, metavar="N", help="dates a step (default 48)")
    parser.add_argument("--held-out", type=count, default=1000, metavar="N", help="dates to judge by (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start of all that is random (default 0)")
    options = parser.parse_args(arguments)
    options.texts = options.texts or list(TEXTS)
    return options


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    return (
        f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n"
        f"    {INSTALL}\n\nFor the picture: {INSTALL_MATPLOTLIB}"
    )


# ----------------------------------------------------------------------------------------------- the dates


def random_dates(count, rng, held_out=False):
    """Return `count` dates as people write them, and the same dates as ISO 8601 has them.

    Every tenth day of the calendar is held out: in training the model sees it in no spelling at all.
    """
    ranges = [[datetime.date(year, 1, 1).toordinal() for year in years] for years in YEARS]
    sources, targets = [], []
    while len(sources) < count:
        day = rng.randrange(*rng.choice(ranges))
        if (day % 10 == 0) == held_out:
            date = datetime.date.fromordinal(day)
            sources.append(spell(date, rng))
            targets.append(date.isoformat())
    return sources, targets


def spell(date, rng):
    """Return the date in one of the ways in which people write dates."""
    month, weekday, year = MONTHS[date.month - 1], WEEKDAYS[date.weekday()], str(date.year)
    ending = "th" if date.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    digits = rng.choice(("", "02"))
    return rng.choice(SPELLINGS).format(
        day=date.day,
        nth=f"{date.day}{ending}",
        d=format(date.day, digits),
        m=format(date.month, digits),
        month=rng.choice((month, month, month[:3], month[:3] + ("" if date.month == 5 else "."))),
        weekday=rng.choice((weekday, weekday[:3])),
        full_year=year,
        # Two digits mean what they mean to POSIX: 1969 to 2068.
        year=year[2:] if 1969 <= date.year <= 2068 and rng.random() < 0.5 else year,
    )


# ----------------------------------------------------------------------------------------------- the model


class Aligner:
    """A translator from dates to ISO dates: additive attention between two small layers.

    Parameters
    ----------
    attention, attention_vjp : callable
        `fastattn.additive_attention` and `fastattn.additive_attention_vjp`, or functions that are called like them.
    rng : numpy.random.Generator
        Where the first parameters come from.
    dtype : dtype, optional
        float32, or float64 to check the gradients.
    """

    def __init__(self, attention, attention_vjp, rng, dtype=np.float32, hidden=32, features=24, mixed=32):
        self.attention, self.attention_vjp = attention, attention_vjp
        self.dtype = np.dtype(dtype)
        window, place = (2 * REACH + 1) * NUM_SOURCE, 2 * (NUM_TARGET + 1) + LENGTH
        # Each sum starts with a variance of about one; of a one-hot's numbers a single one counts.
        scales = {
            "w_query": ((place, hidden), 1),
            "w_key": ((window, hidden), (2 * REACH + 1) ** -0.5),
            "b_hidden": ((hidden,), 0),
            "w_score": ((hidden,), hidden**-0.5),
            "w_value": ((NUM_SOURCE, features), 1),
            "w_mix": ((features + place, mixed), features**-0.5),
            "b_mix": ((mixed,), 0),
            "w_out": ((mixed, NUM_TARGET), mixed**-0.5),
            "b_out": ((NUM_TARGET,), 0),
        }
        self.parameters = {
            name: (scale * rng.standard_normal(shape)).astype(self.dtype) for name, (shape, scale) in scales.items()
        }

    def keys(self, sources):
        """Return the windows around each character (B, S, window), the characters themselves, and the lengths (B,)."""
        lengths = np.array([len(source) for source in sources])
        codes = np.zeros((len(sources), lengths.max() + 2 * REACH), np.intp)
        for row, source in zip(codes, sources, strict=True):
            row[REACH : REACH + len(source)] = [SOURCE_CODES.get(character.lower(), SPACE) for character in source]
        windows = np.lib.stride_tricks.sliding_window_view(codes, 2 * REACH + 1, axis=1)
        windows = one_hot(windows, NUM_SOURCE, self.dtype)
        return windows.reshape(*windows.shape[:2], -1), windows[:, :, REACH], lengths

    def queries(self, written):
        """Return the last two characters and the place (B, L, 2 * 12 + 10) that each character is written from."""
        before = np.pad(written, ((0, 0), (2, 0)), constant_values=NUM_TARGET)
        before = one_hot(before, NUM_TARGET + 1, self.dtype)
        place = np.broadcast_to(np.eye(LENGTH, dtype=self.dtype), (len(written), LENGTH, LENGTH))
        return np.concatenate([before[:, :LENGTH], before[:, 1 : LENGTH + 1], place], axis=-1)

    def arguments(self, query, key, value, lengths):
        """Return what attention and its way back take: arrays, and keywords."""
        p = self.parameters
        names = "w_query", "w_key", "b_hidden"
        return (query, key, value, p["w_score"]), {name: p[name] for name in names} | {"key_lengths": lengths}

    def read(self, seen, query):
        """Return the logits of the next characters (B, L, 11), and what the way back needs."""
        p = self.parameters
        joined = np.concatenate([seen, query], axis=-1)
        mixed = np.tanh(joined @ p["w_mix"] + p["b_mix"])
        return mixed @ p["w_out"] + p["b_out"], joined, mixed

    def loss_and_gradients(self, sources, targets):
        """Return the mean cross-entropy of the characters, and its gradient for each parameter.

        The right characters so far are given to the model whatever it would have written (teacher forcing), so
        that all L characters are learned in one call.
        """
        p = self.parameters
        target = np.array([[TARGET_CHARACTERS.index(character) for character in text] for text in targets])
        query = self.queries(target)
        key, characters, lengths = self.keys(sources)
        value = characters @ p["w_value"]
        arrays, keywords = self.arguments(query, key, value, lengths)
        seen, lse = self.attention(*arrays, **keywords, return_lse=True)
        logits, joined, mixed = self.read(seen, query)

        logits -= logits.max(axis=-1, keepdims=True)
        log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = one_hot(target, NUM_TARGET, self.dtype)
        loss = -(wanted * log_probability).sum() / target.size

        # And back, from the last step to the first. `d_x` is the gradient of the loss for x.
        d_logits = (np.exp(log_probability) - wanted) / target.size
        d_mixed = (d_logits @ p["w_out"].T) * (1 - mixed**2)
        d_seen = d_mixed @ p["w_mix"][: value.shape[-1]].T
        # Queries and keys are not learned here: of them, only their projections are asked for.
        names = "value", "w_score", "w_query", "w_key", "b_hidden"
        kept = {"output": seen, "lse": lse}
        answer = self.attention_vjp(d_seen, *arrays, **keywords, **kept, wrt=names)
        gradients = dict(zip(names, answer, strict=True))
        gradients["w_value"] = outer_sum(characters, gradients.pop("value"))
        gradients["w_mix"] = outer_sum(joined, d_mixed)
        gradients["b_mix"] = d_mixed.sum((0, 1))
        gradients["w_out"] = outer_sum(mixed, d_logits)
        gradients["b_out"] = d_logits.sum((0, 1))
        return loss, gradients

    def translate(self, sources):
        """Return the ISO date of each source as the model writes it, and where it looked (B, L, S)."""
        key, characters, lengths = self.keys(sources)
        value = characters @ self.parameters["w_value"]
        written = np.zeros((len(sources), LENGTH), np.intp)
        looked = []
        for place in range(LENGTH):
            query = self.queries(written)[:, place : place + 1]
            arrays, keywords = self.arguments(query, key, value, lengths)
            seen, weights = self.attention(*arrays, **keywords, return_weights=True)
            logits, *_ = self.read(seen, query)
            written[:, place] = logits[:, 0].argmax(axis=-1)
            looked.append(weights)
        return ["".join(TARGET_CHARACTERS[code] for code in row) for row in written], np.concatenate(looked, axis=1)


def outer_sum(x, d_y):
    """Return the gradient for w of y = x @ w, over all rows of all texts."""
    return x.reshape(-1, x.shape[-1]).T @ d_y.reshape(-1, d_y.shape[-1])


def one_hot(codes, size, dtype):
    """Return an array with one axis more: 1 where the last index is the code, 0 elsewhere."""
    return np.eye(size, dtype=dtype)[codes]


def train(model, rng, steps, batch, rate=0.03):
    """Train the model on fresh random dates with Adam, and yield the loss of each step."""
    mean = {name: np.zeros_like(parameter) for name, parameter in model.parameters.items()}
    square = {name: np.zeros_like(parameter) for name, parameter in model.parameters.items()}
    for step in range(1, steps + 1):
        loss, gradients = model.loss_and_gradients(*random_dates(batch, rng))
        for name, parameter in model.parameters.items():
            mean[name] += 0.1 * (gradients[name] - mean[name])
            square[name] += 0.01 * (gradients[name] ** 2 - square[name])
            # Both means began at zero; divided by their weights so far they are means of what came.
            direction = mean[name] / (1 - 0.9**step) / (np.sqrt(square[name] / (1 - 0.99**step)) + 1e-8)
            parameter -= rate * (1 - (step - 1) / steps) * direction
        yield loss


# --------------------------------------------------------------------------------------------- the results


def describe(source, written, weights):
    """Return a translation and its alignment as text: a row for each character written."""
    try:
        datetime.date.fromisoformat(written)
        verdict = ""
    except ValueError:
        verdict = "  (which is no date)"
    lines = [f"{source} -> {written}{verdict}", "", f"      {source}"]
    for character, row in zip(written, weights, strict=True):
        shades = "".join(" .:-=+*#%@"[min(int(10 * weight), 9)] for weight in row)
        most = [i for i in np.argsort(-row, kind="stable")[:3] if row[i] >= 0.1]
        looked = ", ".join(f"{source[i]!r} {row[i]:.0%}" for i in most)
        lines.append(f"    {character} {shades}   {looked}")
    return "\n".join(lines)


TITLE = "Where the model looked for each character that it wrote"
CAPTION = (
    "Across: the date as it was given (\N{OPEN BOX} is a space). Down: the ISO date as the model wrote it, a row for "
    "each character. A row sums to 1. Hyphens always stand at the same places, so that nothing has to be looked up "
    "for them."
)


def draw(alignments, path):
    """Draw each (source, written, weights) as a heat map, all of them in one picture."""
    from matplotlib.figure import Figure

    # In inches. Cells are squares of one size, and panels fill the width as words fill lines.
    cell, gap, margin, head, widest, narrowest = 0.28, 0.7, 0.55, 1.2, 11.0, 6.0
    panel_height = cell * LENGTH
    corners, x, y, right = [], 0.0, 0.0, 0.0
    for source, _, _ in alignments:
        if x and x + cell * len(source) > widest:
            x, y = 0.0, y + panel_height + gap
        corners.append((margin + x, head + y))
        right = max(right, x + cell * len(source))
        x += cell * len(source) + gap
    width = margin + max(right, narrowest) + 1.1
    caption = textwrap.fill(CAPTION, int(12 * (width - 2 * margin)))
    height = head + y + panel_height + 0.6 + 0.21 * (caption.count("\n") + 1)
    figure = Figure(figsize=(width, height), dpi=150)

    def add_axes(left, top, across, down):
        return figure.add_axes((left / width, 1 - (top + down) / height, across / width, down / height))

    for (source, written, weights), (left, top) in zip(alignments, corners, strict=True):
        axes = add_axes(left, top, cell * len(source), panel_height)
        image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(source)), list(source.replace(" ", "\N{OPEN BOX}")))
        axes.set_yticks(range(LENGTH), list(written))
        axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=12)
        # Thin lines between the cells.
        axes.set_xticks(np.arange(0.5, len(source) - 1), minor=True)
        axes.set_yticks(np.arange(0.5, LENGTH - 1), minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_color("0.6")

    bar = figure.colorbar(image, cax=add_axes(margin + right + 0.3, head, 0.16, panel_height))
    bar.set_label("share of the attention", fontsize=10)
    bar.outline.set_edgecolor("0.6")
    figure.text(margin / width, 1 - 0.5 / height, TITLE, fontsize=15, fontweight="bold")
    figure.text(margin / width, 0.3 / height, caption, fontsize=10, color="0.25", linespacing=1.5)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
