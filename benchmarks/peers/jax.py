"""JAX, compiled ahead of time."""

import functools

import numpy as np

from .variant import Variant, refuse_large


def attention(case, threads):
    import jax

    for name, attend in (("dot_product_attention", jax.nn.dot_product_attention), ("einsums", _einsums)):
        yield _variant(name, functools.partial(attend, is_causal=case.is_causal), case)


def truncated(case, threads):
    import jax

    refuse_large(case, case.seqlen**2)
    attend = functools.partial(jax.nn.dot_product_attention, local_window_size=case.window)
    yield _variant("dot_product_attention", attend, case)


def decode(case, threads):
    import jax

    if case.is_grouped:
        yield _variant("dot_product_attention, grouped", jax.nn.dot_product_attention, case)
    yield from attention(case.as_rows, threads)


def multihead(case, threads):
    import jax

    arrays = case.inputs()[0], *case.packed()
    for name, attend in (("dot_product_attention", jax.nn.dot_product_attention), ("einsums", _einsums)):

        def layer(x, w_qkv, b_qkv, w_out, b_out, attend=attend):
            projected = (x @ w_qkv + b_qkv).reshape(*x.shape[:2], 3, case.heads, -1)
            attended = attend(*(projected[:, :, index] for index in range(3)))
            return attended.reshape(x.shape) @ w_out + b_out

        yield _compiled(name, layer, arrays)


def _einsums(query, key, value, is_causal=False):
    import jax
    from jax import numpy as jnp

    scores = jnp.einsum("blhd,bshd->bhls", query * query.shape[-1] ** -0.5, key)
    if is_causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(scores), value)


def _variant(name, function, case):
    def read(output):
        return np.asarray(output).swapaxes(1, 2)

    # JAX's own layout: (batch, seqlen, heads, head_dim).
    return _compiled(name, function, [np.ascontiguousarray(x.swapaxes(1, 2)) for x in case.inputs()], read)


def _compiled(name, function, arrays, read=np.asarray):
    import jax

    jax.config.update("jax_enable_x64", True)
    arrays = [jax.device_put(array) for array in arrays]
    compiled = jax.jit(function).lower(*arrays).compile()
    return Variant(name, lambda: compiled(*arrays).block_until_ready(), read)


# Name -> (distribution, its implementation of each kind of case).
LIBRARIES = {
    "JAX": ("jax", {"attention": attention, "truncated": truncated, "decode": decode, "multihead": multihead}),
}
