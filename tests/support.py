"""Small tokenizers made on the spot, for tests that need a checkpoint's tokenizer files."""

from pathlib import Path

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


def byte_tokenizer(folder: str | Path, *, chat_template: str | None = None, eoc: bool = True, bos: bool = True,
                   pad: bool = True, vocab_size: int = 400) -> Path:
    """Write a byte-level BPE tokenizer (every text round-trips) with <bos> <eos> <pad> <eoc> into `folder`.

    `chat_template=CHAT_TEMPLATE` makes it a chat model's, with <|start|> and <|end|>; bos=True means that it puts
    <bos> before a text by itself, as Llama's does.
    """
    special = ["<pad>", "<bos>", "<eos>", *(["<eoc>"] if eoc else []), "<|start|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|end|>" if chat_template else "<eos>",
        pad_token="<pad>" if pad else None, clean_up_tokenization_spaces=False)  # fmt: skip
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    return Path(folder)
