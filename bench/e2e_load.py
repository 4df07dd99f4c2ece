"""What the end-to-end comparison works on: model folders, a tokenizer, and the lengths and settings of every stage.

A token is one character, so that a text and its tokens are the same wherever a peer insists on texts: no tokenizer can
cut them in another way, and prompt and response can be joined as strings.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cai_fast.model import ModelConfig, init_random

PAD, BOS, EOS, SPECIAL = 0, 1, 2, ("<pad>", "<bos>", "<eos>")
FIRST_CHARACTER = 0x20000  # a plane of letters that no normaliser touches
STAGES = ("sft", "reward", "dpo", "rloo", "grpo", "ppo", "generate", "judge")


@dataclass(frozen=True)
class Size:
    """A model and how much of everything. Lengths in tokens are uniform between two bounds, both included."""

    shape: dict[str, int]
    document: tuple[int, int] = (16, 256)
    prompt: tuple[int, int] = (16, 64)
    response: tuple[int, int] = (16, 128)
    answer: tuple[int, int] = (16, 64)
    """Responses that are sampled for RL."""
    row: int = 512
    """Tokens of a packed row of the peer's SFT."""
    rows: int = 4
    pairs: int = 16
    """Comparisons of a step of the preference model; DPO takes half of them."""
    prompts: int = 8
    samples: int = 4
    """Of a step of RL; PPO samples one answer each to as many prompts as there are answers."""
    requests: int = 64
    comparisons: int = 32
    principles: int = 4
    conversation: tuple[int, int] = (32, 96)
    principle: tuple[int, int] = (16, 32)
    glue: int = 12


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_layers": layers,
        "num_heads": heads, "num_kv_heads": kv, "head_dim": hidden // heads,
    }  # fmt: skip


LONG = {
    "document": (64, 1024), "prompt": (64, 256), "response": (64, 512), "answer": (64, 256), "row": 2048, "rows": 8,
    "pairs": 64, "prompts": 32, "requests": 128, "conversation": (128, 384), "comparisons": 64,
}  # fmt: skip
PRESETS = {
    "tiny": Size(_shape(8192, 256, 688, 4, 8, 4)),
    "small": Size(_shape(32000, 512, 1408, 8, 8, 4)),
    "1b": Size(_shape(128256, 2048, 8192, 16, 32, 8), **LONG),
}


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of both sides. lr is small: what is measured is time, and losses stay comparable."""

    lr: float = 1e-5
    rl_lr: float = 1e-6
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    dpo_beta: float = 0.1
    kl_coef: float = 0.05
    clip_coef: float = 0.2
    epochs: int = 1
    """Passes of PPO over a step's answers; RLOO and GRPO take one."""


@dataclass(frozen=True)
class Work:
    """What one step asks of both sides, in token ids, as the peer's own batch gave it."""

    sequences: list[list[int]]
    """Documents; or of pairs chosen, rejected, chosen, ...; or prompts."""
    starts: list[int] | None = None
    """DPO: where the responses begin."""
    lengths: list[int] | None = None
    """Sampling: new tokens of each."""
    together: int = 1
    """Judging: consecutive questions of one comparison."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def draw(size: Size, stage: str, count: int, seed: int = 0) -> list[Work]:
    """The texts of a stage, `count` works of one step each (the peer may put documents into other batches)."""
    g = random.Random(f"{stage}/{seed}")

    def text(bounds: tuple[int, int]) -> list[int]:
        return [g.randrange(len(SPECIAL), size.shape["vocab_size"]) for _ in range(g.randint(*bounds))]

    works = []
    for _ in range(count):
        if stage == "sft":
            mean = sum(size.document) / 2 + 1
            documents = round(size.rows * size.row / mean)
            works.append(Work([[*text(size.document), EOS] for _ in range(documents)]))
        elif stage in ("reward", "dpo"):
            sequences, starts = [], []
            for _ in range(size.pairs if stage == "reward" else size.pairs // 2):
                prompt = text(size.prompt)
                sequences += [[*prompt, *text(size.response), EOS] for _ in range(2)]
                starts += [len(prompt)] * 2
            works.append(Work(sequences, starts))
        elif stage == "judge":
            works.append(Work(_questions(size, text), together=2 * size.principles))
        elif stage == "generate":
            prompts = [text((size.prompt[0], 2 * size.prompt[1])) for _ in range(size.requests)]
            works.append(Work(prompts, lengths=[g.randint(*size.response) for _ in prompts]))
        else:
            answers = size.prompts * size.samples
            prompts = [text(size.prompt) for _ in range(answers if stage == "ppo" else size.prompts)]
            works.append(Work(prompts, lengths=[g.randint(*size.answer) for _ in range(answers)]))
    return works


def _questions(size: Size, text: Callable[[tuple[int, int]], list[int]]) -> list[list[int]]:
    """conversation, principle, both responses in either order, request: of each comparison under each principle."""
    principles, glue = [text(size.principle) for _ in range(size.principles)], text((size.glue, size.glue))
    asked = []
    for _ in range(size.comparisons):
        conversation, a, b = text(size.conversation), text(size.answer), text(size.answer)
        asked += [[*conversation, *p, *x, *y, *glue] for p in principles for x, y in ((a, b), (b, a))]
    return asked


def text_of(token_ids: list[int]) -> str:
    return "".join(SPECIAL[t] if t < len(SPECIAL) else chr(FIRST_CHARACTER + t) for t in token_ids)


def tokenizer(vocab: int) -> Any:
    """One token a character, and three special tokens; transformers' class around it."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(chr(FIRST_CHARACTER + t) for t in range(len(SPECIAL), vocab))]
    inner = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_folders(size: Size, folder: Path, dtype: torch.dtype) -> None:
    """Write FOLDER/policy and FOLDER/pm: random models (a language model, one with a scalar head), with a tokenizer."""
    kept = (("bos_token_id", BOS), ("eos_token_id", EOS), ("pad_token_id", PAD))
    config = ModelConfig(**size.shape, max_position_embeddings=8192, rms_norm_eps=1e-5, kept=kept)
    policy = init_random(config, 0)
    wrapped = tokenizer(config.vocab_size)
    for name, model in (("policy", policy), ("pm", policy.with_score_head(1))):
        model.save(folder / name, dtype=dtype)
        wrapped.save_pretrained(folder / name)
