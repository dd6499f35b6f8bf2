"""fastattn beside NumPy and whichever of PyTorch, ONNX Runtime, OpenVINO, JAX and SciPy is installed.

    python benchmarks/compare.py --quick                              two minutes
    python benchmarks/compare.py --markdown table.md --plot plot.png --json all.json

Each thread count runs in its own process, pinned to that many CPUs, with the environment of every library set before it
is imported. Everything compared runs alternately within one process (see measure.py), including probes of the
hardware's limits (hardware.py). Then come report.py, plot.py and, with --goals, goals.py.
"""

import argparse
import fnmatch
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import encoder
import hardware
import report
from suite import cases


def main():
    options = parse_arguments()
    if options.worker:
        return work(json.loads(options.worker))
    everything = {"rounds": options.rounds, "machine": machine(), "disturbance": 0.0, "records": []}
    everything["missing"] = encoder.missing()
    for plan in plans(options):
        if plan["cases"]:
            result = run_worker(plan)
            everything["versions"] = result["versions"] | everything.get("versions", {})
            everything["disturbance"] = max(everything["disturbance"], result["disturbance"])
            everything["records"] += result["records"]
    if not everything["records"]:
        text = f"no case matches {options.only!r}; there are\n" + "\n".join(case_names())
        sys.exit("\n\n".join([text, *report.left_out(everything["missing"])]))
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    text = report.markdown(everything, options.goals)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
        chosen = json.dumps(report.variants(everything["records"]), indent=1)
        options.markdown.with_suffix(".variants.json").write_text(chosen + "\n")
    if options.plot:
        import plot  # only this needs matplotlib

        plot.draw(everything, options.plot)
    wrong = [record["case"] for record in everything["records"] if record.get("notes", {}).get("fastattn")]
    if wrong:
        sys.exit(f"fastattn failed: {', '.join(wrong)}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds of a few shapes on one thread")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases by name: 2048, 'softmax*', import")
    parser.add_argument("--threads", metavar="N,N", help="thread counts (default: 1 and, given the CPUs, 2)")
    parser.add_argument("--rounds", type=int, help="rounds of each case (default 9)")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables, and beside them which variants were chosen"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw it, and jobs.png and truncated.png beside it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--goals", action="store_true", help="print the project's own goals beside the results")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(case_names()))
        sys.exit()
    if not any(letter in options.only for letter in "*?["):
        options.only = f"*{options.only}*"
    options.rounds = options.rounds or (3 if options.quick else 9)
    if options.threads:
        options.threads = [int(number) for number in options.threads.split(",")]
        if max(options.threads) > len(cpus()):
            parser.error(f"--threads: this process may use {len(cpus())} CPUs")
    else:
        options.threads = [1] if options.quick else sorted({1, min(2, len(cpus()))})
    return options


def cpus():
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


# The few most informative cases, for a run of a minute.
QUICK = {
    "attention-1x1x1x8x8",
    "attention-1x8x16x16x64",
    "attention-1x12x128x128x64",
    "attention-1x8x512x512x64",
    "attentionback-1x8x512x64",
    "softmax-1024x1024",
    "softmax-100000x64",
    "sparse-512x4096-sparsemax",
    "additive-1x8x512x512x64",
    "additiveback-1x8x128x128x64",
    "truncated-1x1x4096x64-64x64",
    "lengths-truncated-64x64",
    "decode-1x8x8x1x8192x64",
    "stored-1x32x8x1x4096x128-bfloat16",
    "stored-1x32x8x1x4096x128-int8",
    "multihead-1x128x768x12",
    "rotary-1x12x512x64",
    "linear-1x8x4096x64",
    "linearstep-1x32x128",
    "graph-mesh-dot",
    "graphback-mesh-dot",
    "minilm-1x24",
    "memory-attention-1x1x16384x16384x64",
    "import",
}
# What all libraries are compared on.
TABLES = (
    *cases.ATTENTION,
    *cases.ATTENTION_BACK,
    *cases.SOFTMAX,
    *cases.SOFTMAX_BACK,
    *cases.SPARSE,
    *cases.ADDITIVE,
    *cases.ADDITIVE_BACK,
    *cases.TRUNCATED,
    *cases.DECODE,
    *cases.STORED,
    *cases.MULTI_HEAD,
    *cases.MULTI_HEAD_STEPS,
    *cases.ROTARY,
    *cases.LINEAR,
    *cases.LINEAR_STEPS,
    *cases.BLOCKS,
    *cases.NEIGHBORHOOD,
    *cases.MINILM,
    *cases.GRAPH,
    *cases.GRAPH_BACK,
)
# Cases of one window at several lengths.
WINDOWS = {f"lengths-truncated-{left}x{right}": (left, right) for left, right in cases.WINDOWS}
# These measure in every round; the others once.
IN_ROUNDS = ("libraries", "lengths", "isa", "scaling")
# Cases that compare another instruction set with its own limit.
FORCED_ISA = [
    *(case.name for case in cases.ATTENTION if case.dtype == "float32" and case.seqlen_q in (512, 2048)),
    cases.ADDITIVE[0].name,
    *(case.name for case in cases.STORED),
]


def plans(options):
    """One plan per worker process; together they are the whole run."""

    def chosen(names):
        return [name for name in names if fnmatch.fnmatch(name, options.only) and (not options.quick or name in QUICK)]

    common = {"rounds": options.rounds, "isa": os.environ.get("FASTATTN_ISA")}
    left_out = cases.MINILM if encoder.missing() else ()
    tables = [case.name for case in TABLES if case not in left_out]
    for threads in options.threads:
        yield {**common, "job": "libraries", "threads": threads, "cases": chosen(tables)}
        yield {**common, "job": "lengths", "threads": threads, "cases": chosen(WINDOWS)}
    if not common["isa"] and hardware.best_isa() == "avx512" and 1 in options.threads:
        names = chosen(f"avx2-{name}" for name in FORCED_ISA)
        yield {**common, "job": "isa", "threads": 1, "isa": "avx2", "cases": names}
    if max(options.threads) > 1:
        names = chosen(f"threads-{case.name}" for case in cases.SCALING)
        yield {**common, "job": "scaling", "threads": max(options.threads), "cases": names}
    for name in chosen(f"memory-{case.name}" for case in cases.MEMORY):
        for threads in options.threads:
            for library in ("fastattn", "NumPy") if threads == 1 else ("fastattn",):
                yield {**common, "job": "memory", "threads": threads, "library": library, "cases": [name]}
    yield {**common, "job": "import", "threads": 1, "cases": chosen(["import"])}


def case_names():
    return [
        *(case.name for case in TABLES),
        *WINDOWS,
        *(f"avx2-{name}" for name in FORCED_ISA),
        *(f"threads-{case.name}" for case in cases.SCALING),
        *(f"memory-{case.name}" for case in cases.MEMORY),
        "import",
    ]


def machine():
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        model = next(lines, ":").split(":", 1)[1].strip()
    return {"cpu": model, "cpus": len(cpus()), "isa": hardware.best_isa()}


def run_worker(plan):
    """Runs this script again, so that threads and instruction set are set before anything is imported."""
    import peers

    environment = peers.thread_environment(plan["threads"])
    if plan["isa"]:
        environment["FASTATTN_ISA"] = plan["isa"]
    with tempfile.TemporaryDirectory() as folder:
        plan = {**plan, "result": str(Path(folder) / "result.json"), "cpus": cpus()[-plan["threads"] :]}
        # Affinity is inherited: a library that counts CPUs finds as many as it has threads.
        pin = (lambda: os.sched_setaffinity(0, plan["cpus"])) if hasattr(os, "sched_setaffinity") else None
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(plan)]
        done = subprocess.run(command, env=environment, preexec_fn=pin, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"the measuring process failed with status {done.returncode}: {json.dumps(plan)}")
        return json.loads(Path(plan["result"]).read_text())


class Progress:
    """One line on a terminal; silent in a log."""

    def __init__(self, plan, rounds):
        self.total, self.done = len(plan["cases"]) * rounds, 0
        self.title = f"{plan['job']}, {plan['threads']} thread{'s' * (plan['threads'] > 1)}"
        self.case = ""

    def __call__(self, case=None):
        self.case = case or self.case
        self.done += case is None
        if sys.stderr.isatty():
            end = "\n" if self.done == self.total else ""
            share = self.done / max(1, self.total)
            bar = "#" * round(24 * share)
            line = f"\r\033[K{self.title} [{bar:24}] {share:4.0%}  {self.case}"
            print(line, end=end, file=sys.stderr, flush=True)


def work(plan):
    """What a worker process does."""
    import peers

    jobs = {
        "libraries": compare_libraries,
        "lengths": compare_lengths,
        "isa": compare_with_own_peak,
        "scaling": compare_thread_counts,
        "memory": measure_memory,
        "import": measure_import,
    }
    rounds = plan["rounds"] if plan["job"] in IN_ROUNDS else 1
    progress = Progress(plan, rounds)
    records, meanwhile = [], Disturbance()
    for name in plan["cases"]:
        progress(name)
        record = jobs[plan["job"]](plan, name, progress)
        records.append({"job": plan["job"], "case": name, "threads": plan["threads"], **record})
    result = {"versions": peers.versions(), "disturbance": meanwhile.cpus(), "records": records}
    Path(plan["result"]).write_text(json.dumps(result))


class Disturbance:
    """How many CPUs other processes have kept busy since this was created; 0 if the system does not say."""

    def __init__(self):
        self.start = time.perf_counter(), self._others()

    def _others(self):
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split()[1:11])
        own = sum(os.times()[:4])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own

    def cpus(self):
        wall, others = self.start
        return max(0.0, (self._others() - others) / (time.perf_counter() - wall))


def case_of(name, among):
    """The case at the end of a job's name, such as "threads-attention-..."."""
    return next(case for case in among if f"-{name}".endswith(f"-{case.name}"))


def compare_libraries(plan, name, progress, only=None):
    import measure
    import peers

    case = case_of(name, TABLES)
    notes = {}
    found = list(peers.candidates(case, plan["threads"], only or list(peers.LIBRARIES), notes))
    limit, work, probe = limit_of(case, plan)
    # In units of this case's work, so that ratios of times are shares of the limit.
    limits = [measure.Candidate(limit, probe.call, probe.work / work)] if probe else []
    samples = measure.interleave([*limits, *found], plan["rounds"], progress)
    record = {
        "kind": case.kind,
        "label": case.label,
        "dtype": case.dtype,
        "work": work,
        "seconds": samples,
        "notes": notes,
    }
    if case.kind == "truncated":
        record |= {"rows": case.rows, "seqlen": case.seqlen, "window": case.window}
    if case.kind == "decode":
        record["seqlen_q"] = case.seqlen_q
    if case.kind == "stored":
        record |= {
            "storage": case.storage,
            "rows": case.as_rows.seqlen_q,
            "limit": limit,
            "set": plan["isa"] or hardware.best_isa(),
        }
    if case.kind == "blocks":
        record["share"] = case.pattern().mean()
    if case.kind == "linear":
        record |= {"rule": case.rule, "head_dim": case.head_dim, "tokens": case.batch * case.heads * case.seqlen}
    return record


def limit_of(case, plan):
    """The hardware's limit for a case: its name, the case's work in its units, and a probe or None.

    The work of an encoder is sentences, which have no limit.
    """
    threads = plan["threads"]
    if case.kind in ("softmax", "softmaxback", "sparse", "rotary", "linearstep"):
        return "copy", case.nbytes, hardware.copy(case.nbytes, threads)
    if case.kind == "decode":
        return "read", case.nbytes, hardware.read_arrays(case.inputs()[1:], threads)
    if case.kind == "stored" and case.is_decode:
        return "read", case.nbytes, hardware.read_arrays(case.inputs()[1:3], threads)
    if case.kind == "stored" and case.storage == "bfloat16":
        kernels = kernels_of_bfloat16()
        if kernels.endswith("amx"):
            return "peak of tiles", case.flops, hardware.tiles(threads)
        if kernels.endswith("bf16"):
            return "peak of pairs", case.flops, hardware.pairs(threads)
    if case.kind in ("attention", "attentionback", "truncated", "stored", "multihead", "multiheadstep", "linear",
                     "blocks", "neighborhood"):  # fmt: skip
        return "FMA peak", case.flops, hardware.fma(case.dtype, plan["isa"], threads)
    if case.kind == "minilm":
        return "", case.batch, None
    if case.kind in ("graph", "graphback"):
        key, value = (array.swapaxes(0, 1) for array in case.inputs()[1:])
        indices = case.structure[1]
        return "rows read", len(indices), hardware.read_edges(key, value, indices, threads)
    probe = hardware.triples(plan["isa"], threads) if case.dtype == "float32" else None
    return "five instructions", case.triples, probe


def kernels_of_bfloat16():
    import fastattn

    return fastattn.cpu_info()["kernels"]["bfloat16"]


def compare_lengths(plan, name, progress):
    """Seconds per row that fastattn takes with one window at each length, measured in the same rounds as the limits.

    These are the FMA peak, in seconds per operation, and, in seconds per row, memory at the longest length: reading a
    row of two arrays, and copying a row of one.
    """
    import measure
    import peers

    threads, notes = plan["threads"], {}
    of_all = [cases.in_window(seqlen, WINDOWS[name]) for seqlen in cases.LENGTHS]
    longest = of_all[-1]
    row = longest.nbytes / longest.rows
    fma = hardware.fma(longest.dtype, plan["isa"], threads)
    read, copy = hardware.read(4 * longest.nbytes, threads), hardware.copy(2 * longest.nbytes, threads)
    candidates = [
        measure.Candidate("FMA peak", fma.call, fma.work),
        measure.Candidate("read", read.call, read.work / (2 * row)),
        measure.Candidate("copy", copy.call, copy.work / row),
    ]
    for case in of_all:
        for found in peers.candidates(case, threads, ["fastattn"], notes):
            candidates.append(measure.Candidate(f"fastattn, {case.seqlen}", found.call, case.rows))
    return {
        "label": str(longest.window),
        "seqlens": [case.seqlen for case in of_all],
        "flops": [case.flops / case.rows for case in of_all],
        "seconds": measure.interleave(candidates, plan["rounds"], progress),
        "notes": notes,
    }


def compare_with_own_peak(plan, name, progress):
    """fastattn alone, with FASTATTN_ISA set, beside that instruction set's limit."""
    own = ["fastattn", "fastattn, float32"]
    record = compare_libraries(plan, name.removeprefix(f"{plan['isa']}-"), progress, only=own)
    return {**record, "isa": plan["isa"]}


def compare_thread_counts(plan, name, progress):
    """fastattn on one and on all threads, beside the speedup of the same threads in the FMA probe."""
    import fastattn
    import measure

    case = case_of(name, cases.SCALING)
    candidates = []
    for threads in (1, plan["threads"]):
        probe = hardware.fma(case.dtype, plan["isa"], threads)
        candidates.append(measure.Candidate(f"FMA peak, {threads}", probe.call, probe.work))

        def call(threads=threads):
            return fastattn.dot_product_attention(*case.inputs(), num_threads=threads)

        candidates.append(measure.Candidate(f"fastattn, {threads}", call))
    return {"label": case.label, "seconds": measure.interleave(candidates, plan["rounds"], progress)}


def measure_memory(plan, name, progress):
    """What one call adds to the resident memory of a fresh process, not counting the output."""
    import fastattn
    from suite import baselines, memory

    case = case_of(name, cases.MEMORY)
    arrays = case.inputs()
    library = {"fastattn": fastattn, "NumPy": baselines}[plan["library"]]
    if case.kind == "truncated":
        call = functools.partial(library.truncated_attention, *arrays, *case.window)
    else:
        call = functools.partial(library.dot_product_attention, *arrays, is_causal=case.is_causal)
    extra = memory.extra_memory(call, arrays[0].nbytes)
    progress()
    return {"label": case.label, "library": plan["library"], "bytes": extra}


def measure_import(plan, name, progress, samples=15):
    """Seconds that `import fastattn` takes after `import numpy`, the minimum over several fresh processes."""
    code = "import numpy, time; t = time.perf_counter(); import fastattn; print(time.perf_counter() - t)"
    times = []
    for _ in range(samples):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    progress()
    return {"seconds": min(times), "median": statistics.median(times)}


if __name__ == "__main__":
    main()
