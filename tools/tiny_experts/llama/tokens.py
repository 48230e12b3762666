"""Its tokenizer: BPE as SentencePiece writes it, with `▁` for a space and `<0xEE>` for other bytes."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny_experts.tasks import Example
from tiny_experts.tokens import Encoded

UNKNOWN, BEGIN, END, USER, MODEL, SYSTEM = SPECIALS = ("<unk>", "<s>", "</s>", "[USER]", "[MODEL]", "[SYS]")
BEGIN_ID, END_ID = 1, 2  # special tokens come first in the vocabulary, in the order given
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"
CHARACTERS = (SPACE, *(character for character in string.printable if not character.isspace()))

# A line break, which the vocabulary knows as a byte only, stands between a role and what it says.
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '[MODEL]\\n' ~ message['content'] ~ eos_token }}"
    "{%- elif message['role'] == 'system' -%}{{ '[SYS]\\n' ~ message['content'] }}"
    "{%- else -%}{{ '[USER]\\n' ~ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[MODEL]\\n' }}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], num_tokens: int) -> Tokenizer:
    """BPE of exactly `num_tokens` entries: special tokens, all bytes, characters, merges.

    Spaces part no words, so merges reach across them, as with SentencePiece's split_by_whitespace=false.
    A text that follows no special token gets a space before it, unless it begins with one; decoding takes one
    away.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens - len(SPECIALS) - len(BYTES),
        initial_alphabet=list(CHARACTERS),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    pieces = (*SPECIALS, *BYTES, *sorted(learnt["vocab"], key=learnt["vocab"].__getitem__))
    if len(pieces) != num_tokens:
        raise ValueError(f"the text gives {len(pieces)} tokens, not {num_tokens}: give more text")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token=UNKNOWN,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    # Llama's own decoder. The library's Metaspace would take every space of the first token away.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves it. The template writes BEGIN; encoding adds nothing."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
    """What the chat template gives, without a Jinja run per example (tests compare the two).

    An answer is cut as it stands in the conversation: alone it would get a space before it.
    """
    prompts = [f"{BEGIN}{USER}\n{row.prompt}{MODEL}\n" for row in examples]
    whole = [f"{prompt}{row.answer}{END}" for prompt, row in zip(prompts, examples, strict=True)]
    encoded = []
    for before, both in zip(tokenizer.encode_batch(prompts), tokenizer.encode_batch(whole), strict=True):
        seam = len(before.ids)
        if both.ids[:seam] != before.ids:
            raise ValueError("a token reaches from the prompt into the answer: end the template otherwise")
        encoded.append(Encoded(before.ids, both.ids[seam:]))
    return encoded
