"""Attend to more keys and values than the workers of a cluster have memory for.

    python examples/cluster_attention.py --size 2GB --workers 3

The cluster is Dask's, of processes on this machine, whose memory is limited to four fifths of the files; with the
address of a scheduler in place of `LocalCluster` it would be any other. `from_file` is the function to copy: it says
which part of a file a block is, and the task that needs the block maps that part and no other. From there on it is a
call like any other; a worker that dies is replaced, and what it had is computed again.

The rest of the script makes two files of the given size in a temporary folder, shows the progress, says how much memory
all workers together took, and compares a few of the queries with a single call over both files, mapped.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# fastattn and Dask are imported where they are needed, once the arguments are known to be good: then a person who lacks
# one reads how to get it.

INSTALL = 'pip install ".[dask]"'
HEADS, HEAD_DIM = 8, 64
KEY = HEADS * HEAD_DIM * 4  # bytes of a key of all heads
LEAST_MEMORY = 200_000_000  # of a worker: Python, Dask and two blocks
TOLERANCE = 1e-5  # of values of about 1; the differences are those of rounding


def from_file(path, num_keys, part):
    """Return a Dask array (HEADS, num_keys, HEAD_DIM) over a file of float32 (num_keys, HEADS, HEAD_DIM).

    A block is `part` keys. (A `numpy.memmap` that is handed to `dask.array.from_array` would be sent to the workers,
    with all that it maps.)
    """
    import dask.array as da

    chunks = da.core.normalize_chunks((HEADS, part, HEAD_DIM), (HEADS, num_keys, HEAD_DIM))
    meta = np.empty((0, 0, 0), np.float32)
    return da.map_blocks(map_block, path=str(path), chunks=chunks, dtype=np.float32, meta=meta)


def map_block(path, block_info=None):
    """Return the part of a file that is this block."""
    _, (start, stop), _ = block_info[None]["array-location"]
    block = np.memmap(path, np.float32, "r", offset=start * KEY, shape=(stop - start, HEADS, HEAD_DIM))
    return block.swapaxes(0, 1)


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        from distributed import Client, LocalCluster, progress
        from distributed.diagnostics import MemorySampler

        import fastattn
        from fastattn.integrations.dask import dot_product_attention
    except ImportError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    num_keys = max(1, options.size // (2 * KEY))
    size = 2 * num_keys * KEY
    memory = int(0.8 * size / options.workers)
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    if size > free:
        print(f"error: files of {size / 1e9:,.2f} GB do not fit: {free / 1e9:,.2f} GB are free", file=sys.stderr)
        return 1
    if memory < LEAST_MEMORY:
        least = LEAST_MEMORY * options.workers / 0.8
        print(
            f"error: {options.workers} workers with four fifths of {size / 1e6:,.0f} MB have {memory / 1e6:,.0f} MB "
            f"each, and need {LEAST_MEMORY / 1e6:,.0f}: pass --size {least / 1e6:.0f}MB or more, or fewer --workers",
            file=sys.stderr,
        )
        return 1
    rng = np.random.default_rng(options.seed)
    query = rng.standard_normal((HEADS, options.queries, HEAD_DIM), np.float32)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = [Path(folder) / name for name in ("keys", "values")]
        for path in paths:
            write_file(path, num_keys, rng)
        print(
            f"{HEADS} heads, {options.queries:,} queries, {num_keys:,} keys: files of {size / 1e6:,.0f} MB, "
            f"{options.workers} workers that may take {options.workers * memory / 1e6:,.0f} MB together",
            flush=True,
        )
        limits = {"n_workers": options.workers, "threads_per_worker": 1, "memory_limit": memory}
        with LocalCluster(**limits, dashboard_address=":0") as cluster, Client(cluster) as client:
            key, value = (from_file(path, num_keys, options.part) for path in paths)
            out = dot_product_attention(query, key, value, is_causal=options.causal)
            sampler, start = MemorySampler(), time.perf_counter()
            with sampler.sample("call", client=client, interval=0.1):
                (future,) = futures = client.compute([out])
                progress(futures, notebook=False)
                out = future.result()
            elapsed = time.perf_counter() - start
            peak = max((taken for _, taken in sampler.samples["call"]), default=0)
        print(f"\n{elapsed:.2f} s, {size / elapsed / 1e9:.2f} GB/s; workers took {peak / 1e6:,.0f} MB together at most")

        rows = sorted({0, options.queries // 2, options.queries - 1})
        mask = None
        if options.causal:  # said in another way, because these rows do not follow each other
            mask = np.arange(num_keys) <= num_keys - options.queries + np.array(rows)[:, None]
        shape = num_keys, HEADS, HEAD_DIM
        key, value = (np.memmap(path, np.float32, "r", shape=shape).swapaxes(0, 1) for path in paths)
        whole = fastattn.dot_product_attention(query[:, rows], key, value, mask=mask)
        error = np.abs(out[:, rows] - whole).max()
        # A folder with mapped files cannot be removed everywhere.
        del key, value
    print(f"Queries {', '.join(map(str, rows))} against all the keys in one call: largest difference {error:.1e}")
    return 0 if error <= TOLERANCE else 1


def write_file(path, num_keys, rng):
    """Write random numbers to a file: all heads of a key before the next key."""
    with open(path, "wb") as file:
        for start in range(0, num_keys, 1 << 13):
            keys = min(1 << 13, num_keys - start)
            file.write(rng.standard_normal((keys, HEADS, HEAD_DIM), np.float32))


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
            raise argparse.ArgumentTypeError(f"must be a size as 800MB or 20GB, not {text!r}")
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))

    def folder(text):
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
        return text

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=size, default="800MB", help="size of both files together (default 800MB)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--queries", type=count, default=16, metavar="N", help="queries (default 16)")
    parser.add_argument("--part", type=count, default=1 << 13, metavar="N", help="keys a block (default 8192)")
    parser.add_argument("--causal", action="store_true", help="a query sees no key after its own position")
    parser.add_argument("--folder", type=folder, help="where the temporary folder is made")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start of all that is random (default 0)")
    return parser.parse_args(arguments)


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (getattr(error.__cause__ or error, "name", None) or str(error)).partition(".")[0]
    return f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n    {INSTALL}"


if __name__ == "__main__":
    sys.exit(main())
