"""asv: attention along the edges of graphs and its gradients, by their shapes and threads, beside NumPy baselines."""

import functools

import fastattn

from . import baselines, cases


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(name, threads, implementation):
    case = next(case for case in cases.GRAPH if case.name == name)
    if implementation == "numpy":
        call = functools.partial(baselines.graph_attention, *case.inputs(), case.structure, case.rows())
    else:
        call = functools.partial(fastattn.graph_attention, *case.inputs(), case.structure, num_threads=threads)
    return functools.partial(call, w_score=case.w_score())


class GraphAttention:
    # The baseline uses one thread whatever it is told.
    params = [[case.name for case in cases.GRAPH], ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"]]
    param_names = ["graph", "implementation"]

    def time_attention(self, graph, implementation):
        name, _, threads = implementation.partition(", ")
        _call(graph, int(threads[0]) if threads else 1, name)()

    time_attention.pretty_name = "Attention along edges"


@functools.cache
def _way_back(name, threads, implementation):
    case = next(case for case in cases.GRAPH_BACK if case.name == name)
    if implementation == "numpy":
        call = functools.partial(
            baselines.graph_gradients, case.grad_out(), *case.inputs(), case.structure, case.rows()
        )
    else:
        vjp = functools.partial(fastattn.graph_attention_vjp, num_threads=threads)
        call = functools.partial(vjp, case.grad_out(), *case.inputs(), case.structure)
    return functools.partial(call, w_score=case.w_score())


class GraphGradients:
    """Without the forward call."""

    params = [[case.name for case in cases.GRAPH_BACK], ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"]]
    param_names = ["graph", "implementation"]

    def time_gradients(self, graph, implementation):
        name, _, threads = implementation.partition(", ")
        _way_back(graph, int(threads[0]) if threads else 1, name)()

    time_gradients.pretty_name = "Gradients along edges"
