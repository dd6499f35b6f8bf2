"""fastattn itself, and the minimum work of one of its layers."""

import functools

import numpy as np

import encoder
import fastattn
from suite import baselines

from .variant import Variant, of_tokens

# Not a library, but what fastattn's layer is measured against.
PRODUCTS_AND_ATTENTION = "products and attention"


def attention(case, threads):
    # No num_threads: the environment sets it, as for the others.
    call = functools.partial(fastattn.dot_product_attention, *case.inputs())
    yield Variant("", functools.partial(call, is_causal=True) if case.is_causal else call)


def _way_back(case, rules, inputs):
    """Output and gradients."""
    names = ("query", "key", "value", *(name for name in rules if name == "bias"))
    grad_out = case.grad_out()

    def step():
        output, lse = fastattn.dot_product_attention(*inputs, return_lse=True, **rules)
        return fastattn.dot_product_attention_vjp(grad_out, *inputs, output=output, lse=lse, wrt=names, **rules)

    return step


def attention_back(case, threads):
    yield Variant("", _way_back(case, case.rules, case.inputs()), of_tokens)


def attention_back_alone(case, threads):
    """The gradients alone, from the output and its log-sum-exp, into given arrays."""
    inputs, rules = case.inputs(), case.rules
    output, lse = fastattn.dot_product_attention(*inputs, return_lse=True, **rules)
    names = ("query", "key", "value", *(name for name in rules if name == "bias"))
    out = tuple(np.empty_like(x) for x in (*inputs, *(rules[name] for name in names[3:])))
    vjp = functools.partial(fastattn.dot_product_attention_vjp, case.grad_out(), *inputs, wrt=names, **rules)
    yield Variant("", functools.partial(vjp, output=output, lse=lse, out=out), of_tokens)


def attention_back_plain(case, threads):
    """What a rule is measured against: a bias that has no gradient, and as many heads of keys as of queries."""
    if case.rule not in ("bias", "grouped"):
        raise NotImplementedError("only for rules that should cost little")
    if case.rule == "bias":
        vjp = functools.partial(fastattn.dot_product_attention_vjp, case.grad_out(), *case.inputs(), **case.rules)
        output, lse = fastattn.dot_product_attention(*case.inputs(), return_lse=True, **case.rules)
        out = tuple(np.empty_like(x) for x in case.inputs())
        yield Variant("", functools.partial(vjp, output=output, lse=lse, out=out), of_tokens)
    else:
        inputs = [x.repeat(4, 1) if i else x for i, x in enumerate(case.inputs())]
        output, lse = fastattn.dot_product_attention(*inputs, return_lse=True)
        out = tuple(np.empty_like(x) for x in inputs)
        vjp = functools.partial(fastattn.dot_product_attention_vjp, case.grad_out(), *inputs)
        expected = of_tokens(baselines.expected_attention_gradients(case.grad_out(), *inputs, True, None))
        yield Variant("", functools.partial(vjp, output=output, lse=lse, out=out), of_tokens, expected)


def truncated(case, threads):
    yield Variant("", functools.partial(fastattn.truncated_attention, *case.inputs(), *case.window))


def decode(case, threads):
    call = functools.partial(fastattn.dot_product_attention, *case.inputs(), enable_gqa=case.is_grouped)
    yield Variant("", call)


def stored(case, threads):
    query, key, value, *scales = case.inputs()
    named = dict(zip(("key_scale", "value_scale"), scales, strict=False))
    attend = functools.partial(fastattn.dot_product_attention, query, key, value, enable_gqa=case.is_grouped, **named)
    yield Variant("", attend, lambda output: output.astype(np.float64))


def plain_stored(case, threads):
    """The same in float32, which this should beat."""
    expected = baselines.expected_attention(*case.as_rows.inputs())
    call = functools.partial(fastattn.dot_product_attention, *case.plain(), enable_gqa=case.is_grouped)
    yield Variant("", call, expected=expected, allowed=2e-5)


def multihead(case, threads):
    x, *weights = case.inputs()
    attend = fastattn.MultiHeadAttention(*weights, num_heads=case.heads, **case.biases())
    yield Variant("", functools.partial(attend, x))


def multihead_step(case, threads):
    x, *weights = case.inputs()
    layer = fastattn.MultiHeadAttention(*weights, num_heads=case.heads, **case.biases())
    yield Variant("", lambda: layer.vjp(x)[1](case.grad_out()), lambda gradients: gradients["x"])


def products_and_attention(case, threads):
    """The minimum work of a layer, into preallocated arrays and without biases."""
    x, *weights, w_out = case.inputs()
    w_qkv = case.packed()[0]
    zeros = np.zeros(3 * case.d_model), np.zeros(case.d_model)
    expected = baselines.expected_multi_head_attention(x, w_qkv, zeros[0], w_out, zeros[1], heads=case.heads)
    rows = x.reshape(-1, case.d_model)
    attended, output = np.empty_like(rows), np.empty_like(rows)

    def variant(name, weights, projected, parts):
        query, key, value, out = (
            part.reshape(case.batch, case.seqlen, case.heads, -1).swapaxes(1, 2) for part in (*parts, attended)
        )

        def call():
            for weight, result in zip(weights, projected, strict=True):
                np.matmul(rows, weight, out=result)
            fastattn.dot_product_attention(query, key, value, out=out)
            np.matmul(attended, w_out, out=output)
            return output

        return Variant(name, call, lambda output: output.reshape(x.shape), expected)

    parts = [np.empty_like(rows) for _ in weights]
    yield variant("three products", weights, parts, parts)
    whole = np.empty((len(rows), 3 * case.d_model), x.dtype)
    yield variant("one product", [w_qkv], [whole], np.split(whole, 3, axis=1))


def rotary(case, threads):
    yield Variant("", functools.partial(fastattn.apply_rotary, *case.inputs()))


def rotary_out(case, threads):
    (x,) = case.inputs()
    yield Variant("", functools.partial(fastattn.apply_rotary, x, out=np.empty_like(x)))


def linear(case, threads):
    if case.is_delta:
        log_decay, beta = case.gates()
        gates = {"feature_map": None, "log_decay": log_decay[..., None], "beta": beta}
    else:
        gates = {}
    yield Variant("", functools.partial(fastattn.linear_attention, *case.inputs(), is_causal=True, **gates))


def linear_step(case, threads):
    query, key, value, state = case.inputs()
    state = state.copy()
    decay = np.full((1, 1), np.log(case.decay), np.float32)
    step = functools.partial(fastattn.linear_attention, query, key, value, feature_map=None, is_causal=True)
    yield Variant("", functools.partial(step, log_decay=decay, state=state, state_out=state))


def minilm(case, threads):
    batch, *_ = encoder.inputs(case)
    yield Variant("", functools.partial(encoder.model().encode_tokens, batch))


def additive(case, threads):
    yield Variant("", functools.partial(fastattn.additive_attention, *case.inputs(), **case.projections()))


def additive_back(case, threads):
    """Output and gradients."""
    names, inputs, grad_out = ("query", "key", "value", "w_score"), case.inputs(), case.grad_out()

    def step():
        output, lse = fastattn.additive_attention(*inputs, return_lse=True)
        return fastattn.additive_attention_vjp(grad_out, *inputs, output=output, lse=lse, wrt=names)

    yield Variant("", step, of_tokens)


def graph(case, threads):
    yield Variant(
        "", functools.partial(fastattn.graph_attention, *case.inputs(), case.structure, w_score=case.w_score())
    )


def graph_out(case, threads):
    out = np.empty((case.nodes, case.heads, case.channels), case.dtype).swapaxes(0, 1)
    attend = functools.partial(fastattn.graph_attention, w_score=case.w_score(), out=out)
    yield Variant("", functools.partial(attend, *case.inputs(), case.structure))


def graph_back(case, threads, out=None):
    """Output and gradients."""
    attend, back = (
        functools.partial(f, w_score=case.w_score()) for f in (fastattn.graph_attention, fastattn.graph_attention_vjp)
    )
    inputs, graph, grad_out = case.inputs(), case.structure, case.grad_out()
    into, gradients = (None, None) if out is None else out

    def step():
        attend(*inputs, graph, out=into)
        return back(grad_out, *inputs, graph, out=gradients)

    yield Variant("", step, functools.partial(np.concatenate, axis=-1))


def graph_back_out(case, threads):
    arrays = case.inputs()
    into, *gradients = (np.empty_like(x) for x in (case.grad_out(), *arrays))
    yield from graph_back(case, threads, (into, tuple(gradients)))


def softmax(case, threads):
    yield Variant("", functools.partial(fastattn.softmax, *case.inputs(), axis=case.axis))


def softmax_out(case, threads):
    (x,) = case.inputs()
    yield Variant("", functools.partial(fastattn.softmax, x, axis=case.axis, out=np.empty_like(x)))


def blocks(case, threads):
    call = functools.partial(fastattn.dot_product_attention, *case.inputs())
    yield Variant("", functools.partial(call, block_mask=case.pattern(), block_size=case.block))


def dense(case, threads):
    """All pairs, of which the pattern keeps some."""
    expected = baselines.expected_attention(*case.inputs())
    yield Variant("", functools.partial(fastattn.dot_product_attention, *case.inputs()), expected=expected)


def neighborhood(case, threads):
    yield Variant("", functools.partial(fastattn.neighborhood_attention, *case.inputs(), case.kernel_size))


def softmax_back(case, threads):
    yield Variant("", functools.partial(fastattn.softmax_vjp, *case.inputs(), axis=case.axis))


def softmax_back_out(case, threads):
    grad_out, weights = case.inputs()
    out = np.empty_like(weights)
    yield Variant("", functools.partial(fastattn.softmax_vjp, grad_out, weights, axis=case.axis, out=out))


def sparse(case, threads):
    yield Variant("", functools.partial(getattr(fastattn, case.function), *case.inputs(), axis=case.axis))


def sparse_out(case, threads):
    (x,) = case.inputs()
    yield Variant("", functools.partial(getattr(fastattn, case.function), x, axis=case.axis, out=np.empty_like(x)))


# Name -> (distribution, its implementation of each kind of case).
LIBRARIES = {
    "fastattn": (
        "fastattn",
        {
            "attention": attention,
            "softmax": softmax,
            "softmaxback": softmax_back,
            "sparse": sparse,
            "additive": additive,
            "additiveback": additive_back,
            "attentionback": attention_back,
            "truncated": truncated,
            "decode": decode,
            "stored": stored,
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
    "fastattn out=": (
        "fastattn",
        {
            "softmax": softmax_out,
            "softmaxback": softmax_back_out,
            "sparse": sparse_out,
            "rotary": rotary_out,
            "graph": graph_out,
            "graphback": graph_back_out,
        },
    ),
    "fastattn, float32": ("fastattn", {"stored": plain_stored}),
    "fastattn, dense": ("fastattn", {"blocks": dense}),
    "fastattn, back": ("fastattn", {"attentionback": attention_back_alone}),
    "fastattn, plain": ("fastattn", {"attentionback": attention_back_plain}),
    PRODUCTS_AND_ATTENTION: ("fastattn", {"multihead": products_and_attention}),
}
