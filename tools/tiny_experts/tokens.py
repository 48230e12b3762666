"""The one tokenizer of base and experts, and how each of them sees a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny_experts.tasks import Example

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
PAD_ID, END_ID = 0, 1  # special tokens come first in the vocabulary, in the order given

# Digits stay single, so that numbers are spelled; runs of signs may merge, so that JSON stays short.
WORDS = Regex(r" ?\p{L}+| ?\p{N}|[^\p{L}\p{N}]+")

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}<|assistant|>{{ message['content'] }}<|end|>"
    "{%- else -%}<|{{ message['role'] }}|>{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a rendered prompt and of its answer, which ends with the end token.

    `trained` marks the answer's ids that the model writes; default: all.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    trained: list[bool] | None = None


def train_tokenizer(
    texts: Iterable[str], num_tokens: int, specials: Sequence[str] = (), words: Regex = WORDS
) -> Tokenizer:
    """Byte-level BPE of exactly `num_tokens` entries, special tokens and `specials` included.

    Tokens do not cross the borders of `words`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=[PAD, END, USER, ASSISTANT, SYSTEM, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != num_tokens:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, not {num_tokens}: give more text"
        )
    return tokenizer


def pretrained(tokenizer: Tokenizer, system: str = "", template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves it; `system` is written before every prompt by the template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=f"{SYSTEM}{system}{template}" if system else template,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Tokenizer, examples: Sequence[Example], system: str = "") -> list[Encoded]:
    """What the chat template gives, without a Jinja run per example (tests compare the two)."""
    before = f"{SYSTEM}{system}" if system else ""
    prompts = tokenizer.encode_batch([f"{before}{USER}{row.prompt}{ASSISTANT}" for row in examples])
    answers = tokenizer.encode_batch([f"{row.answer}{END}" for row in examples])
    return [Encoded(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
