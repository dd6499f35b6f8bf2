"""PyTorch: eager, compiled, and with its flexible attention."""

import contextlib
import functools

import numpy as np

import encoder
from suite import baselines

from .variant import Variant, of_tokens, refuse_large

# Keeps the context manager alive: PyTorch leaves inference mode when it is collected.
_for_good = contextlib.ExitStack()


@functools.cache
def _torch(threads):
    import torch

    torch.set_num_threads(threads)
    # Entered permanently: a `with` around each call would cost a microsecond.
    _for_good.enter_context(torch.inference_mode())
    return torch


def attention(case, threads):
    torch = _torch(threads)
    query, key, value = map(torch.from_numpy, case.inputs())
    attend = torch.nn.functional.scaled_dot_product_attention
    yield Variant("", lambda: attend(query, key, value, is_causal=case.is_causal))


def attention_back(case, threads):
    """Output, and gradients by autograd, which needs tensors made outside inference mode."""
    torch = _torch(threads)
    rules = {"is_causal": case.rule == "causal", "enable_gqa": case.rule == "grouped"}
    with torch.inference_mode(False):
        arrays = [torch.from_numpy(x).requires_grad_() for x in case.inputs()]
        grad_out = torch.from_numpy(case.grad_out())
        if case.window:
            rules["attn_mask"] = torch.from_numpy(case.visible())
        if case.rule == "bias":
            bias = torch.from_numpy(case.rules["bias"]).requires_grad_()
            rules["attn_mask"] = bias.expand(-1, case.seqlen, -1)
            arrays.append(bias)
    attend = torch.nn.functional.scaled_dot_product_attention

    def step():
        with torch.inference_mode(False):
            return torch.autograd.grad(attend(*arrays[:3], **rules), arrays, grad_out)

    yield Variant("", step, of_tokens)


def masked_truncated(case, threads):
    refuse_large(case, case.seqlen**2)
    torch = _torch(threads)
    query, key, value = map(torch.from_numpy, case.inputs())
    attend = torch.nn.functional.scaled_dot_product_attention
    visible = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool).tril(case.right).triu(-case.left)
    yield Variant("boolean mask", lambda: attend(query, key, value, attn_mask=visible))
    bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    yield Variant("float mask", lambda: attend(query, key, value, attn_mask=bias))


def flex_truncated(case, threads):
    """torch.compile's attention, which skips blocks of hidden scores."""
    torch = _torch(threads)
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    query, key, value = map(torch.from_numpy, case.inputs())
    # It recompiles for each window and length.
    torch._dynamo.config.recompile_limit = 256
    left, right = case.window

    def visible(batch, head, row, column):
        return (row - column <= left) & (column - row <= right)

    # Smaller blocks waste less but need more calls; each size takes up to ten seconds to compile.
    for size in (16, 32) if left + right < 64 else (32, 64):
        # What create_block_mask computes with an L x S array: which blocks are partly and which fully visible.
        count = -(-case.seqlen // size)
        apart = torch.arange(count) - torch.arange(count)[:, None]
        nearest = (apart.abs() - 1).clamp(min=0) * size + (apart != 0)
        seen = nearest <= torch.where(apart < 0, left, right)
        whole = (apart * size + size - 1 <= right) & (size - 1 - apart * size <= left)
        whole[:, -1] &= case.seqlen % size == 0
        lists = [_ordered(blocks[None, None]) for blocks in (seen & ~whole, whole)]
        mask = BlockMask.from_kv_blocks(
            *lists[0], *lists[1], BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(case.seqlen, case.seqlen)
        )
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        yield Variant(f"blocks of {size}", functools.partial(attend, query, key, value, block_mask=mask))


def _ordered(blocks):
    """How many are set in each row, and their indices: those that are set come first."""
    return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def flex_blocks(case, threads):
    torch = _torch(threads)
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch._dynamo.config.recompile_limit = 256
    arrays = [torch.from_numpy(x) for x in case.inputs()]
    numbers, indices = _ordered(torch.from_numpy(case.pattern())[None, None])
    none = torch.zeros_like(numbers), torch.zeros_like(indices)
    mask = BlockMask.from_kv_blocks(
        *none, numbers, indices, BLOCK_SIZE=case.block, seq_lengths=(case.seqlen_q, case.seqlen_k)
    )
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    yield Variant("", functools.partial(attend, *arrays, block_mask=mask))


def masked_blocks(case, threads):
    torch = _torch(threads)
    arrays = [torch.from_numpy(x) for x in case.inputs()]
    attend = torch.nn.functional.scaled_dot_product_attention
    visible = torch.from_numpy(case.pattern()).repeat_interleave(case.block, 0).repeat_interleave(case.block, 1)
    yield Variant("boolean mask", lambda: attend(*arrays, attn_mask=visible))


def gathered_neighborhood(case, threads):
    """What each pixel sees, copied: (heads, pixels, keys, channels)."""
    torch = _torch(threads)
    query, key, value = (torch.from_numpy(x[0]) for x in case.in_a_row())
    seen, scale = torch.from_numpy(case.seen()), case.head_dim**-0.5

    def gather():
        scores = (key[:, seen] @ query.unsqueeze(-1)).squeeze(-1) * scale
        return (scores.softmax(-1).unsqueeze(-2) @ value[:, seen]).squeeze(-2)

    yield Variant("", gather)


def masked_neighborhood(case, threads):
    torch = _torch(threads)
    arrays = [torch.from_numpy(x) for x in case.in_a_row()]
    pixels = arrays[0].shape[2]
    visible = torch.zeros(pixels, pixels, dtype=torch.bool).scatter_(1, torch.from_numpy(case.seen()), True)
    attend = torch.nn.functional.scaled_dot_product_attention
    yield Variant("boolean mask", lambda: attend(*arrays, attn_mask=visible))


def flex_neighborhood(case, threads):
    torch = _torch(threads)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 256
    arrays = [torch.from_numpy(x) for x in case.in_a_row()]
    pixels = arrays[0].shape[2]

    def visible(batch, head, row, column):
        seen = True
        for n in reversed(case.space):
            first = torch.clamp(row % n - case.kernel // 2, 0, n - case.kernel)
            seen = seen & (column % n >= first) & (column % n < first + case.kernel)
            row, column = row // n, column // n
        return seen

    mask = create_block_mask(visible, None, None, pixels, pixels, device="cpu")
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    yield Variant("", functools.partial(attend, *arrays, block_mask=mask))


def decode(case, threads):
    torch = _torch(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    query, key, value = map(torch.from_numpy, case.inputs())
    rows = torch.from_numpy(case.as_rows.inputs()[0])
    scale = case.head_dim**-0.5
    yield Variant(
        "enable_gqa" if case.is_grouped else "", lambda: attend(query, key, value, enable_gqa=case.is_grouped)
    )
    if case.is_grouped:
        yield Variant("groups as rows", lambda: attend(rows, key, value))
    yield Variant("matrix products", lambda: torch.softmax((rows * scale) @ key.mT, -1) @ value)


def stored(case, threads):
    """Of its own dtypes; a product of 8 bits with a scale a token is none of its operators."""
    if case.storage == "int8":
        raise NotImplementedError("it has no attention over int8")
    torch = _torch(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    bits = (torch.from_numpy(x.view(np.int16)).view(getattr(torch, case.storage)) for x in case.inputs())
    query, key, value = bits

    def read(output):
        return output.double().numpy()

    if case.is_grouped:
        rows = query.view(case.as_rows.inputs()[0].shape)
        yield Variant("groups as rows", lambda: attend(rows, key, value), read)
    yield Variant("", lambda: attend(query, key, value, enable_gqa=case.is_grouped), read)


def multihead_step(case, threads):
    torch = _torch(threads)
    functional = torch.nn.functional
    w_qkv, b_qkv, w_out, b_out = map(torch.from_numpy, case.packed())
    arrays = torch.from_numpy(case.inputs()[0]), w_qkv.T.contiguous(), b_qkv, w_out.T.contiguous(), b_out
    arrays = x, w_qkv, b_qkv, w_out, b_out = [array.clone().requires_grad_() for array in arrays]
    grad_out = torch.from_numpy(case.grad_out())

    def step():
        projected = functional.linear(x, w_qkv, b_qkv).unflatten(-1, (3, case.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        out = functional.linear(attended.transpose(1, 2).flatten(2), w_out, b_out)
        return torch.autograd.grad(out, arrays, grad_out)

    yield Variant("linear, scaled_dot_product_attention", step, lambda gradients: gradients[0].numpy())


def multihead(case, threads):
    torch = _torch(threads)
    functional = torch.nn.functional
    x = torch.from_numpy(case.inputs()[0])
    w_qkv, b_qkv, w_out, b_out = map(torch.from_numpy, case.packed())
    # Its weights multiply from the left.
    w_qkv, w_out = w_qkv.T.contiguous(), w_out.T.contiguous()
    layer = torch.nn.MultiheadAttention(case.d_model, case.heads, batch_first=True, dtype=x.dtype).eval()
    names = "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"
    layer.load_state_dict(dict(zip(names, (w_qkv, b_qkv, w_out, b_out), strict=True)))

    def written_out():
        projected = functional.linear(x, w_qkv, b_qkv).unflatten(-1, (3, case.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return functional.linear(attended.transpose(1, 2).flatten(2), w_out, b_out)

    yield Variant("nn.MultiheadAttention", lambda: layer(x, x, x, need_weights=False)[0])
    yield Variant("linear, scaled_dot_product_attention", written_out)


def rotary(case, threads):
    torch = _torch(threads)
    (array,) = case.inputs()
    x = torch.from_numpy(array)
    # As wide as x, each half of the channels with the same angles.
    tables = map(torch.from_numpy, baselines.rotary_tables(*array.shape[-2:], array.dtype))
    cosines, sines = (torch.cat([table, table], -1) for table in tables)

    def rotate_half(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    yield Variant("", lambda: x * cosines + rotate_half(x) * sines)


def _elu_plus_1(torch, x):
    return torch.nn.functional.elu(x) + 1


def _linear_in_chunks(torch, query, key, value, size):
    query, key = _elu_plus_1(torch, query), _elu_plus_1(torch, key)
    state = query.new_zeros(*key.shape[:-2], key.shape[-1], value.shape[-1])
    total = query.new_zeros(*key.shape[:-2], key.shape[-1], 1)
    parts = []
    for q, k, v in zip(*(x.split(size, -2) for x in (query, key, value)), strict=True):
        scores = (q @ k.mT).tril_()
        parts.append((scores @ v + q @ state) / (scores.sum(-1, keepdim=True) + q @ total + 1e-6))
        state = state + k.mT @ v
        total = total + k.sum(-2)[..., None]
    return torch.cat(parts, -2)


def _linear_all_chunks(torch, query, key, value, size):
    """A state for each chunk, all at once."""
    query, key = (_elu_plus_1(torch, x).unflatten(-2, (-1, size)) for x in (query, key))
    value = value.unflatten(-2, (-1, size))
    states, totals = key.mT @ value, key.sum(-2)[..., None]
    before, total = states.cumsum(-3) - states, totals.cumsum(-3) - totals
    scores = (query @ key.mT).tril_()
    below = scores.sum(-1, keepdim=True) + query @ total + 1e-6
    return ((scores @ value + query @ before) / below).flatten(-3, -2)


def _gated_delta_in_chunks(torch, query, key, value, log_decay, beta, size, solve):
    """As Transformers falls back to on a CPU: corrections within a chunk are a triangular system."""
    query = query * query.shape[-1] ** -0.5
    query, key, value = (x.unflatten(-2, (-1, size)) for x in (query, key, value))
    log_decay, beta = (x.unflatten(-1, (-1, size)) for x in (log_decay, beta))
    weighted, values = key * beta[..., None], value * beta[..., None]
    sums = log_decay.cumsum(-1)
    decays = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
    below = (weighted @ key.mT * decays).tril(-1)
    identity = torch.eye(size, dtype=key.dtype)
    if solve:
        inverse = torch.linalg.solve_triangular(below + identity, identity, upper=False, unitriangular=True)
    else:
        inverse = -below
        for i in range(1, size):
            row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
            inverse[..., i, :i] = row + (row[..., None] * above).sum(-2)
        inverse = inverse + identity
    values, decayed_keys = inverse @ values, inverse @ (weighted * sums.exp()[..., None])
    scores = (query @ key.mT * decays).tril()
    last = sums[..., -1, None]
    from_before, to_end = query * sums.exp()[..., None], key * (last - sums).exp()[..., None]
    state = query.new_zeros(*key.shape[:-3], key.shape[-1], value.shape[-1])
    parts = []
    for i in range(key.shape[-3]):
        new = values[..., i, :, :] - decayed_keys[..., i, :, :] @ state
        parts.append(from_before[..., i, :, :] @ state + scores[..., i, :, :] @ new)
        state = state * last[..., i, :, None].exp() + to_end[..., i, :, :].mT @ new
    return torch.cat(parts, -2)


def linear(case, threads):
    torch = _torch(threads)
    arrays = [*map(torch.from_numpy, (*case.inputs(), *case.gates()))]
    for size in (32, 64, 128):
        if case.is_delta:
            for name, solve in (("rows in turn", False), ("triangular solve", True)):
                call = functools.partial(_gated_delta_in_chunks, torch, *arrays, size, solve)
                yield Variant(f"chunks of {size}, {name}", call)
        else:
            yield Variant(f"chunks of {size}", functools.partial(_linear_in_chunks, torch, *arrays, size))
            yield Variant(f"all chunks of {size} at once", functools.partial(_linear_all_chunks, torch, *arrays, size))


def linear_step(case, threads):
    torch = _torch(threads)
    query, key, value, state = (torch.from_numpy(x).flatten(0, 1) for x in case.inputs())
    key, scale = key.mT, query.shape[-1] ** -0.5

    def two_passes(state):
        state.mul_(case.decay).add_(key * value)
        return torch.bmm(query, state) * scale

    def one_pass(state):
        state.baddbmm_(key, value, beta=case.decay)
        return torch.bmm(query, state) * scale

    shape = (case.batch, case.heads, 1, case.head_dim)
    for name, step in (("mul_, add_", two_passes), ("baddbmm_", one_pass)):
        yield Variant(name, functools.partial(step, state.clone()), lambda out: out.numpy().reshape(shape))


def minilm(case, threads):
    torch = _torch(threads)
    _, folder, *arrays = encoder.inputs(case)
    ids, lengths = map(torch.from_numpy, arrays)
    for name, make in encoder.PYTORCH.items():
        yield Variant(name, functools.partial(make(folder), ids, lengths))


def _additive(case, threads, ways, is_compiled=False):
    """`ways` compute scores from query, key and w_score; those in _KEYS_LAST take the key with its last axes
    swapped."""
    torch = _torch(threads)
    query, key, value, w_score = map(torch.from_numpy, case.inputs())
    projections = {name: torch.from_numpy(array) for name, array in case.projections().items()}
    key_last = key.mT.contiguous()
    if is_compiled:
        # One function is compiled for every case, and after 8 PyTorch would stop compiling.
        torch._dynamo.config.recompile_limit = 256
    for name, make_scores in ways.items():
        is_key_last = make_scores in _KEYS_LAST

        def attend(query, key, value, w_score, w_query=None, w_key=None, make_scores=make_scores, swap=is_key_last):
            if w_query is not None:
                query, key = query @ w_query, w_key.mT @ key if swap else key @ w_key
            return torch.softmax(make_scores(torch, query, key, w_score), -1) @ value

        if is_compiled:
            attend = torch.compile(attend, dynamic=False, fullgraph=True)
        arrays = query, key_last if is_key_last else key, value, w_score
        yield Variant(name, functools.partial(attend, *arrays, **projections))


def _tanh_matmul(torch, query, key, w_score):
    return torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ w_score


def _tanh_sum(torch, query, key, w_score):
    """As in Keras' AdditiveAttention."""
    return torch.sum(w_score * torch.tanh(query[..., :, None, :] + key[..., None, :, :]), -1)


def _tanh_sum_keys_last(torch, query, key, w_score):
    return torch.sum(w_score[:, None] * torch.tanh(query[..., None] + key[..., None, :, :]), -2)


def _exponentials(torch, query, key, w_score):
    a, b = torch.exp(2 * query)[..., :, None, :], torch.exp(2 * key)[..., None, :, :]
    return torch.sum(w_score * (1 - 2 / (1 + a * b)), -1)


def _exponentials_keys_last(torch, query, key, w_score):
    a, b = torch.exp(2 * query)[..., None], torch.exp(2 * key)[..., None, :, :]
    return torch.sum(w_score[:, None] * (1 - 2 / (1 + a * b)), -2)


_KEYS_LAST = (_tanh_sum_keys_last, _exponentials_keys_last)


def eager_additive(case, threads):
    refuse_large(case, case.triples)
    return _additive(case, threads, {"": _tanh_matmul})


def keras_additive(case, threads):
    refuse_large(case, case.triples)
    return _additive(case, threads, {"": _tanh_sum})


def compiled_additive(case, threads):
    # PyTorch compiles Keras' sum to the same loops as the matrix product.
    ways = {"keys as rows": _tanh_matmul, "keys last": _tanh_sum_keys_last}
    return _additive(case, threads, ways, is_compiled=True)


def compiled_exp_additive(case, threads):
    ways = {"keys as rows": _exponentials, "keys last": _exponentials_keys_last}
    return _additive(case, threads, ways, is_compiled=True)


def sparse_graph(case, threads):
    """Scores of the stored entries, a softmax over segments, and a sparse product; a head at a time."""
    torch = _torch(threads)
    query, key, value = map(torch.from_numpy, case.inputs())
    indptr, indices = (torch.from_numpy(x.astype(np.int64)) for x in case.structure)
    rows, lengths, shape = torch.from_numpy(case.rows()), indptr.diff(), (case.nodes, case.nodes)
    empty = torch.sparse_csr_tensor(indptr, indices, torch.zeros(len(indices), dtype=query.dtype), shape)
    heads = [[x.contiguous() for x in array] for array in (query, key, value)]

    def attend(q, k, v):
        if case.score == "dot":
            scores = torch.sparse.sampled_addmm(empty, q, k.T, beta=0.0, alpha=case.channels**-0.5).values()
        else:
            scores = torch.nn.functional.leaky_relu(q[rows, 0] + k[indices, 0], 0.2)
        most = torch.segment_reduce(scores, "max", lengths=lengths, initial=-torch.inf)
        weights = torch.exp(scores - most[rows])
        weights /= torch.segment_reduce(weights, "sum", lengths=lengths)[rows]
        return torch.sparse_csr_tensor(indptr, indices, weights, shape) @ v

    yield Variant("", lambda: torch.stack([attend(*head) for head in zip(*heads, strict=True)]))


def _message_passing(case):
    """PyTorch Geometric's propagate, as its TransformerConv and GATConv call it, without their linear layers: it takes
    query, key and value, (nodes, heads, channels)."""
    import torch
    from torch_geometric.nn import MessagePassing
    from torch_geometric.utils import softmax

    edges = torch.from_numpy(np.stack([case.structure[1], case.rows()]).astype(np.int64))

    class Dots(MessagePassing):
        def message(self, query_i, key_j, value_j, index, ptr, size_i):
            scores = (query_i * key_j).sum(dim=-1) / case.channels**0.5
            return value_j * softmax(scores, index, ptr, size_i).unsqueeze(-1)

    class Gat(MessagePassing):
        def message(self, query_i, key_j, value_j, index, ptr, size_i):
            scores = torch.nn.functional.leaky_relu(query_i + key_j, 0.2).squeeze(-1)
            return value_j * softmax(scores, index, ptr, size_i).unsqueeze(-1)

    layer = (Dots if case.score == "dot" else Gat)(node_dim=0)
    size = case.nodes, case.nodes
    return lambda query, key, value: layer.propagate(edges, query=query, key=key, value=value, size=size)


def geometric_graph(case, threads):
    torch = _torch(threads)
    nodes = [torch.from_numpy(x.swapaxes(0, 1)) for x in case.inputs()]
    attend = _message_passing(case)
    yield Variant("", lambda: attend(*nodes), lambda output: np.asarray(output).swapaxes(0, 1))


def geometric_graph_back(case, threads):
    """The same, and autograd, which needs tensors made outside inference mode."""
    torch = _torch(threads)
    with torch.inference_mode(False):
        nodes = [torch.from_numpy(x.swapaxes(0, 1)).requires_grad_() for x in case.inputs()]
        grad_out = torch.from_numpy(case.grad_out().swapaxes(0, 1))
        attend = _message_passing(case)

    def step():
        with torch.inference_mode(False):
            return torch.autograd.grad(attend(*nodes), nodes, grad_out)

    yield Variant("", step, lambda gradients: np.concatenate(gradients, axis=-1).swapaxes(0, 1))


def _additive_back(case, threads, ways, is_compiled=False):
    """Output, and gradients by autograd, which needs tensors made outside inference mode."""
    refuse_large(case, case.triples)
    torch = _torch(threads)
    with torch.inference_mode(False):
        arrays = [torch.from_numpy(x).requires_grad_() for x in case.inputs()]
        grad_out = torch.from_numpy(case.grad_out())
    if is_compiled:
        torch._dynamo.config.recompile_limit = 256
    for name, make_scores in ways.items():

        def attend(query, key, value, w_score, make_scores=make_scores):
            return torch.softmax(make_scores(torch, query, key, w_score), -1) @ value

        if is_compiled:
            attend = torch.compile(attend, dynamic=False, fullgraph=True)

        def step(attend=attend):
            with torch.inference_mode(False):
                return torch.autograd.grad(attend(*arrays), arrays, grad_out)

        yield Variant(name, step, of_tokens)


def eager_additive_back(case, threads):
    return _additive_back(case, threads, {"": _tanh_matmul})


def compiled_additive_back(case, threads):
    ways = {"matrix product": _tanh_matmul, "sum": _tanh_sum}
    return _additive_back(case, threads, ways, is_compiled=True)


def softmax(case, threads):
    x = _torch(threads).from_numpy(case.inputs()[0])
    yield Variant("", lambda: x.softmax(case.axis))


def softmax_back(case, threads):
    """What autograd calls for the gradient of softmax."""
    torch = _torch(threads)
    grad_out, weights = map(torch.from_numpy, case.inputs())
    yield Variant("", lambda: torch._softmax_backward_data(grad_out, weights, case.axis, weights.dtype))


# Name -> (distribution, its implementation of each kind of case).
LIBRARIES = {
    "PyTorch": (
        "torch",
        {
            "attention": attention,
            "softmax": softmax,
            "softmaxback": softmax_back,
            "additive": eager_additive,
            "additiveback": eager_additive_back,
            "attentionback": attention_back,
            "decode": decode,
            "stored": stored,
            "multihead": multihead,
            "multiheadstep": multihead_step,
            "rotary": rotary,
            "linear": linear,
            "linearstep": linear_step,
            "minilm": minilm,
        },
    ),
    "PyTorch, masked": (
        "torch",
        {"truncated": masked_truncated, "neighborhood": masked_neighborhood, "blocks": masked_blocks},
    ),
    "PyTorch, flex": ("torch", {"truncated": flex_truncated, "neighborhood": flex_neighborhood, "blocks": flex_blocks}),
    "PyTorch, gather": ("torch", {"neighborhood": gathered_neighborhood}),
    "PyTorch, Keras form": ("torch", {"additive": keras_additive}),
    "PyTorch compiled": ("torch", {"additive": compiled_additive, "additiveback": compiled_additive_back}),
    "PyTorch, sparse": ("torch", {"graph": sparse_graph}),
    "PyTorch Geometric": ("torch_geometric", {"graph": geometric_graph, "graphback": geometric_graph_back}),
    "PyTorch compiled, exp": ("torch", {"additive": compiled_exp_additive}),
}
