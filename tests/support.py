"""Small inputs made on the spot: tokenizers, constitutions, files of the published schema."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_CORPUS = (
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix the flour with water, and wait.",
    "\n\nCritiqueRequest: Say what is wrong with the response.\n\nCritique: The assistant said nothing.",
    "\n\nRevisionRequest: Rewrite the response.\n\nRevision: Please choose the response that is better. Options:",
    " (A) [[[yes]]]\n (B) [[[no]]]\n\nThe answer is: (A)\n\nLet's think step by step:",
)


def byte_tokenizer(
    folder: str | Path,
    *,
    chat_template: str | None = None,
    eoc: bool = True,
    bos: bool = True,
    pad: bool = True,
    vocab_size: int = 400,
) -> Path:
    """Write a byte-level BPE tokenizer (every text round-trips) with <bos> <eos> <pad> <eoc> into `folder`.

    `chat_template=CHAT_TEMPLATE` makes it a chat model's, with <|start|> and <|end|>; bos=True means that it puts
    <bos> before a text by itself, as Llama's does.
    """
    special = ["<pad>", "<bos>", "<eos>", *(["<eoc>"] if eoc else []), "<|start|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|end|>" if chat_template else "<eos>",
        pad_token="<pad>" if pad else None, clean_up_tokenization_spaces=False)  # fmt: skip
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    return Path(folder)


MINIMAL = """
[constitution]
name = "n"
version = "1"
[[principle]]
id = "p"
critique_request = "C?"
revision_request = "R!"
[[principle]]
id = "q"
comparison = "Which?"
weight = 3
"""
CUSTOM = """
[format]
kind = "custom"
human = "H {text} "
assistant = "A {text} {eos} "
reply = "A"
critique = "{conversation}A {response} {eos} C {critique_request} :"
revision = "{conversation}A {response} {eos} C {critique_request} : {critique} {eos} R {revision_request} :"
direct_revision = "{conversation}A {response} {eos} R {revision_request} :"
comparison = "{conversation}Q {comparison} (A) {response_a} (B) {response_b} :"
cot = "{conversation}Q {comparison} (A) {response_a} (B) {response_b} think :"
cot_answer = "answer :"
end = " {eos} "
options = ["(A)", "(B)"]
refusals = ["sorry , i can not"]
"""


def write_constitution(folder: Path, text: str) -> Path:
    """A constitution file in `folder`."""
    (folder / "c.toml").write_text(text)
    return folder / "c.toml"


def paper_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Files of the published schema, in our own words, with the published quirks."""
    steps = "\n\nCritiqueRequest: Any harm?\n\nCritique: None.\n\nRevisionRequest: Mend it.\n\nRevision: Fine."
    talk = "\n\nHuman: May I park here?\n\nAssistant: Fine."
    question = (
        "Human: Consider the following conversation between a human (H) and an assistant (A):"
        "\n\nH: Tea?\n\nA:  Yes\n\nH: Milk?\n\n{}\n (A) [[[Some {x}.\n\nMore.]]]\n (B) [[[None.]]]"
        "\n\nAssistant: Let's think step by step: A is.\n\nHuman:\nSo the answer is: (A)"
    )
    files = {
        "CritiqueRevisionInstructions": {
            "harm0": {
                "prompt": ["\n\nCritiqueRequest: Any harm?\n\nCritique:"],
                "edit_request": "\n\nRevisionRequest: Mend it all.\n\nRevision:",
            },
            "harm1": {
                "prompt": ["\n\nCritiqueRequest: Any bias?\n\nCritique:"],
                "edit_request": "\n\nRevisionRequest: Mend the bias.\n\nRevision:",
            },
        },
        "CritiqueRevisionFewShotPrompts": [talk + steps + "\n\nHuman:", talk + steps],
        "RLMadisonInstructions": ["\nWhich is kinder? Options:", "\nWhich is safer? Options:"],
        "RLMadisonFewShotPrompts": [
            {"prompt": "\n\nHuman: Hello?\n\nAssistant:", "corrects": ["Hi."], "incorrects": ["No."]}
        ],
        "RLMadisonPrecogFewShotPrompts": [{"prompt": lead + question} for lead in ("\n\n", "\n", "")],
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder, files
