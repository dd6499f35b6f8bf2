"""Attend to keys and values that lie in files, and that may be larger than the memory.

    python examples/larger_than_memory.py --size 20GB

`attend_in_parts` is the function to copy. It walks over the keys part by part: `return_lse=True` gives, with the
output for a part, the logarithm of the sum of its weights, and with that `merge_attention` joins two outputs into the
one for both parts, exactly. At any moment there is one part of the keys and values in use, and the output.

The rest of the script makes two files of the given size in a temporary folder, maps them with `numpy.memmap`, says how
fast that goes, and compares a few of the queries with a single call over all the keys.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# fastattn and tqdm are imported where they are needed, once the arguments are known to be good: then a person who
# lacks one reads how to get it.

INSTALL = 'pip install ".[examples]"'
HEADS, HEAD_DIM = 8, 64
TOLERANCE = 1e-5  # of values of about 1; the differences are those of rounding


def attend_in_parts(query, key, value, part, *, is_causal=False, key_lengths=None, progress=None, **rules):
    """Return dot-product attention over all the keys, of which it looks at `part` at a time.

    query (..., L, D), key (..., S, D) and value (..., S, E) are arrays or memory maps. `rules` are keywords of
    `fastattn.dot_product_attention` that mean the same for each part, as scale, softcap and num_threads do. `progress`
    is called with the number of keys of each part.
    """
    from fastattn import dot_product_attention, merge_attention

    num_queries, num_keys = query.shape[-2], key.shape[-2]
    lengths = num_keys if key_lengths is None else np.asarray(key_lengths)
    out = lse = None
    for start in range(0, num_keys, part):
        stop = min(start + part, num_keys)
        # Positions count from the first key of the part; the last query lines up with the last key that is valid.
        rules["query_offset"] = lengths - num_queries - start
        rules["key_lengths"] = np.clip(lengths - start, 0, stop - start)
        keys, values = key[..., start:stop, :], value[..., start:stop, :]
        more, more_lse = dot_product_attention(query, keys, values, is_causal=is_causal, return_lse=True, **rules)
        out, lse = (more, more_lse) if out is None else merge_attention([out, more], [lse, more_lse])
        if progress is not None:
            progress(stop - start)
    return out


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        from tqdm import tqdm

        import fastattn
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    # Keys and values, a float32 each.
    num_keys = max(1, options.size // (2 * HEADS * HEAD_DIM * 4))
    size = 2 * num_keys * HEADS * HEAD_DIM * 4
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    if size > free:
        print(f"error: files of {size / 1e9:,.2f} GB do not fit: {free / 1e9:,.2f} GB are free", file=sys.stderr)
        return 1
    rng = np.random.default_rng(options.seed)
    query = rng.standard_normal((HEADS, options.queries, HEAD_DIM), np.float32)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bar = {"unit": "B", "unit_scale": True, "unit_divisor": 1000}
        with tqdm(total=size, desc="Writing", **bar) as progress:
            key, value = (make_file(Path(folder) / name, num_keys, rng, progress.update) for name in ("keys", "values"))
        print(
            f"{HEADS} heads, {options.queries:,} queries, {num_keys:,} keys: files of {size / 1e9:,.2f} GB", flush=True
        )
        for title in ("First pass", "Second pass"):
            start = time.perf_counter()
            with tqdm(total=size, desc=title, **bar) as progress:
                out = attend_in_parts(
                    query,
                    key,
                    value,
                    options.part,
                    is_causal=options.causal,
                    num_threads=options.threads,
                    progress=lambda keys, bar=progress: bar.update(size // num_keys * keys),
                )
            elapsed = time.perf_counter() - start
            print(
                f"{title}: {elapsed:.2f} s, {size / elapsed / 1e9:.2f} GB/s in parts of {options.part:,} keys",
                flush=True,
            )

        rows = sorted({0, options.queries // 2, options.queries - 1})
        mask = None
        if options.causal:  # said in another way, because these rows do not follow each other
            mask = np.arange(num_keys) <= num_keys - options.queries + np.array(rows)[:, None]
        whole = fastattn.dot_product_attention(query[:, rows], key, value, mask=mask, num_threads=options.threads)
        error = np.abs(out[:, rows] - whole).max()
        # A folder with mapped files cannot be removed everywhere.
        del key, value
    print(f"Queries {', '.join(map(str, rows))} against all the keys in one call: largest difference {error:.1e}")
    return 0 if error <= TOLERANCE else 1


def make_file(path, num_keys, rng, progress):
    """Write random numbers to a file, and return it as a memory map (HEADS, num_keys, HEAD_DIM)."""
    with open(path, "wb") as file:
        for start in range(0, num_keys, 1 << 13):
            # A key of all heads comes before the next key: so a part is one piece of the file, and keys can be added.
            keys = min(1 << 13, num_keys - start)
            progress(file.write(rng.standard_normal((keys, HEADS, HEAD_DIM), np.float32)))
        # Have it read from the disk the first time, where the system lets us choose.
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(AttributeError, OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return np.memmap(path, np.float32, "r", shape=(num_keys, HEADS, HEAD_DIM)).swapaxes(0, 1)


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
        return number

    def size(text):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
        if not match:
            raise argparse.ArgumentTypeError(f"must be a size as 200MB or 20GB, not {text!r}")
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))

    def folder(text):
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
        return text

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=size, default="200MB", help="size of both files together (default 200MB)")
    parser.add_argument("--queries", type=count, default=16, metavar="N", help="queries (default 16)")
    parser.add_argument("--part", type=count, default=1 << 14, metavar="N", help="keys a part (default 16384)")
    parser.add_argument("--causal", action="store_true", help="a query sees no key after its own position")
    parser.add_argument("--folder", type=folder, help="where the temporary folder is made")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start of all that is random (default 0)")
    parser.add_argument("--threads", type=count, metavar="N", help="number of threads (default: all CPUs)")
    return parser.parse_args(arguments)


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    return f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n    {INSTALL}"


if __name__ == "__main__":
    sys.exit(main())
