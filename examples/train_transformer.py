"""Learn what each name in a Python function is, from where else it stands: a Transformer, trained in NumPy.

    python examples/train_transformer.py

reads functions of Python's standard library and hides how their names are spelled: what is left of

    def scale(items, factor):            def N17(N4, N30):
        total = sum(items)                   N9 = N2(N4)
        return total * factor                return N9 * N30

are numbers, drawn anew each time, so that a name says nothing but where else it stands. A small Transformer learns to
tag each of them: the function that is defined, a parameter, a local variable, something from outside (N2, a global or
builtin name), an attribute, or a keyword of a call. To know N9 from N30 in the last line it must look where they stand
before. The same model with a window of a few tokens cannot, and is trained beside it: the difference is what attention
over the whole function is worth. Both train in less than a minute on two cores; then the program prints how often each
is right in files that it never saw, and draws the losses when matplotlib is installed.

The model: an embedding, layers of `fastattn.MultiHeadAttention` and a feed-forward net, each behind a layer norm and
beside a residual connection, and a linear layer for the tags. Each step of it returns its result and the function that
takes a gradient back, as `MultiHeadAttention.vjp` does. Its weights are the layer's own arrays (`parameters`), so that
the optimizer, AdamW, changes them in place.

Shapes, in the words used below: B functions, L tokens in the longest of them, D channels, V kinds of tokens.
"""

import argparse
import ast
import bisect
import importlib.util
import io
import keyword
import sys
import sysconfig
import time
import tokenize
import warnings
from pathlib import Path

import numpy as np

# fastattn and tqdm are imported in main(), once the arguments are known to be good: then a person who lacks one
# reads how to get it. matplotlib is imported by draw() alone.

INSTALL = 'pip install ".[examples]"'
INSTALL_MATPLOTLIB = "pip install matplotlib"

TAGS = ("function", "parameter", "local", "outside", "attribute", "keyword")
SHORTEST, LONGEST, MOST_NAMES = 12, 128, 40
WINDOW = 2  # tokens to each side that a layer without the whole function sees

# What the model reads: 0 for anything rare, then the words and signs of Python, then names by their drawn numbers.
WORDS = (*keyword.kwlist, *"""( ) [ ] { } , : . ; @ = -> + - * / // % ** & | ^ ~ << >> < > == != <= >= := += -= *=
/= //= %= **= &= |= ^= <<= >>= ...""".split(), "NUMBER", "STRING", "NEWLINE", "INDENT", "DEDENT")  # fmt: skip
CODES = {word: code for code, word in enumerate(WORDS, 1)}
NUM_WORDS = 1 + len(WORDS)
NUM_CODES = NUM_WORDS + MOST_NAMES


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        from tqdm import tqdm

        import fastattn
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    start = time.perf_counter()
    train_set, held_out = read_functions(options.folder)
    if min(len(train_set), len(held_out)) < options.batch:
        print(f"error: there are too few functions in {options.folder}", file=sys.stderr)
        return 1
    print(
        f"{len(train_set):,} functions to learn from, {len(held_out):,} of other files to judge by "
        f"(read in {time.perf_counter() - start:.1f} s)",
        flush=True,
    )
    losses, right = {}, {}
    for name, window in (("whole function", None), (f"{WINDOW} tokens to each side", WINDOW)):
        model = Tagger(fastattn.MultiHeadAttention, np.random.default_rng(options.seed), window_size=window)
        steps = train(model, train_set, np.random.default_rng(options.seed), options.steps, options.batch)
        losses[name] = []
        with tqdm(steps, total=options.steps, desc=name, unit=" steps") as bar:
            for loss in bar:
                losses[name].append(loss)
                bar.set_postfix(loss=f"{np.mean(losses[name][-50:]):.3f}", refresh=False)
        right[name] = judge(model, held_out, np.random.default_rng(options.seed), options.batch)
    print(describe(right))
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"To have the losses drawn: {INSTALL_MATPLOTLIB}")
    else:
        draw(losses, {name: rates["all names"] for name, rates in right.items()}, options.output)
        print(f"Drawn in {options.output}")
    return 0


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
        return number

    def folder(text):
        path = Path(text)
        if not path.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
        return path

    def picture(text):
        path = Path(text)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .svg or .pdf")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
        return path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder",
        type=folder,
        default=Path(sysconfig.get_path("stdlib")),
        metavar="FOLDER",
        help="whose *.py files to read (default: Python's standard library)",
    )
    parser.add_argument(
        "--output",
        type=picture,
        default="train_transformer.png",
        metavar="FILE",
        help="the picture (default train_transformer.png)",
    )
    parser.add_argument("--steps", type=count, default=900, metavar="N", help="steps of training (default 900)")
    parser.add_argument("--batch", type=count, default=32, metavar="N", help="functions a step (default 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start of all that is random (default 0)")
    return parser.parse_args(arguments)


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    return (
        f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n"
        f"    {INSTALL}\n\nFor the picture: {INSTALL_MATPLOTLIB}"
    )


# ---------------------------------------------------------------------------------------- functions and tags


def read_functions(folder):
    """Return the functions of a folder's files, to learn from and, of every fifth file, to judge by.

    A function is a pair of arrays over its tokens: codes, where names are numbered from NUM_WORDS on in the order in
    which they come, and tags, -1 for what is no name.
    """
    sets = [], []
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():  # of old sources' escapes
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        starts = [token.start for token in tokens]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = bisect.bisect_left(starts, (node.lineno, node.col_offset))
                end = bisect.bisect_left(starts, (node.end_lineno, node.end_col_offset))
                found = read_function(node, tokens[first:end])
                if found:
                    sets[number % 5 == 4].append(found)
    return sets


def read_function(node, tokens):
    """Return the codes and tags of a function's tokens, or None if it is too long or too short, or has inner ones."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    parts = list(ast.walk(node))
    if any(isinstance(part, inner) for part in parts[1:]):
        return None
    arguments = {part.arg for part in parts if isinstance(part, ast.arg)}
    outside = {name for part in parts if isinstance(part, (ast.Global, ast.Nonlocal)) for name in part.names}
    assigned = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    assigned |= {part.name for part in parts if isinstance(part, ast.ExceptHandler) and part.name}
    assigned |= {
        (alias.asname or alias.name).partition(".")[0]
        for part in parts
        if isinstance(part, (ast.Import, ast.ImportFrom))
        for alias in part.names
    }
    keywords = {(part.lineno, part.col_offset) for part in parts if isinstance(part, ast.keyword) and part.arg}

    codes, tags, names, before = [], [], {}, None
    for token in tokens:
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        word, tag = token.string, -1
        if token.type == tokenize.NAME and not keyword.iskeyword(word):
            if before == ".":
                tag = TAGS.index("attribute")
            elif before == "def":
                tag = TAGS.index("function")
            elif token.start in keywords:
                tag = TAGS.index("keyword")
            elif word in arguments:
                tag = TAGS.index("parameter")
            elif word in assigned - outside:
                tag = TAGS.index("local")
            else:
                tag = TAGS.index("outside")
            codes.append(NUM_WORDS + names.setdefault(word, len(names)))
        else:
            kind = tokenize.tok_name[token.type]
            codes.append(CODES.get(kind if kind in CODES else word, 0))
        tags.append(tag)
        before = word
    if not SHORTEST <= len(codes) <= LONGEST or len(names) > MOST_NAMES:
        return None
    return np.array(codes), np.array(tags)


def pad(functions, rng):
    """Return codes and tags of a batch, (B, L), padded on the right, and the lengths (B,); names get new numbers."""
    lengths = np.array([len(codes) for codes, _ in functions])
    codes = np.zeros((len(functions), lengths.max()), np.intp)
    tags = np.full_like(codes, -1)
    for i, (own, own_tags) in enumerate(functions):
        drawn = np.concatenate([np.arange(NUM_WORDS), NUM_WORDS + rng.permutation(MOST_NAMES)])
        codes[i, : len(own)], tags[i, : len(own)] = drawn[own], own_tags
    return codes, tags, lengths


# ----------------------------------------------------------------------------------------------- the model
#
# Each step returns its result and the function that takes a gradient of the loss for it back: to the gradient for what
# came in, and, in a dict, to those of its parameters.


def normalise(x, gain, shift):
    """Layer norm: mean 0 and variance 1 for each token, then a learned scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    normal = centred / spread

    def backward(d):
        d_normal = d * gain
        d_x = d_normal - d_normal.mean(axis=-1, keepdims=True)
        d_x -= normal * np.mean(d_normal * normal, axis=-1, keepdims=True)
        return d_x / spread, {"gain": np.sum(d * normal, axis=(0, 1)), "shift": d.sum(axis=(0, 1))}

    return normal * gain + shift, backward


def linear(x, w, b):
    """A projection."""

    def backward(d):
        return d @ w.T, {"w": rows(x).T @ rows(d), "b": d.sum(axis=(0, 1))}

    return x @ w + b, backward


def feed_forward(x, w1, b1, w2, b2):
    """Two projections with max(x, 0) in between."""
    hidden, back1 = linear(x, w1, b1)
    hidden = np.maximum(hidden, 0)
    out, back2 = linear(hidden, w2, b2)

    def backward(d):
        d_hidden, last = back2(d)
        d_x, first = back1(d_hidden * (hidden > 0))
        return d_x, {"w1": first["w"], "b1": first["b"], "w2": last["w"], "b2": last["b"]}

    return out, backward


def cross_entropy(logits, tags):
    """Minus the mean logarithm of the right tags' probabilities, over all that have one."""
    named = tags >= 0
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = np.eye(logits.shape[-1], dtype=logits.dtype)[tags] * named[..., None]
    count = np.count_nonzero(named)

    def backward():
        return (np.exp(log_probability) * named[..., None] - wanted) / count

    return -np.sum(wanted * log_probability) / count, backward


def rows(x):
    """All tokens of all functions, one after the other."""
    return x.reshape(-1, x.shape[-1])


class Tagger:
    """A Transformer that tags tokens.

    Parameters
    ----------
    attention : class
        `fastattn.MultiHeadAttention`.
    rng : numpy.random.Generator
        Where the first parameters come from.
    window_size : int, optional
        Tokens to each side that a layer sees. Default: all of them.
    dtype : dtype, optional
        float32, or float64 to check the gradients.
    """

    def __init__(self, attention, rng, window_size=None, dtype=np.float32, width=64, heads=4, hidden=128, layers=2):
        def normal(*shape):
            return (rng.standard_normal(shape) / shape[0] ** 0.5).astype(dtype)

        def zeros(n):
            return np.zeros(n, dtype)

        self.window_size = window_size
        self.parameters = {"embedding": rng.standard_normal((NUM_CODES, width)).astype(dtype)}
        self.layers = []
        for i in range(layers):
            # Queries and keys begin alike: so each token first looks at those like it, and a name at itself elsewhere.
            w = normal(width, width)
            layer = attention(
                w, w, normal(width, width), normal(width, width), num_heads=heads, b_out=zeros(width),
                rotary_base=100.0, rotary_dim=width // heads // 2,
            )  # fmt: skip
            self.layers.append(layer)
            self.parameters |= {f"{i}.attention.{name}": array for name, array in layer.parameters().items()}
            for norm in ("norm1", "norm2"):
                self.parameters |= {f"{i}.{norm}.gain": zeros(width) + 1, f"{i}.{norm}.shift": zeros(width)}
            self.parameters |= {f"{i}.ff.w1": normal(width, hidden), f"{i}.ff.b1": zeros(hidden)}
            self.parameters |= {f"{i}.ff.w2": normal(hidden, width), f"{i}.ff.b2": zeros(width)}
        self.parameters |= {"norm.gain": zeros(width) + 1, "norm.shift": zeros(width)}
        self.parameters |= {"out.w": normal(width, len(TAGS)), "out.b": zeros(len(TAGS))}

    def of(self, part):
        """Return the parameters of a part of the model, by their own names."""
        return {name[len(part) + 1 :]: p for name, p in self.parameters.items() if name.startswith(part + ".")}

    def forward(self, codes, lengths):
        """Return the logits of the tags (B, L, tags), and the function that takes their gradient back to all."""
        x, steps = self.parameters["embedding"][codes], []

        def residual(x, norm, part, function):
            normal, back_norm = normalise(x, **self.of(norm))
            y, back = function(normal)
            steps.append((norm, back_norm, part, back))
            return x + y

        for i, layer in enumerate(self.layers):

            def attention(x, layer=layer):
                y, back = layer.vjp(x, key_lengths=lengths, window_size=self.window_size)
                return y, lambda d: (lambda gradients: (gradients.pop("x"), gradients))(back(d))

            x = residual(x, f"{i}.norm1", f"{i}.attention", attention)
            x = residual(x, f"{i}.norm2", f"{i}.ff", lambda x, i=i: feed_forward(x, **self.of(f"{i}.ff")))
        x, back_norm = normalise(x, **self.of("norm"))
        logits, back_out = linear(x, **self.of("out"))

        def backward(d_logits):
            gradients = {}

            def take(part, answer):
                d, own = answer
                gradients.update({f"{part}.{name}": gradient for name, gradient in own.items()})
                return d

            d = take("norm", back_norm(take("out", back_out(d_logits))))
            for norm, back_norm_, part, back in reversed(steps):
                d = d + take(norm, back_norm_(take(part, back(d))))
            gradients["embedding"] = np.eye(NUM_CODES, dtype=d.dtype)[rows(codes[..., None])[:, 0]].T @ rows(d)
            return gradients

        return logits, backward

    def loss_and_gradients(self, codes, tags, lengths):
        """Return the mean cross-entropy of the names' tags, and its gradient for each parameter."""
        logits, backward = self.forward(codes, lengths)
        loss, d_logits = cross_entropy(logits, tags)
        return loss, backward(d_logits())


# --------------------------------------------------------------------------------------- training and judging


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), after clipping all gradients by their norm."""

    def __init__(self, parameters, decay=0.01, most=1.0):
        self.parameters, self.decay, self.most, self.count = parameters, decay, most, 0
        self.mean = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.square = {name: np.zeros_like(p) for name, p in parameters.items()}

    def step(self, gradients, rate):
        """Change all parameters in place."""
        self.count += 1
        norm = np.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
        shrink = min(1.0, self.most / max(norm, 1e-12))
        for name, p in self.parameters.items():
            g, mean, square = gradients[name] * shrink, self.mean[name], self.square[name]
            mean += 0.1 * (g - mean)
            square += 0.02 * (g * g - square)
            # Both means began at zero; divided by their weights so far they are means of what came.
            direction = mean / (1 - 0.9**self.count) / (np.sqrt(square / (1 - 0.98**self.count)) + 1e-8)
            if p.ndim == 2:
                direction += self.decay * p
            p -= rate * direction


def train(model, functions, rng, steps, batch, rate=3e-3, warm_up=50):
    """Train the model, and yield the loss of each step. Functions of a batch are about equally long."""
    functions = sorted(functions, key=lambda function: len(function[0]))
    optimizer = AdamW(model.parameters)
    for step in range(1, steps + 1):
        first = rng.integers(len(functions) - batch + 1)
        loss, gradients = model.loss_and_gradients(*pad(functions[first : first + batch], rng))
        optimizer.step(gradients, rate * min(step / warm_up, 1 - (step - 1) / steps))
        yield float(loss)


def judge(model, functions, rng, batch):
    """Return how often the model is right: for all names together, and for those of each tag."""
    functions = sorted(functions, key=lambda function: len(function[0]))
    right, count = np.zeros(len(TAGS)), np.zeros(len(TAGS))
    for first in range(0, len(functions), batch):
        codes, tags, lengths = pad(functions[first : first + batch], rng)
        hits = model.forward(codes, lengths)[0].argmax(axis=-1) == tags
        count += np.bincount(tags[tags >= 0], minlength=len(TAGS))
        right += np.bincount(tags[hits], minlength=len(TAGS))
    return {"all names": right.sum() / count.sum(), **dict(zip(TAGS, right / np.maximum(count, 1), strict=True))}


def describe(right):
    """Return a table of how often each model is right."""
    lines = ["", f"{'right in files kept from it':28}" + "".join(f"{name:>26}" for name in right)]
    for tag in ("all names", *TAGS):
        lines.append(f"    {tag:24}" + "".join(f"{rates[tag]:26.1%}" for rates in right.values()))
    return "\n".join(lines)


def draw(losses, right, path):
    """Draw the loss of each model against the steps, smoothed, with its rate of right tags at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for (name, values), color in zip(losses.items(), ("tab:blue", "tab:red"), strict=True):
        width = max(1, len(values) // 30)
        smooth = np.convolve(values, np.full(width, 1 / width), "valid")
        axes.plot(np.arange(len(values)) + 1, values, color=color, alpha=0.15, linewidth=0.8)
        label = f"attention to the {name}" if name.startswith("whole") else f"attention to {name}"
        axes.plot(np.arange(width, len(values) + 1), smooth, color=color, label=f"{label}: {right[name]:.1%} right")
    axes.set(xlabel="step of training", ylabel="loss (cross-entropy of a name's tag)", ylim=(0, None))
    axes.set_title("What is each name in a Python function? Names are hidden behind numbers", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
