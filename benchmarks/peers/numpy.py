"""NumPy and SciPy, as usually written and at their best."""

import functools

import numpy as np

import encoder
from suite import baselines

from .variant import Variant, of_tokens, refuse_large


def attention(case, threads):
    yield Variant("", functools.partial(baselines.dot_product_attention, *case.inputs(), case.is_causal))


def attention_back(case, threads):
    arguments = case.grad_out(), *case.inputs(), case.visible(), case.rules.get("bias")
    yield Variant("", functools.partial(baselines.attention_gradients, *arguments), of_tokens)


def truncated(case, threads):
    arguments = *case.inputs(), *case.window
    for rows in (8, 16, 32, 64, 128, 256):
        yield Variant(f"blocks of {rows}", functools.partial(baselines.truncated_attention, *arguments, rows=rows))
    if sum(case.window) <= 32:  # wider ones are far slower
        yield Variant("a window a row, einsum", functools.partial(baselines.truncated_by_row, *arguments))
        yield Variant("a sum a distance", functools.partial(baselines.truncated_by_distance, *arguments))


def decode(case, threads):
    yield Variant("query @ key.T", functools.partial(baselines.grouped_attention, *case.inputs()))
    yield Variant("key @ query.T", functools.partial(baselines.grouped_attention_keys_first, *case.inputs()))


def multihead(case, threads):
    x = case.inputs()[0]
    yield Variant("", functools.partial(baselines.multi_head_attention, x, *case.packed(), case.heads))


def multihead_step(case, threads):
    step = functools.partial(baselines.multi_head_attention_step, case.inputs()[0], *case.packed(), case.heads)
    yield Variant("", functools.partial(step, case.grad_out()), lambda gradients: gradients[0])


def rotary(case, threads):
    (x,) = case.inputs()
    yield Variant("", functools.partial(baselines.apply_rotary, x, *baselines.rotary_tables(*x.shape[-2:], x.dtype)))


def linear(case, threads):
    if case.is_delta:
        yield Variant("token by token", functools.partial(baselines.gated_delta_rule, *case.inputs(), *case.gates()))
        return
    for chunk in (32, 64, 128, 256):
        call = functools.partial(baselines.linear_attention, *case.inputs(), chunk)
        yield Variant(f"chunks of {chunk}", call)


def linear_step(case, threads):
    query, key, value, state = case.inputs()
    yield Variant("", functools.partial(baselines.linear_step, query, key, value, state.copy(), case.decay))


def minilm(case, threads):
    batch, *_ = encoder.inputs(case)
    model = encoder.load_example().MiniLM(attention=encoder.load_example().numpy_attention)
    yield Variant("", functools.partial(model.encode_tokens, batch))


def _additive(case, threads, ways):
    call = functools.partial(baselines.additive_attention, *case.inputs(), **case.projections())
    for name, scores in ways.items():
        yield Variant(name, functools.partial(call, scores=scores))


def textbook_additive(case, threads):
    refuse_large(case, case.triples // (case.batch * case.heads))  # one head at a time
    return _additive(case, threads, {"": baselines.textbook_scores})


def best_additive(case, threads):
    ways = {
        "tanh in place": baselines.tanh_scores,
        "exponentials in place": baselines.exponential_scores,
        "exponentials, channels in pairs": baselines.paired_scores,
    }
    return _additive(case, threads, ways)


def additive_back(case, threads):
    refuse_large(case, case.triples // (case.batch * case.heads))  # one head at a time
    yield Variant("", functools.partial(baselines.additive_gradients, case.grad_out(), *case.inputs()), of_tokens)


def softmax(case, threads):
    yield Variant("", functools.partial(baselines.softmax, *case.inputs(), case.axis))


def softmax_back(case, threads):
    yield Variant("", functools.partial(baselines.softmax_back, *case.inputs(), case.axis))


def sparse(case, threads):
    yield Variant("", functools.partial(baselines.sparse, *case.inputs(), case.function, case.axis))


def graph(case, threads):
    call = functools.partial(baselines.graph_attention, *case.inputs(), case.structure, case.rows())
    yield Variant("", functools.partial(call, w_score=case.w_score()))


def graph_back(case, threads):
    forward = functools.partial(baselines.graph_attention, *case.inputs(), case.structure, case.rows(), case.w_score())
    back = functools.partial(baselines.graph_gradients, case.grad_out(), *case.inputs(), case.structure, case.rows())

    def step():
        forward()
        return back(case.w_score())

    yield Variant("", step, functools.partial(np.concatenate, axis=-1))


def scipy_graph(case, threads):
    """Three passes: scores, softmax, and a sparse matrix of weights times the values of each head."""
    from scipy import sparse

    query, key, value = case.inputs()
    graph, rows, w_score = case.structure, case.rows(), case.w_score()
    heads = [np.ascontiguousarray(head) for head in value]

    def call():
        weights = baselines.edge_weights(query, key, graph, rows, w_score)
        indptr, indices = graph
        shape = (case.nodes, case.nodes)
        return [sparse.csr_array((w, indices, indptr), shape) @ v for w, v in zip(weights, heads, strict=True)]

    yield Variant("", call)


def scipy_softmax(case, threads):
    from scipy.special import softmax

    yield Variant("", functools.partial(softmax, *case.inputs(), axis=case.axis))


def blocks(case, threads):
    call = functools.partial(baselines.block_attention, *case.inputs())
    yield Variant("rows of blocks", functools.partial(call, case.pattern(), case.block))


def neighborhood(case, threads):
    arrays = (x[0] for x in case.in_a_row())
    yield Variant("gather", functools.partial(baselines.neighborhood_attention, *arrays, case.seen()))


# Name -> (distribution, its implementation of each kind of case).
LIBRARIES = {
    "NumPy": (
        "numpy",
        {
            "attention": attention,
            "attentionback": attention_back,
            "softmax": softmax,
            "softmaxback": softmax_back,
            "sparse": sparse,
            "decode": decode,
            "multihead": multihead,
            "multiheadstep": multihead_step,
            "rotary": rotary,
            "linear": linear,
            "linearstep": linear_step,
            "blocks": blocks,
            "neighborhood": neighborhood,
            "minilm": minilm,
            "graph": graph,
            "graphback": graph_back,
        },
    ),
    "NumPy, textbook": ("numpy", {"additive": textbook_additive, "additiveback": additive_back}),
    "NumPy, best": ("numpy", {"additive": best_additive}),
    "NumPy, best band": ("numpy", {"truncated": truncated}),
    "SciPy": ("scipy", {"softmax": scipy_softmax, "graph": scipy_graph}),
}
