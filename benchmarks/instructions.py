"""How many instructions calls of the library take, by valgrind: a slowdown is seen without a quiet machine.

    python benchmarks/instructions.py             compare with instructions.json: within 3 %, or exit status 1
    python benchmarks/instructions.py --update    count anew and write instructions.json
    python benchmarks/instructions.py --table     print all counts beside the comparison

Counts repeat to a few instructions, but are not times: they say nothing of caches, of prefetching or of how many
instructions run at once. Each call is counted on one thread, with the kernels of avx2 and baseline (valgrind knows no
AVX-512), by three numbers, of which each contains the one before:

    kernels   instructions in the module of the C kernels
    library   in all modules of fastattn
    call      all, with Python's, NumPy's and the C library's

Other compilers make other instructions, other versions of Python other calls. So instructions.json says what it was
made with, and a number is compared only where that is the same; elsewhere a note says why it is not.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import fastattn

HERE = Path(__file__).resolve().parent
RECORD = HERE / "instructions.json"
PACKAGE = Path(fastattn.__file__).resolve().parent
KERNELS = "_runtime."  # how the module's name begins
INSTRUCTION_SETS = ("avx2", "baseline")
ALLOWED = 0.03  # either way: a gain that is not recorded would hide the loss of it
WARM_UP = 3  # calls until memory is there and Python has adapted its bytecode

# What must be the same for a number to be comparable, besides what those before it need.
NEEDS = {
    "kernels": ("machine", "compiler", "flags"),
    "library": ("cython", "python"),
    "call": ("python_build", "numpy", "libc", "valgrind"),
}


def numbers(*shape, dtype=np.float32):
    """The same ones for the same shape."""
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32).astype(dtype)


def one(function):
    """`one(function)(...)` is the call, on one thread, that is still to be made."""
    return functools.partial(functools.partial, function, num_threads=1)


def calls():
    """Names, and calls whose inputs exist. Sizes are odd here and there, so that remainders count too."""
    attend, back = one(fastattn.dot_product_attention), one(fastattn.dot_product_attention_vjp)
    x, short, cache = numbers(2, 200, 64), numbers(12, 30, 64), numbers(4, 1000, 64)
    wide, pixels, graph_nodes = numbers(2, 130, 64, dtype=np.float64), numbers(2, 20, 20, 32), numbers(4, 300, 16)

    yield "smallest", attend(*3 * [numbers(1, 1, 8, 8)])
    yield "prefill", attend(x, x, x)
    yield "prefill, causal", attend(x, x, x, is_causal=True)
    yield "prefill, float64", attend(wide, wide, wide)
    yield "prefill, grouped heads", attend(numbers(1, 8, 60, 64), *2 * [numbers(1, 2, 200, 64)], enable_gqa=True)
    yield "prefill, mask", attend(x, x, x, mask=numbers(2, 200, 200) > 0)
    yield "prefill, bias", attend(x, x, x, bias=numbers(2, 200, 200))
    yield "prefill, block mask", attend(x, x, x, block_mask=np.eye(7, dtype=bool), block_size=32)
    yield "prefill, entmax15", attend(x, x, x, activation="entmax15")
    yield "short sequences", attend(short, short, short)
    yield "decode, 1 query", attend(cache[:, :1], cache, cache)
    yield "decode, 8 queries", attend(cache[:, :8], cache, cache)
    half = cache.astype(np.float16)
    yield "decode, float16 cache", attend(cache[:, :1], half, half)
    yield "truncated", one(fastattn.truncated_attention)(*3 * [numbers(1, 700, 64)], 16, 16)
    yield "varlen", one(fastattn.varlen_attention)(*3 * [numbers(2, 200, 64)], np.array([0, 37, 90, 200]))
    outs, lses = zip(*(attend(x, x, x, return_lse=True)() for _ in range(2)), strict=True)
    yield "merge", functools.partial(fastattn.merge_attention, outs, lses)
    additive = (*3 * [numbers(2, 60, 32)], numbers(32))
    yield "additive", one(fastattn.additive_attention)(*additive)
    yield "neighbourhood", one(fastattn.neighborhood_attention)(pixels, pixels, pixels, 7)
    indptr, indices = np.arange(301) * 8, np.random.default_rng(7).integers(0, 300, 2400)
    nodes = (*3 * [graph_nodes], (indptr, indices))
    yield "graph", one(fastattn.graph_attention)(*nodes)
    yield "linear", one(fastattn.linear_attention)(x, x, x)
    yield "linear, causal", one(fastattn.linear_attention)(x, x, x, is_causal=True)
    yield "rotary", one(fastattn.apply_rotary)(x)

    rows = numbers(60, 501)
    softmax = one(fastattn.softmax)
    yield "softmax, last axis", softmax(rows)
    yield "softmax, axis 0", softmax(rows, 0)
    yield "softmax, mask", softmax(rows, mask=rows > 0)
    yield "sparsemax", one(fastattn.sparsemax)(rows)

    product, gate = one(fastattn.Linear(numbers(130, 200), numbers(200))), numbers(61, 200)
    yield "product, 1 row", product(numbers(1, 130))
    yield "product, 5 rows", product(numbers(5, 130))
    yield "product, 61 rows", product(numbers(61, 130))
    yield "product, silu and a gate", product(numbers(61, 130), activation="silu", multiply=gate)
    yield "product, float16 weight", one(fastattn.Linear(numbers(130, 200, dtype=np.float16)))(numbers(3, 130))
    yield "product, int8 weight", one(fastattn.Linear(numbers(130, 200), dtype=np.int8))(numbers(3, 130))
    yield "layer norm", one(fastattn.layer_norm)(rows, rows[0], rows[1])
    yield "RMS norm, residual", one(fastattn.rms_norm)(rows, rows[0], residual=rows, return_sum=True)

    stream = fastattn.StreamingAttention(32, 0, num_threads=1)
    yield "stream, a frame", functools.partial(stream.push, *3 * [numbers(4, 1, 64)])
    yield "cache, append and attend", cache_step(numbers(4, 1, 64))

    yield "gradients", back(x, x, x, x)
    yield "gradients, additive", one(fastattn.additive_attention_vjp)(numbers(2, 60, 32), *additive)
    yield "gradients, neighbourhood", one(fastattn.neighborhood_attention_vjp)(pixels, pixels, pixels, pixels, 7)
    yield "gradients, graph", one(fastattn.graph_attention_vjp)(graph_nodes, *nodes)
    yield "gradients, linear", one(fastattn.linear_attention_vjp)(x, x, x, x, is_causal=True)
    yield "gradients, softmax", one(fastattn.softmax_vjp)(rows, softmax(rows)())
    yield "layer, a step of training", layer_step(numbers(1, 50, 64))


def cache_step(token):
    cache = fastattn.KVCache((), 4, 600, 64)
    cache.append(*2 * [numbers(4, 500, 64)])

    def step():
        cache.append(token, token)
        fastattn.dot_product_attention(token, cache.key, cache.value, num_threads=1)

    return step


def layer_step(x):
    layer = fastattn.MultiHeadAttention(*numbers(4, 64, 64) / 8, num_heads=4)

    def step():
        _, backward = layer.vjp(x, is_causal=True, num_threads=1)
        backward(x)

    return step


def run_calls(requests):
    """What runs under valgrind. A call of nothing comes first, for its cost is in all others: twice, as all is new to
    the first."""
    client = ctypes.PyDLL(requests)
    gc.disable()
    for name, call in [*2 * [("nothing", lambda: None)], *calls()]:
        for _ in range(WARM_UP):
            call()
        label = name.encode()
        client.begin()
        call()
        client.end(label)


def count(instruction_set, folder):
    """{name of a call: [kernels, library, call]}"""
    run = folder / instruction_set
    run.mkdir()
    fixed = {
        "FASTATTN_ISA": instruction_set,
        "PYTHONPATH": str(PACKAGE.parent),
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]
    script = [str(Path(__file__).resolve()), "--under-valgrind", str(folder / "requests.so")]
    command = [*valgrind, sys.executable, *script]
    done = subprocess.run(command, cwd=run, env=fixed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    found = dict(map(read_dump, sorted(run.glob("callgrind.out.*.*"), key=lambda path: int(path.suffix[1:]))))
    nothing = found.pop("nothing")
    return {name: [*own, call - nothing[-1]] for name, (*own, call) in found.items()}


def read_dump(path):
    """Name and [kernels, library, call] of one of callgrind's files."""
    name, names, kernels, library, everything, of_callee = "", {}, 0, 0, 0, False
    owner = ""
    for line in path.read_text().splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            name = line.rpartition(": ")[2]
        elif line.startswith("ob="):
            number, _, text = line[3:].partition(" ")
            owner = names.setdefault(number, text)
        elif line.startswith("cob="):
            number, _, text = line[4:].partition(" ")
            names.setdefault(number, text)
        elif line.startswith("calls="):
            of_callee = True  # the next line is what the callee took, which stands there too
        elif re.match(r"[\d+*-]", line):
            cost = 0 if of_callee else int(line.split()[1])
            of_callee = False
            everything += cost
            if Path(owner).parent == PACKAGE:
                library += cost
                kernels += cost if Path(owner).name.startswith(KERNELS) else 0
    return name, [kernels, library, everything]


def made_with():
    """What decides which instructions there are, but for the source."""
    module = next(PACKAGE.glob(f"{KERNELS}*.so"))
    compilers = set(re.findall(rb"GCC: \([^)\0]*\) [\w.]+|clang version [\w.]+", module.read_bytes()))
    flags = re.findall(r"-[fm][\w=-]+|-D_FORTIFY_SOURCE=\d", sysconfig.get_config_var("CFLAGS") or "")
    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "machine": platform.machine(),
        "compiler": ", ".join(sorted(text.decode() for text in compilers)),
        "flags": " ".join(dict.fromkeys(flags)),
        "cython": next(name for name in sys.modules if name.startswith("_cython_")).removeprefix("_cython_"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "python_build": sys.version,
        "numpy": np.__version__,
        "libc": " ".join(platform.libc_ver()),
        "valgrind": valgrind,
    }


def comparable(recorded, here):
    """The numbers that may be compared, and why the others may not."""
    names, reasons = [], []
    for name, needs in NEEDS.items():
        reasons += [f"{need}: {recorded.get(need)} there, {here[need]} here" for need in needs
                    if recorded.get(need) != here[need]]  # fmt: skip
        if reasons:
            break
        names.append(name)
    return names, reasons


def differences(recorded, counted, names):
    """Sentences on calls that differ by more than is allowed, and the largest difference within that, as a sentence."""
    wrong, largest = [], (0.0, "not at all")
    for call in dict.fromkeys([*recorded, *counted]):
        if call not in counted or call not in recorded:
            wrong.append(f"{call}: {'not recorded' if call in counted else 'recorded, but not counted'}")
            continue
        for name, before, now in zip(NEEDS, recorded[call], counted[call], strict=True):
            change = now / before - 1 if before else float(now > 0)
            text = f"{call}: {name} {before} -> {now} ({change:+.1%})"
            if name in names and abs(change) > ALLOWED:
                wrong.append(text)
            elif name in names and now != before:
                largest = max(largest, (abs(change), text))
    return wrong, largest[1]


def count_all(instruction_sets):
    """{instruction set: {name of a call: [kernels, library, call]}}, one process for each set."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        compiler = os.environ.get("CC", "cc").split()
        source = str(HERE / "instructions.c")
        subprocess.run([*compiler, "-O2", "-shared", "-fPIC", source, "-o", str(folder / "requests.so")], check=True)
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: count(name, folder), instruction_sets)
            return dict(zip(instruction_sets, found, strict=True))


def print_table(counted):
    for name, rows in counted.items():
        print(f"{name:26}" + "".join(f"{column:>12}" for column in NEEDS))
        for call, row in rows.items():
            print(f"{call:26}" + "".join(f"{number:12}" for number in row))


def write(counted):
    """A line for each call, so that a change shows which of them changed."""
    parts = [f'"made_with": {json.dumps(made_with(), indent=1)}']
    for name, rows in counted.items():
        lines = ",\n".join(f" {json.dumps(call)}: {row}" for call, row in rows.items())
        parts.append(f'"{name}": {{\n{lines}\n}}')
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"{RECORD.name} written")


def compare(record, counted):
    """Prints what differs; whether anything does by more than is allowed."""
    names, reasons = comparable(record["made_with"], made_with())
    is_wrong = False
    for name, rows in counted.items():
        wrong, largest = differences(record[name], rows, names)
        is_wrong |= bool(names and wrong)
        print(f"{name}: {len(rows)} calls, {', '.join(names) or 'nothing'} compared")
        print(f"  {len(wrong)} differ by more than {ALLOWED:.0%}; the others by no more than this: {largest}")
        for text in wrong:
            print(f"    {text}")
    if reasons:
        left = ", ".join(list(NEEDS)[len(names) :])
        print(f"NOTE not compared: {left}, as {RECORD.name} was made with another build")
        for text in reasons:
            print(f"    {text}")
    return is_wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.name}")
    parser.add_argument("--table", action="store_true", help="print all counts")
    parser.add_argument("--under-valgrind", metavar="REQUESTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.under_valgrind:
        return run_calls(options.under_valgrind)
    if shutil.which("valgrind") is None:
        sys.exit("no valgrind here: apt-get install valgrind")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    runnable = [name for name in INSTRUCTION_SETS if name in fastattn.cpu_info()["runnable"]]
    lost = [name for name in record if name in INSTRUCTION_SETS and name not in runnable]
    if lost and options.update:
        sys.exit(f"{', '.join(lost)} cannot run here: {RECORD.name} is left as it is")
    counted = count_all(runnable)
    if options.table:
        print_table(counted)
    if options.update:
        return write(counted)
    if not record:
        sys.exit(f"no {RECORD.name} to compare with: python benchmarks/instructions.py --update")
    for name in lost:
        print(f"NOTE {name} cannot run here: nothing is compared")
    if compare(record, counted):
        sys.exit("If this is meant, say why in the commit, and record it: python benchmarks/instructions.py --update")


if __name__ == "__main__":
    main()
