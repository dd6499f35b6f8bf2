"""The machine's limits: FMA peak, sums of tanh, pairs of bfloat16, read and copy bandwidth, on one or several threads.

A share of the peak says more than milliseconds, and carries over to other machines. But clocks drift, so a peak is only
meaningful if measured next to what it is compared with: `fma`, `triples`, `read` and `copy` return a `Probe`, a call
that is interleaved with the libraries by `measure.interleave`.

    python benchmarks/hardware.py            prints the limits
"""

import ctypes
import functools
import itertools
import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("hardware.c")
ALIGNMENT = 64
# Long enough for the cost of starting threads to be negligible.
PROBE_SECONDS = 0.02


@dataclass(frozen=True)
class InstructionSet:
    flags: tuple
    vector_bytes: int
    chains: int
    runnable: str = "1"


if platform.machine().lower() in ("aarch64", "arm64"):
    # Up to 4 units x 4 cycles, 32 registers.
    INSTRUCTION_SETS = {"neon": InstructionSet((), 16, 24)}
else:
    # Best first. 12 chains in 16 registers; AVX-512 has 32. SSE2 multiplies and adds in two instructions.
    INSTRUCTION_SETS = {
        "avx512": InstructionSet(("-mavx512f",), 64, 20, '__builtin_cpu_supports("avx512f")'),
        "avx2": InstructionSet(
            ("-mavx2", "-mfma"), 32, 12, '__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")'
        ),
        "baseline": InstructionSet((), 16, 12),
    }


# Not among those above: what multiplies bfloat16, in pairs or by tiles, is but one dtype's kernels.
PAIRS = InstructionSet(
    ("-mavx512f", "-mavx512bf16"), 64, 20, '__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")'
)


TILES = InstructionSet(("-mavx512f", "-mamx-tile", "-mamx-bf16"), 64, 20, "gets_tiles()")


@dataclass(frozen=True)
class Probe:
    """One call of `call` does `work` (floating-point operations, triples or bytes), counting all its threads."""

    call: object
    work: float


@functools.cache
def load(isa, dtype="float32"):
    """The compiled hardware.c, or None if the compiler or the CPU lacks the instruction set."""
    spec = {"pairs": PAIRS, "tiles": TILES}.get(isa) or INSTRUCTION_SETS[isa]
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "hardware.so"
        defined = {
            "REAL": {"float32": "float", "float64": "double"}[dtype],
            "VECTOR_BYTES": spec.vector_bytes,
            "CHAINS": spec.chains,
            "RUNNABLE": spec.runnable,
        }
        flags = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-shared", "-fPIC", *spec.flags]
        flags += [f"-D{name}={value}" for name, value in defined.items()]
        command = [compiler, *flags, str(SOURCE), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if not spec.flags:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            return None
        loaded = ctypes.CDLL(str(library))
    i64, address = ctypes.c_int64, ctypes.c_void_p
    loaded.multiply_add.argtypes = (i64, ctypes.c_double, ctypes.c_double)
    loaded.multiply_add.restype = ctypes.c_double
    loaded.add_fractions.argtypes = (i64, ctypes.c_double, ctypes.c_double, ctypes.c_double)
    loaded.add_fractions.restype = ctypes.c_double
    loaded.read_words.argtypes = (address, i64, i64, ctypes.c_int)
    loaded.read_words.restype = ctypes.c_uint32
    loaded.read_edges.argtypes = (address, i64, address, i64, address, i64, i64, i64)
    loaded.read_edges.restype = ctypes.c_uint32
    loaded.copy_bytes.argtypes = (address, address, i64, i64)
    loaded.copy_bytes.restype = None
    return loaded if loaded.runnable() else None


def best_isa():
    return next(isa for isa in INSTRUCTION_SETS if load(isa))


@functools.cache
def _pool(threads):
    return ThreadPoolExecutor(threads)


def _on_threads(work, threads):
    """A call that runs work(0) ... work(threads - 1), each on its own thread, and returns the results."""
    if threads == 1:
        return lambda: [work(0)]
    pool = _pool(threads)
    return lambda: list(pool.map(work, range(threads)))


def _repeats(work_once):
    """How many repetitions of `work_once(n)` last PROBE_SECONDS."""
    for repeats in (4**power for power in itertools.count()):
        start = time.perf_counter()
        work_once(repeats)
        seconds = time.perf_counter() - start
        if seconds > PROBE_SECONDS / 8:
            return max(1, round(repeats * PROBE_SECONDS / seconds))


@functools.cache
def fma(dtype="float32", isa=None, threads=1):
    """Multiply-adds in registers; an FMA counts as two operations."""
    library = load(isa or best_isa(), dtype)
    factor, addend = -0.999, 0.5
    lanes, chains, steps = library.lanes(), library.chains(), library.steps()

    def expected(blocks):
        start = 1 + np.arange(chains) + np.arange(blocks)[:, None] % 8
        limit = addend / (1 - factor)
        return float(np.sum((limit + factor**steps * (start - limit)) * lanes))

    blocks = _repeats(lambda n: library.multiply_add(n, factor, addend))
    np.testing.assert_allclose(library.multiply_add(blocks, factor, addend), expected(blocks), rtol=1e-3)
    call = _on_threads(lambda _: library.multiply_add(blocks, factor, addend), threads)
    return Probe(call, 2.0 * blocks * steps * chains * lanes * threads)


@functools.cache
def pairs(threads=1):
    """Multiply-adds of pairs of bfloat16 in registers, each pair four operations. None if the CPU has no such
    instruction."""
    library = load("pairs") if "avx512" in INSTRUCTION_SETS else None
    if library is None:
        return None
    library.multiply_pairs.argtypes, library.multiply_pairs.restype = (ctypes.c_int64,), ctypes.c_double
    lanes, chains, steps = library.lanes(), library.chains(), library.steps()
    blocks = _repeats(library.multiply_pairs)
    expected = sum(lanes * (1 + c + block % 8 + steps) for block in range(blocks) for c in range(chains))
    np.testing.assert_allclose(library.multiply_pairs(blocks), expected, rtol=1e-6)
    call = _on_threads(lambda _: library.multiply_pairs(blocks), threads)
    return Probe(call, 4.0 * blocks * steps * chains * lanes * threads)


@functools.cache
def tiles(threads=1):
    """The same by AMX. None if the CPU or the system has no tiles."""
    library = load("tiles") if "avx512" in INSTRUCTION_SETS else None
    if library is None:
        return None
    library.multiply_tiles.argtypes, library.multiply_tiles.restype = (ctypes.c_int64,), ctypes.c_double
    steps = library.steps() // 16
    blocks = _repeats(library.multiply_tiles)
    assert library.multiply_tiles(blocks) == 4 * 16 * steps * blocks, "the probe of tiles did not multiply"
    call = _on_threads(lambda _: library.multiply_tiles(blocks), threads)
    return Probe(call, 2.0 * 16 * 16 * 32 * 4 * steps * blocks * threads)


@functools.cache
def triples(isa=None, threads=1):
    """Terms of additive scores in float32, each for a query, a key and a channel, with five instructions per vector.

    The limit if every term takes a reciprocal; sharing one among several is faster. None if the instruction set has no
    reciprocal estimate that hardware.c supports.
    """
    library = load(isa or best_isa())
    per_block = library.fractions_per_block()
    if not per_block:
        return None
    a, b, weight = 1.25, 0.75, 0.375

    def add(blocks):
        return library.add_fractions(blocks, a, b, weight)

    blocks = _repeats(add)
    np.testing.assert_allclose(add(blocks), blocks * per_block * weight / (1 + a * b), rtol=1e-3)
    return Probe(_on_threads(lambda _: add(blocks), threads), float(blocks * per_block * threads))


def _buffer(nbytes):
    """Ones, aligned to a cache line, as 32-bit words."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    words = raw[start : start + nbytes].view(np.uint32)
    words[:] = 1
    return words


@functools.lru_cache(maxsize=4)
def read(nbytes, threads=1):
    """Reads of a buffer of `nbytes`, shared among the threads."""
    return read_arrays([_buffer(nbytes)], threads)


def read_arrays(arrays, threads=1):
    """Reads of contiguous arrays in place, one after the other, each divided among the threads, in the fastest of the
    ways in hardware.c.

    How fast memory is read depends on where the arrays are: on their pages, and on what else is in the caches.
    """
    library, isa = load(best_isa()), INSTRUCTION_SETS[best_isa()]
    unit = 8 * isa.vector_bytes
    parts = [[] for _ in range(threads)]
    for array in arrays:
        words = array.reshape(-1).view(np.uint32)
        share = words.nbytes // threads // unit * unit // words.itemsize
        for index, own in enumerate(parts):
            own.append(words[index * share : (index + 1) * share])

    def one(index, repeats, way=0):
        own = parts[index]
        passes, inside = (1, repeats) if len(own) == 1 else (repeats, 1)
        return sum(
            library.read_words(part.ctypes.data, part.nbytes // isa.vector_bytes, inside, way)
            for _ in range(passes)
            for part in own
        )

    repeats = _repeats(lambda n: one(0, n))
    expected = repeats * sum(int(part.sum(dtype=np.uint64)) for part in parts[0])
    calls = []
    for way in range(library.ways_to_read()):
        assert (one(0, repeats, way) - expected) % 2**32 == 0, "the read probe did not read"
        calls.append(_on_threads(lambda index, way=way: one(index, repeats, way), threads))
    seconds = [[_timed(call) for call in calls] for _ in range(5)]
    least = [min(times) for times in zip(*seconds, strict=True)]
    nbytes = sum(part.nbytes for own in parts for part in own)
    return Probe(calls[least.index(min(least))], float(repeats * nbytes))


def read_edges(key, value, indices, threads=1):
    """Reads of the rows of key and value, (nodes, ...) and contiguous, that int32 `indices` name, in their order; each
    thread has a part of the edges. `work` counts edges. Of several distances at which rows are fetched the best."""
    library = load(best_isa())
    key, value = (array.reshape(len(array), -1).view(np.uint32) for array in (key, value))
    parts = np.array_split(indices, threads)

    def one(index, repeats, ahead):
        own = parts[index]
        return library.read_edges(
            key.ctypes.data,
            key.strides[0],
            value.ctypes.data,
            value.strides[0],
            own.ctypes.data,
            len(own),
            repeats,
            ahead,
        )

    repeats = _repeats(lambda n: one(0, n, 8))
    sums = sum(array.sum(axis=1, dtype=np.uint64)[parts[0]].sum() for array in (key, value))
    calls = []
    for ahead in (4, 8, 16, 32):
        assert (one(0, repeats, ahead) - repeats * int(sums)) % 2**32 == 0, "the probe of edges did not read"
        calls.append(_on_threads(lambda index, ahead=ahead: one(index, repeats, ahead), threads))
    seconds = [[_timed(call) for call in calls] for _ in range(5)]
    least = [min(times) for times in zip(*seconds, strict=True)]
    return Probe(calls[least.index(min(least))], float(repeats * len(indices)))


@functools.lru_cache(maxsize=4)
def copy(nbytes, threads=1):
    """Copies of a buffer of `nbytes` in all; `work` counts each copied byte once, although it is read and written."""
    library = load(best_isa())
    share = max(ALIGNMENT, nbytes // threads // ALIGNMENT * ALIGNMENT)
    pairs = [(_buffer(share), _buffer(share)) for _ in range(threads)]
    for target, _ in pairs:
        target[:] = 0

    def one(index, repeats):
        target, source = pairs[index]
        library.copy_bytes(target.ctypes.data, source.ctypes.data, share, repeats)

    repeats = _repeats(lambda n: one(0, n))
    assert (pairs[0][0] == 1).all(), "the copy probe did not copy"
    call = _on_threads(lambda index: one(index, repeats), threads)
    return Probe(call, float(repeats * threads * share))


def _rate(probe):
    """The best of a few calls, in units of 1e9 per second."""
    best = min(_timed(probe.call) for _ in range(5))
    return probe.work / best / 1e9


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for threads in sorted({1, cpus}):
        print(f"{threads} thread{'s' * (threads > 1)}")
        for isa in INSTRUCTION_SETS:
            if load(isa):
                f32, f64 = (_rate(fma(dtype, isa, threads)) for dtype in ("float32", "float64"))
                print(f"  {isa:10} {f32:8.1f} GFLOP/s float32 {f64:8.1f} GFLOP/s float64", end="")
                probe = triples(isa, threads)
                print(f" {_rate(probe):8.1f} G triples/s float32" if probe else "")
        probe = pairs(threads)
        if probe:
            print(f"  {'avx512_bf16':11} {_rate(probe):7.1f} GFLOP/s bfloat16, in pairs")
        probe = tiles(threads)
        if probe:
            print(f"  {'avx512_amx':11} {_rate(probe):7.1f} GFLOP/s bfloat16, by tiles")
        for size in (256 * 2**10, 4 * 2**20, 256 * 2**20):
            print(
                f"  {size / 2**20:6.2f} MiB   read {_rate(read(size, threads)):7.1f} GB/s"
                f"    copy {_rate(copy(size, threads)):7.1f} GB/s"
            )


if __name__ == "__main__":
    main()
