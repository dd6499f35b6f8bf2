"""Attention over a real graph: which modules of Python's standard library import which, read from its sources.

    python examples/import_graph.py
    python examples/import_graph.py --module asyncio.events --output imports.png

Each module is a node and sees the modules that it imports. What it knows of itself is the words in the names that it
defines; two rounds of graph attention add what it hears from the modules it imports, weighted by how alike they are. No
weight is trained: queries and keys are the words, in a random projection that keeps angles. Then it prints which
modules ended up most alike to one of them, and how that one weighs its imports; the picture shows its neighbourhood.

    node    a module of the standard library, found and parsed (with ast), never imported
    edge    an import statement anywhere in it
    query, key    its words, 4 heads of 32 channels each; value    the same channels, all that is known of it so far
"""

import argparse
import ast
import importlib.util
import math
import re
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import numpy as np

# fastattn is imported in main(), once the arguments are known to be good: then a person who lacks it reads how to get
# it. matplotlib is imported by draw() alone.

INSTALL = "pip install ."
INSTALL_MATPLOTLIB = 'pip install ".[plot]"'
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__")

HEADS, HEAD_DIM = 4, 32
SHARPNESS = 6  # the score of two modules that use the same words
ROUNDS = 2


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        import fastattn
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    modules = read_modules(options.folder)
    if options.module not in modules:
        print(f"error: there is no module {options.module!r} in {options.folder}", file=sys.stderr)
        return 1
    names, indptr, indices = import_graph(modules)
    print(f"{len(names):,} modules, {len(indices):,} imports")
    features = project(words_of(modules), np.random.default_rng(options.seed))

    start = time.perf_counter()
    known, weights = attend(fastattn.graph_attention, features, (indptr, indices), options.rounds)
    print(f"{options.rounds} rounds of graph attention, {HEADS} heads: {1e3 * (time.perf_counter() - start):.1f} ms\n")

    node = names.index(options.module)
    edges = slice(indptr[node], indptr[node + 1])
    shares = weights[:, edges].mean(axis=0)
    print(f"{options.module} weighs what it imports (mean of {HEADS} heads):")
    for e in np.argsort(-shares)[: options.top]:
        print(f"  {shares[e]:6.1%}  {names[indices[edges][e]]}")
    for title, vectors in (("its own words", features), ("what it imports, too", known)):
        alike = similar(vectors, node)[: options.top]
        print(f"\nmost alike by {title}: {', '.join(names[i] for i in alike)}")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"\nTo have its neighbourhood drawn: {INSTALL_MATPLOTLIB}")
    else:
        draw(names, (indptr, indices), weights.mean(axis=0), node, options.output)
        print(f"\nDrawn in {options.output}")
    return 0


# ----------------------------------------------------------------------------------------------- the graph


def read_modules(folder):
    """Return {module: (names that it defines, modules that its import statements name)} of a folder of sources."""
    modules = {}
    for path in sorted(Path(folder).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(part in SKIPPED for part in parts) or not all(part.isidentifier() for part in parts):
            continue
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        try:
            with warnings.catch_warnings():  # of old sources' escapes
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        if name:
            modules[name] = defined_names(tree), imported_modules(tree, name, is_package)
    return modules


def defined_names(tree):
    """Return the names of the functions and classes of a module, also of inner ones."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in ast.walk(tree) if isinstance(node, kinds)]


def imported_modules(tree, name, is_package):
    """Return what the import statements of a module may mean: of ``from a import b`` both a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # as many dots: from the package that the module is in
                parts = name.split(".")
                keep = len(parts) - node.level + is_package
                base = ".".join([*parts[: max(keep, 0)], *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def import_graph(modules):
    """Return the names of the modules and the graph (indptr, indices): row i has the modules that i imports."""
    names = list(modules)
    numbers = {name: number for number, name in enumerate(names)}
    rows = []
    for number, name in enumerate(names):
        rows.append(sorted({numbers[other] for other in modules[name][1] if other in numbers} - {number}))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return names, indptr, np.array([other for row in rows for other in row], np.int64)


# ------------------------------------------------------------------------------------------ words and attention


def words_of(modules):
    """Return a row for each module: how often each word stands in the names it defines, rare words counting more."""
    bags = []
    for name, (defined, _) in modules.items():
        text = " ".join([*defined, *name.split(".")])
        bags.append([word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text) if len(word) > 2])
    columns = {word: i for i, word in enumerate(sorted({word for bag in bags for word in bag}))}
    counts = np.zeros((len(bags), len(columns)), np.float32)
    for row, bag in zip(counts, bags, strict=True):
        for word in bag:
            row[columns[word]] += 1
    shares = (counts > 0).mean(axis=0)
    return np.log1p(counts) * -np.log(shares + 1e-9)


def project(words, rng):
    """Return (nodes, heads, channels) of length 1 in each head: random projections, which keep angles roughly."""
    directions = rng.standard_normal((words.shape[1], HEADS * HEAD_DIM), np.float32)
    return unit((words @ directions).reshape(len(words), HEADS, HEAD_DIM))


def unit(x):
    """Return vectors of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def attend(graph_attention, features, graph, rounds):
    """Return what each module knows after some rounds, and the weights (heads, edges) of the last of them."""
    known = features
    for _ in range(rounds):
        # All heads of a node lie together in memory; the function wants the heads first, which costs nothing.
        heads = known.swapaxes(0, 1)
        heard, weights = graph_attention(heads, heads, heads, graph, scale=SHARPNESS, return_weights=True)
        known = unit(known + heard.swapaxes(0, 1))
    return known, weights


def similar(vectors, node):
    """Return the other nodes, the most alike first."""
    alike = np.einsum("nhc,hc->n", vectors, vectors[node])
    return [i for i in np.argsort(-alike, kind="stable") if i != node]


# -------------------------------------------------------------------------------------------------- the picture


def draw(names, graph, shares, node, path):
    """Draw a module in the middle, what it imports around it, and what those import further out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    indptr, indices = graph

    def imports(i):
        """The most important first."""
        return sorted(((shares[e], indices[e]) for e in range(indptr[i], indptr[i + 1])), reverse=True)

    figure, axes = plt.subplots(figsize=(9, 9), layout="constrained")
    place = {node: (0.0, 0.0)}
    first = [i for _, i in imports(node)][:16]
    for turn, i in enumerate(first):
        place[i] = polar(1.0, turn / max(len(first), 1))
    for turn, i in enumerate(first):
        others = [j for _, j in imports(i) if j not in place][:4]
        for k, j in enumerate(others):
            place[j] = polar(1.75, (turn + (k + 0.5) / max(len(others), 1) - 0.5) / len(first))
    for i in (node, *first):
        for share, j in imports(i):
            if j in place:
                ends = np.array([place[i], place[j]])
                colour = "tab:red" if i == node else "tab:blue"
                axes.plot(*ends.T, color=colour, linewidth=0.4 + 12 * share, alpha=0.35, zorder=1)
    for i, (x, y) in place.items():
        axes.scatter([x], [y], s=60 if i in (node, *first) else 20, color="black", zorder=2)
        axes.annotate(
            names[i], (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=12 if i == node else 8
        )
    axes.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), aspect="equal")
    axes.set_title(f"What {names[node]} imports, and what that imports; width: attention")
    axes.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def polar(radius, turn):
    """Return a place on a circle; a turn is the whole of it."""
    return radius * math.cos(2 * math.pi * turn), radius * math.sin(2 * math.pi * turn)


# -------------------------------------------------------------------------------------------------- arguments


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
        return number

    def folder(text):
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
        return text

    def picture(text):
        path = Path(text)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .svg or .pdf")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
        return path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--module", default="http.client", metavar="NAME", help="the one to look at (http.client)")
    parser.add_argument(
        "--folder", type=folder, default=sysconfig.get_path("stdlib"), help="sources (default: the standard library's)"
    )
    parser.add_argument(
        "--output", type=picture, default="import_graph.png", metavar="FILE", help="the picture (import_graph.png)"
    )
    parser.add_argument("--rounds", type=count, default=ROUNDS, metavar="N", help=f"of attention (default {ROUNDS})")
    parser.add_argument("--top", type=count, default=8, metavar="N", help="modules to print (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start of all that is random (default 0)")
    return parser.parse_args(arguments)


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    return f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n    {INSTALL}"


if __name__ == "__main__":
    sys.exit(main())
