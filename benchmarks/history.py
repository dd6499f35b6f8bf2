"""The speed of landmark commits, as web pages: measures a part of the asv suite, and makes and checks the pages.

    python benchmarks/history.py list                   what is measured
    python benchmarks/history.py measure MACHINE HASH   builds a commit, measures it (two minutes), and adds the numbers
                                                        to results/MACHINE
    python benchmarks/history.py publish FOLDER         makes the pages; exit status 1 if one lacks numbers

asv must be installed (the bench extra). Numbers of different commits are only comparable from one machine with nothing
else to do. MACHINE is a name for it that says what it is (xeon-avx512); what else the pages say about it comes from
`asv machine --machine MACHINE`. Look at the pages with `python -m http.server --directory FOLDER`.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

# Of each benchmark the first parameters that are measured, in float32, on one thread, and in NumPy.
CHOSEN = {
    "attention.DotProductAttention.time_attention": [
        "(1, 1, 1, 8, 8)",
        "(1, 12, 128, 128, 64)",
        "(1, 8, 512, 512, 64)",
    ],
    "attention.CausalAttention.time_attention": ["(1, 8, 512, 512, 64)"],
    "attention.AttentionGradients.time_gradients": ["'attentionback-1x8x512x64'"],
    "decode.DecodeAttention.time_attention": ["(1, 8, 8, 1, 8192, 64)", "(1, 8, 8, 8, 8192, 64)"],
    "truncated.TruncatedAttention.time_attention": ["(64, 64), 4096"],
    "blocks.BlockMask.time_attention": ["'2048'"],
    "additive.AdditiveAttention.time_attention": ["(1, 8, 512, 512, 64)"],
    "additive.AdditiveGradients.time_gradients": ["'additiveback-1x8x128x128x64'"],
    "additive.BilinearAttention.time_attention": ["(1, 8, 512, 512, 64)"],
    "additive.ProjectedAdditiveAttention.time_attention": ["(1, 8, 128, 128, 64)"],
    "softmax.Softmax.time_softmax": ["((512, 4096), 0)", "((1024, 1024), -1)"],
    "softmax.SoftmaxBack.time_softmax_vjp": ["((1024, 1024), -1)"],
    "sparse.Rows.time_rows": ["(512, 4096)"],
    "sparse.Attention.time_attention": ["(1, 8, 512, 512, 64)"],
    "linear.LinearAttention.time_linear": ["'linear-1x8x4096x64'"],
    "linear.LinearGradients.time_gradients": ["'linear-1x8x4096x64'"],
    "linear.LinearStep.time_step": ["'linearstep-1x32x128'"],
    "graph.GraphAttention.time_attention": ["'graph-cora-dot'", "'graph-mesh-dot'"],
    "graph.GraphGradients.time_gradients": ["'graphback-cora-dot'"],
    "neighborhood.NeighborhoodAttention.time_attention": ["'56x56'"],
    "neighborhood.NeighborhoodForms.time_attention": ["'windows'"],
    "neighborhood.NeighborhoodGradients.time_gradients": ["'28x28'"],
    "rotary.ApplyRotary.time_rotary": ["(1, 12, 512, 64)"],
    "multihead.MultiHeadAttention.time_attention": ["(1, 128, 768, 12)"],
    "multihead.MultiHeadAttentionStep.time_step": ["(1, 128, 768, 12)"],
    "memory.Memory.peakmem_attention": ["4096"],
    "memory.Memory.track_extra_memory": ["4096"],
    "memory.OtherKindsMemory.peakmem_attention": ["'additive_attention', 1024"],
    "memory.OtherKindsMemory.track_extra_memory": ["'additive_attention', 1024"],
    "memory.WindowMemory.peakmem_attention": ["65536"],
    "memory.WindowMemory.track_extra_memory": ["65536"],
}
# Short samples: the pages show what grows or falls by tens of percent.
ATTRIBUTES = {"rounds": "1", "warmup_time": "0.05", "repeat": "(3, 8, 0.5)"}


def patterns():
    """Regular expressions of asv's for what is chosen."""
    for name, firsts in CHOSEN.items():
        for first in firsts:
            yield f"^{re.escape(f'{name}({first}')}(?!.*float64)(?!.*, 2[,)])(?!.*2 threads)"


def asv(*arguments):
    subprocess.run(["asv", *arguments], cwd=HERE, check=True)


def measure(machine, commit):
    options = [word for item in ATTRIBUTES.items() for word in ("-a", "=".join(item))]
    options += [word for pattern in patterns() for word in ("-b", pattern)]
    asv("run", "--machine", machine, *options, f"{commit}^!")


def publish(folder):
    folder = Path(folder).resolve()
    asv("publish", "--html-dir", str(folder))
    index = json.loads((folder / "index.json").read_text())
    moved = {}
    for name, benchmark in index["benchmarks"].items():
        graphs = [path for path in folder.glob(f"graphs/**/{name}.json") if path.parent.name != "summary"]
        moved[name] = leave_measured_parameters(benchmark, graphs)
        show_own_mean(folder / "graphs" / "summary" / f"{name}.json", benchmark, graphs)
    for path in folder.glob("graphs/**/summary.json"):
        rows = [row for row in json.loads(path.read_text()) if row["idx"] is None or row["idx"] in moved[row["name"]]]
        for row in rows:
            row["idx"] = moved[row["name"]].get(row["idx"])
        path.write_text(json.dumps(rows))
    path = folder / "regressions.json"
    regressions = json.loads(path.read_text())
    regressions["regressions"] = [row for row in regressions["regressions"] if "numpy" not in row[0]]
    for row in regressions["regressions"]:
        row[3] = moved[row[0].partition("(")[0]].get(row[3])
    path.write_text(json.dumps(regressions))
    (folder / "index.json").write_text(json.dumps(index))
    return check(folder, index)


def leave_measured_parameters(benchmark, graphs):
    """Takes values of parameters that nobody measured out of a benchmark's page: their curves would be empty.

    That leaves no more than the eight curves that a page shows at first, with NumPy's among them. Returns the new
    places of what is left, by the old ones."""
    series = [json.loads(path.read_text()) for path in graphs]
    everything = list(itertools.product(*map(range, map(len, benchmark["params"]))))
    numbers = [values if isinstance(values, list) else [values] for points in series for _, values in points]
    seen = [key for key, *column in zip(everything, *numbers, strict=True) if any(x is not None for x in column)]
    left = [sorted({key[axis] for key in seen}) for axis in range(len(benchmark["params"]))]
    kept = [place for place, key in enumerate(everything) if all(x in axis for x, axis in zip(key, left, strict=True))]
    if not seen or not benchmark["params"]:
        return {place: place for place in range(len(everything))}
    benchmark["params"] = [[x[i] for i in axis] for x, axis in zip(benchmark["params"], left, strict=True)]
    for path, points in zip(graphs, series, strict=True):
        path.write_text(json.dumps([[revision, [values[place] for place in kept]] for revision, values in points]))
    return {old: new for new, old in enumerate(kept)}


def show_own_mean(summary, benchmark, graphs):
    """The small picture in the grid is of fastattn alone: asv's mean has NumPy's times in it."""
    own = [not any("numpy" in value for value in key) for key in itertools.product(*benchmark["params"])]
    points = [point for path in graphs for point in json.loads(path.read_text()) if isinstance(point[1], list)]
    points = [(revision, [x for x, mine in zip(values, own, strict=True) if mine]) for revision, values in points]
    points = [(revision, values) for revision, values in points if any(values)]
    whole = [all(values[place] for _, values in points) for place in range(sum(own))]  # those that every commit has
    means = [
        [revision, statistics.geometric_mean(x for x, has in zip(values, whole, strict=True) if has)]
        for revision, values in points
        if any(whole)
    ]
    if means:
        summary.write_text(json.dumps(sorted(means)))


def check(folder, index):
    """Whether each benchmark that is chosen has a graph with a number of every commit that has results for it."""
    is_bad = False
    for name in CHOSEN:
        wanted = set()
        for path in RESULTS.glob("*/*-*.json"):
            found = json.loads(path.read_text())["results"].get(name)
            if found and any(x is not None and x == x for x in found[0] or ()):  # NaN: not measured
                wanted.add(path.name.partition("-")[0])
        revisions = {
            revision
            for path in folder.glob(f"graphs/**/{name}.json")
            if path.parent.name != "summary"
            for revision, values in json.loads(path.read_text())
            if any(x is not None for x in (values if isinstance(values, list) else [values]))
        }
        shown = {index["revision_to_hash"][str(revision)][:8] for revision in revisions}
        if not wanted or wanted - shown:
            is_bad = True
            print(f"{name}: no graph of {', '.join(sorted(wanted - shown)) or 'any commit'}")
    print(f"{len(CHOSEN)} graphs" if not is_bad else "the pages are not whole")
    return is_bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    command = commands.add_parser("measure")
    command.add_argument("machine")
    command.add_argument("commit")
    command = commands.add_parser("publish")
    command.add_argument("folder")
    options = parser.parse_args()
    if options.command == "list":
        print(*patterns(), sep="\n")
    elif options.command == "measure":
        measure(options.machine, options.commit)
    elif publish(options.folder):
        sys.exit(1)


if __name__ == "__main__":
    main()
