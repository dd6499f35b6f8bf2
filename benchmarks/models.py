"""What whole models of Hugging Face's Transformers gain from fastattn, on one thread.

    python benchmarks/models.py [--only PATTERN] [--rounds 7] [--seconds 45] [--quick]

Models of realistic sizes with random weights run with `attn_implementation="fastattn"` and with the library's own
attention, in turn and in one process, every second round in reverse. Times are CPU seconds of the process, so that
other programs count little; what is printed is the median over the rounds, and the median of the ratios within a round.
Needs torch and transformers. All cases together take some minutes, `--only` a part of them; `--quick` runs small ones.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field

SIZES = {"vocab_size": 8192, "pad_token_id": 0, "max_position_embeddings": 16384}
DECODER = {**SIZES, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
           "head_dim": 64, "num_hidden_layers": 2}  # fmt: skip


@dataclass
class Case:
    """A forward pass, or a step of decoding over `keys` tokens."""

    name: str
    model: str
    config: dict
    batch: int = 1
    length: int = 1
    lengths: tuple = ()  # of padded sequences
    keys: int = 0
    cache: str = ""
    own: tuple = ("sdpa",)
    small: dict = field(default_factory=dict)  # what --quick changes in the configuration


BERT = {"vocab_size": 8192, "pad_token_id": 0}
LLAMA = {**DECODER, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}
MODERN = {**SIZES, "num_hidden_layers": 7}  # global, local, local, global ... as the first of 22
CASES = (
    Case("BERT-base, 128 tokens", "Bert", BERT, length=128),
    Case("BERT-base, 512 tokens", "Bert", BERT, length=512),
    Case("BERT-base, 4 texts padded to 384", "Bert", BERT, batch=4, length=384, lengths=(384, 230, 120, 60)),
    Case("ModernBERT-base (7 of 22 layers), 512", "ModernBert", MODERN, length=512),
    Case("ModernBERT-base (7 of 22 layers), 4096", "ModernBert", MODERN, length=4096),
    Case("T5-small, 512 tokens to 64", "T5", {"vocab_size": 8192}, length=512),
    Case("Mistral-like (2 layers), window 512, 4096", "Mistral", {**DECODER, "sliding_window": 512}, length=4096),
    Case("Llama-like (2 layers), 2048", "Llama", DECODER, length=2048),
    Case("Gemma 2-like (2 layers), soft cap, 2048", "Gemma2", {**DECODER, "query_pre_attn_scalar": 64,
         "sliding_window": 1024, "attn_logit_softcapping": 50.0}, length=2048, own=("eager",)),
    Case("gpt-oss-like (2 layers), sinks, 2048", "GptOss", {**DECODER, "sliding_window": 128, "num_local_experts": 4,
         "num_experts_per_tok": 2}, length=2048, own=("eager",)),
    Case("Llama-like (2 layers), a step over 8192, growing cache", "Llama", LLAMA, keys=8192, cache="growing"),
    Case("Llama-like (2 layers), a step over 8192, static cache", "Llama", LLAMA, keys=8192, cache="static"),
)  # fmt: skip


def build(case):
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{case.model}Config")(**case.config | case.small)
    config._attn_implementation = "fastattn"
    return getattr(transformers, f"{case.model}Model")(config).eval()


def passes(case):
    """A function that sets the attention of the model, and one that runs it and returns numbers to compare."""
    import torch
    import transformers

    model = build(case)
    vocabulary = case.config["vocab_size"]
    ids = torch.randint(1, vocabulary, (case.batch, max(case.length, case.keys)))
    if case.keys:
        cache = filled(case, model)
        step = ids[:, :1]

        @torch.inference_mode()
        def run():
            out = model(step, cache=cache).last_hidden_state
            if case.cache == "growing":
                cache.crop(-1)
            return out

        return model.set_attn_implementation, run
    given = {"input_ids": ids}
    if case.lengths:
        given["attention_mask"] = (torch.arange(case.length) < torch.tensor(case.lengths)[:, None]).long()
    if case.model == "T5":
        given["decoder_input_ids"] = ids[:, :64]
    elif not isinstance(model, transformers.BertModel | transformers.ModernBertModel):
        given["use_cache"] = False

    @torch.inference_mode()
    def run():
        return model(**given).last_hidden_state

    return model.set_attn_implementation, run


def filled(case, model):
    """A cache of random keys and values."""
    import torch
    import transformers

    heads, channels = model.config.num_key_value_heads, model.config.head_dim
    if case.cache == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=case.keys + 512)
    else:
        cache = transformers.DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        key, value = torch.randn(2, case.batch, heads, case.keys, channels)
        cache.update(key, value, layer)
    return cache


def measure(case, rounds, seconds):
    """{implementation: CPU seconds of each round}, and the largest difference of the outputs."""
    switch, run = passes(case)
    names = ("fastattn", *case.own)
    taken = {name: [] for name in names}
    outputs = {}
    for name in names:
        switch(name)
        outputs[name] = run()
    valid = slice(None)
    if case.lengths:
        import torch

        valid = torch.arange(case.length) < torch.tensor(case.lengths)[:, None]
    # A static cache is not set back, so that its outputs are of different tokens.
    apart = None if case.cache == "static" else max(
        float((outputs["fastattn"] - outputs[name])[valid].abs().max() / outputs[name][valid].abs().max())
        for name in case.own
    )  # fmt: skip
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            switch(name)
            number = 0
            start = time.process_time()
            while not number or time.process_time() - start < 0.1:
                run()
                number += 1
            taken[name].append((time.process_time() - start) / number)
        if time.perf_counter() > end:
            break
    return taken, apart


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name contains it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=45, help="after which no round of a case begins")
    parser.add_argument("--quick", action="store_true", help="one round of small models, to see that they run")
    options = parser.parse_args(arguments)
    import torch
    import transformers

    import fastattn
    from fastattn.integrations.transformers import register

    register()
    torch.set_num_threads(1)
    fastattn.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = [case for case in CASES if options.only.lower() in case.name.lower()]
    if not cases:
        parser.error(f"--only {options.only!r} is in none of the names: {'; '.join(case.name for case in CASES)}")
    print("| model | own, ms | fastattn, ms | faster by | rounds | apart |\n|---|---|---|---|---|---|", flush=True)
    for case in cases:
        if options.quick:
            case = shrunk(case)
        taken, apart = measure(case, 1 if options.quick else options.rounds, options.seconds)
        for name in case.own:
            ratio = statistics.median(a / b for a, b in zip(taken[name], taken["fastattn"], strict=True))
            own, ours = (1e3 * statistics.median(taken[each]) for each in (name, "fastattn"))
            shown = "" if apart is None else f"{apart:.0e}"
            print(
                f"| {case.name} | {own:.1f} {name} | {ours:.1f} | {ratio:.2f} | {len(taken[name])} | {shown} |",
                flush=True,
            )
    return 0


def shrunk(case):
    """The same model with fewer channels and tokens."""
    import dataclasses

    length = min(case.length, 32)
    lengths = tuple(max(1, n * length // case.length) for n in case.lengths)
    small = {"num_layers": 1} if case.model == "T5" else {"num_hidden_layers": 1, "intermediate_size": 64}
    return dataclasses.replace(case, length=length, lengths=lengths, keys=min(case.keys, 64), small=small)


if __name__ == "__main__":
    sys.exit(main())
