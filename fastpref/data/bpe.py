"""Byte-level BPE tokenizer trained on the data, for models that start from random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastpref.data.formats import TextGroup
from fastpref.data.messages import Messages, text_of

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_TURN, _END_OF_TURN = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALLEST_VOCABULARY = 256 + 5  # every byte and the special tokens


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens, with BOS, EOS, padding and ChatML.

    Raises ValueError if `vocab_size` cannot hold the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size: must be >= {SMALLEST_VOCABULARY}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, _TURN, _END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[_TURN, _END_OF_TURN],
    )
    fast.chat_template = CHATML
    return fast


def texts_of(groups: Iterable[tuple[int, TextGroup]]) -> Iterator[str]:
    """Texts of all prompts and responses of the groups, for training a tokenizer."""
    for _, group in groups:
        for part in (group.prompt, *group.responses):
            yield part if isinstance(part, str) else _contents(part)


def _contents(messages: Messages) -> str:
    return "\n".join(text_of(message.get("content")) for message in messages)
