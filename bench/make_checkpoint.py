"""A small random-weight checkpoint with a byte-level tokenizer, to run every stage on real text without a download.

    python -m bench.make_checkpoint FOLDER [--hidden 64] [--layers 2] [--seed 0]

What such a model writes means nothing; every format, record and file of a run with it is real.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cai_fast.model import ModelConfig, init_random

SPECIAL = ("<pad>", "<bos>", "<eos>", "<eoc>")
MEAN_LENGTH = 12  # tokens of a text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=["<eoc>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return wrapped


def make_checkpoint(folder: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> None:
    """Write the checkpoint as a Hugging Face folder."""
    from cai_fast.tokenizer import Tokenizer as Wrapped

    with tempfile.TemporaryDirectory() as scratch:
        byte_tokenizer().save_pretrained(scratch)
        tokenizer = Wrapped.load(scratch)
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=hidden, intermediate_size=4 * hidden, num_layers=layers,
            num_heads=4, num_kv_heads=2, head_dim=hidden // 4, max_position_embeddings=32768,
            kept=(("bos_token_id", tokenizer.bos_id or 1), ("eos_token_id", tokenizer.eos_id),
                  ("pad_token_id", tokenizer.pad_id)),
        )  # fmt: skip
        model = init_random(config, seed)
        with torch.no_grad():
            # All tokens share one large component, which the final norm scales to about sqrt(hidden); the head turns
            # it into a constant logit for the end token, so that texts end after a dozen tokens, as real ones end.
            model.get_parameter("model.embed_tokens.weight")[:, 0] = 1.0
            boost = math.log(tokenizer.vocab_size / MEAN_LENGTH) / math.sqrt(hidden)
            model.get_parameter("lm_head.weight")[tokenizer.eos_id, 0] = boost
        model.save(folder, tokenizer=tokenizer)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(arguments.folder, hidden=arguments.hidden, layers=arguments.layers, seed=arguments.seed)
    print(f"{arguments.folder}: random weights, byte-level tokenizer")


if __name__ == "__main__":
    main()
