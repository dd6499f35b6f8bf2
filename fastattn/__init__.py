"""Attention for NumPy arrays on CPUs, as fast as the machine allows.

The layers, from the top; each imports only what is below it:

    plot                            pictures of weights (needs matplotlib; not imported here)
    integrations                    arrays of PyTorch, JAX, autograd and Dask (not imported here)
    streaming                       attention over a stream, alone or with the projections of a layer
    multihead, projections          layers, and their matrix products
    _step, _context                 of layers: a step over a cache, a context that is projected once
    _weights, _configuration,
        _state                      the weights of other libraries, by the names in their dicts and files
    cache                           keys and values for decoding
    quantized, _quantize            and in 8 bits; the walk over their rows
    layers                          products with what follows them, and norms
    gradients                       of the attention functions
    attention, linear, graph, neighborhood, softmax,
        packing, positions, config           the public functions; a docstring is the specification
    _rules                          the keywords of attention: passed on by some modules, checked by others
    _frequencies                    what a model's configuration says about rotary encoding
    _gradients                      the driver of the way back, which begins with the one of attention
    _attention, _softmax, _layers   from a call that is checked to its result; their drivers are written in C
    _linear, _graph, _neighborhood,
        _merge, _positions, _linear_gradients,
        _graph_gradients            the drivers: tiles and rows, threads, scratch memory
    _vjp                            which gradients are wanted, and where they go
    _scores, _call                  check a call of attention -> a plain description for its driver
    _checks                         arrays, numbers, flags, out=, memory: each check once
    _load, _runtime                 the selected kernels, number of threads, scratch memory, Ctrl-C
    kernels/drive*.c, threads.c     the drivers of attention, rows and layers; threads and fork
    kernels/*.inc.h, *_f32.c ...    the mathematics, written once; instruction set and dtype enter as definitions

Beside all this stand the doors for compiled code: include/fastattn.h and cython_attention.pxd say what C and Cython can
call, kernels/embed.c checks it and calls the drivers.

`fastattn.reference` has the same functions in plain float64 NumPy. It defines what every function means, and nothing
here imports it.
"""

import importlib as _importlib
import typing as _typing

from fastattn import _load  # noqa: F401  (first: it loads the OpenMP library)
from fastattn.attention import (
    additive_attention,
    bilinear_attention,
    dot_product_attention,
    merge_attention,
    prepare_additive_keys,
    truncated_attention,
    varlen_attention,
)
from fastattn.config import cpu_info, get_include, get_num_threads, set_num_threads, show_config
from fastattn.positions import (
    alibi_slopes,
    apply_rotary,
    relative_position_buckets,
    rotary_frequencies,
    sinusoidal_encoding,
)
from fastattn.softmax import (
    entmax15,
    entmax15_vjp,
    log_softmax,
    log_softmax_vjp,
    logsumexp,
    logsumexp_vjp,
    softmax,
    softmax_vjp,
    sparsemax,
    sparsemax_vjp,
)

if _typing.TYPE_CHECKING:
    from fastattn.cache import KVCache
    from fastattn.gradients import (
        additive_attention_vjp,
        bilinear_attention_vjp,
        dot_product_attention_vjp,
        merge_attention_vjp,
        truncated_attention_vjp,
        varlen_attention_vjp,
    )
    from fastattn.graph import graph_attention, graph_attention_vjp
    from fastattn.layers import Linear, layer_norm, rms_norm
    from fastattn.linear import linear_attention, linear_attention_vjp
    from fastattn.multihead import MultiHeadAttention, self_attention, self_attention_vjp
    from fastattn.neighborhood import neighborhood_attention, neighborhood_attention_vjp
    from fastattn.packing import pack, unpack
    from fastattn.quantized import QuantizedKV, from_llama_cpp, quantize_kv
    from fastattn.streaming import StreamingAttention, StreamingMultiHeadAttention

__version__ = "0.2.0"

__all__ = [
    "KVCache",
    "Linear",
    "MultiHeadAttention",
    "QuantizedKV",
    "StreamingAttention",
    "StreamingMultiHeadAttention",
    "additive_attention",
    "additive_attention_vjp",
    "alibi_slopes",
    "apply_rotary",
    "bilinear_attention",
    "bilinear_attention_vjp",
    "cpu_info",
    "dot_product_attention",
    "dot_product_attention_vjp",
    "entmax15",
    "entmax15_vjp",
    "from_llama_cpp",
    "get_include",
    "get_num_threads",
    "graph_attention",
    "graph_attention_vjp",
    "layer_norm",
    "linear_attention",
    "linear_attention_vjp",
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "logsumexp_vjp",
    "merge_attention",
    "merge_attention_vjp",
    "neighborhood_attention",
    "neighborhood_attention_vjp",
    "pack",
    "prepare_additive_keys",
    "quantize_kv",
    "relative_position_buckets",
    "rms_norm",
    "rotary_frequencies",
    "self_attention",
    "self_attention_vjp",
    "set_num_threads",
    "show_config",
    "sinusoidal_encoding",
    "softmax",
    "softmax_vjp",
    "sparsemax",
    "sparsemax_vjp",
    "truncated_attention",
    "truncated_attention_vjp",
    "unpack",
    "varlen_attention",
    "varlen_attention_vjp",
]

# Classes and rarer functions are loaded on first use: without cached byte code they are most of what an import reads.
_LATER = {
    "KVCache": "cache",
    "Linear": "layers",
    "MultiHeadAttention": "multihead",
    "QuantizedKV": "quantized",
    "StreamingAttention": "streaming",
    "StreamingMultiHeadAttention": "streaming",
    "additive_attention_vjp": "gradients",
    "bilinear_attention_vjp": "gradients",
    "dot_product_attention_vjp": "gradients",
    "from_llama_cpp": "quantized",
    "graph_attention": "graph",
    "graph_attention_vjp": "graph",
    "layer_norm": "layers",
    "linear_attention": "linear",
    "linear_attention_vjp": "linear",
    "merge_attention_vjp": "gradients",
    "neighborhood_attention": "neighborhood",
    "neighborhood_attention_vjp": "neighborhood",
    "pack": "packing",
    "quantize_kv": "quantized",
    "rms_norm": "layers",
    "self_attention": "multihead",
    "self_attention_vjp": "multihead",
    "truncated_attention_vjp": "gradients",
    "unpack": "packing",
    "varlen_attention_vjp": "gradients",
}

if not _typing.TYPE_CHECKING:

    def __getattr__(name):
        if name in _LATER:
            globals()[name] = value = getattr(_importlib.import_module(f"fastattn.{_LATER[name]}"), name)
            return value
        if name == "_C_API":  # asked for by import_fastattn() of fastattn.h
            return _importlib.import_module("fastattn.cython_attention")._C_API
        if name in _LATER.values():
            return _importlib.import_module(f"fastattn.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_LATER, *_LATER.values()})
