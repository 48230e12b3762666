"""`mergeopd tokenizers A B`: compare two tokenizers, and how their tokens of a text align."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.responses import EndTokens, align
from mergeopd.align.token_bytes import SPECIAL
from mergeopd.config.folders import Missing, existing_file, existing_model
from mergeopd.data.chat_template import ChatTemplate
from mergeopd.errors import DataError, Problem, RecipeError, TokenizerError
from mergeopd.messages import option_problem, shown
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.reporting.terminal.tokenizers import Coverage, TokenizerFacts, TokenizerPair
from mergeopd.types import Message

# Every line is a separate sample, so that text that cannot be aligned affects one line, not the rest.
_BATCH = 256
SAMPLE = """\
The cat sat on the mat; it didn't move. "Why?", she asked — nobody knew (not even in 2011).
Compute 12,345 + 678 = 13,023, and 3.14159 * 2.5e-10. The answer is \\boxed{42}.
def merge(xs: list[int]) -> dict[str, float]:
    \"\"\"Sum of squares.\"\"\"
    return {"total": sum(x ** 2 for x in xs if x != 0)}  # O(n)
<table><tr><td>1</td></tr></table>\t{"name": "search", "arguments": {"query": "weather"}}
Der Fluß führt übermäßig viel Wasser. L'été dernier, j'ai mangé à Besançon. ¿Qué pasó mañana?
Съешь же ещё этих мягких французских булок. 今天天气很好,我们去公园。日本語の文章です。한국어 문장입니다.
สวัสดีครับ नमस्ते दुनिया مرحبا بالعالم שלום עולם 🙂 👩‍👩‍👧 🇩🇪 naïve café ∑ x ≤ y → ∞
"""


@dataclass(frozen=True)
class _Side:
    name: str
    tokenizer: Tokenizer
    reader: ByteTokenizer
    vocab: Mapping[str, int]


def compare_tokenizers(first: str, second: str, text: Path | None) -> TokenizerPair:
    """Compare two tokenizer folders (or hub ids in the local cache) on a UTF-8 text or a built-in sample.

    Raises RecipeError with every mistake, by argument: no such folder, no tokenizer, tokens that cannot be
    mapped back to bytes, a text that cannot be read.
    """
    problems: list[Problem] = []
    sides = [_side(argument, written, problems) for argument, written in (("A", first), ("B", second))]
    content = SAMPLE if text is None else _content(text, problems)
    a, b = sides
    if problems or a is None or b is None:
        raise RecipeError(problems)
    if a.name == b.name:
        a, b = replace(a, name=f"{a.name} (A)"), replace(b, name=f"{b.name} (B)")
    return TokenizerPair(
        _facts(a),
        _facts(b),
        a.tokenizer.difference(b.tokenizer),
        len(a.reader.tokens.ids.keys() & b.reader.tokens.ids.keys()),
        len(_spellings(a) & _spellings(b)),
        "a built-in sample of languages, numbers and code" if text is None else shown(text),
        (_coverage(a, b, content), _coverage(b, a, content)),
    )


def _side(argument: str, written: str, problems: list[Problem]) -> _Side | None:
    folder = existing_model(written, None, Path.cwd(), "tokenizer")
    if isinstance(folder, Missing):
        problems.append(option_problem(argument, folder.message, folder.remedy))
        return None
    try:
        tokenizer = Tokenizer.load(folder)
        reader = ByteTokenizer.of(tokenizer.backend, shown(folder))
    except TokenizerError as error:
        problems.append(option_problem(argument, str(error)))
        return None
    return _Side(written, tokenizer, reader, tokenizer.backend.get_vocab(with_added_tokens=True))


def _content(text: Path, problems: list[Problem]) -> str:
    file = existing_file(str(text), Path.cwd(), "text file")
    if isinstance(file, Missing):
        problems.append(option_problem("--text", file.message, file.remedy))
        return ""
    content, fault, remedy = "", "", ""
    try:
        content = file.read_text(encoding="utf-8")
        if not content:
            fault, remedy = "is empty", "name a file with text"
    except UnicodeDecodeError as error:
        fault, remedy = f"not UTF-8 (byte {error.start + 1})", "save the file as UTF-8"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    if fault:
        problems.append(option_problem("--text", f"{shown(file)}: {fault}", remedy))
    return content


def _spellings(side: _Side) -> set[str]:
    """Return the tokens with text, in the vocabulary's spelling."""
    kind = side.reader.tokens.kind
    return {written for written, i in side.vocab.items() if kind[i] < SPECIAL}


def _facts(side: _Side) -> TokenizerFacts:
    tokenizer, tokens = side.tokenizer, side.reader.tokens
    named = {name: (text, side.vocab[text]) for name, text in tokenizer.special_tokens.items()}
    opening, takes_system = _openings(tokenizer)
    return TokenizerFacts(
        name=side.name,
        num_ids=len(tokens),
        num_special=int(np.count_nonzero(tokens.kind == SPECIAL)),
        normal=tokens.normal,
        prefix=tokens.prefix,
        named=named,
        opening=opening,
        takes_system=takes_system,
        fingerprint=tokens.fingerprint,
    )


def _openings(tokenizer: Tokenizer) -> tuple[str | None, bool]:
    """Render a prompt with the template; also whether a system message before it is rendered."""
    if tokenizer.chat_template is None:
        return None, False
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, name=str(tokenizer.folder))
    prompt = Message("user", "Hi")
    mark = "Answer briefly."
    try:
        is_rendered = mark in template.render([Message("system", mark), prompt])
    except DataError:
        is_rendered = False
    return template.render([prompt]), is_rendered


def _coverage(writer: _Side, reader: _Side, content: str) -> Coverage:
    """Align a text in one tokenizer's tokens with the same text in the other's."""
    own, other = writer.reader, reader.reader
    num_writer = num_reader = num_groups = one_to_one = 0
    unaligned: Counter[str] = Counter()
    lines = content.splitlines(keepends=True)
    for start in range(0, len(lines), _BATCH):
        responses = own.encode(lines[start : start + _BATCH])
        num_writer += sum(map(len, responses))
        for aligned in align(responses, own.tokens, other.tokens, other.encode, EndTokens((), 0)):
            num_groups += len(aligned.student_starts)
            num_reader += aligned.num_teacher
            one_to_one += aligned.num_one_to_one
            unaligned.update({reason.value: count for reason, count in aligned.unaligned.items()})
    return Coverage(
        writer=writer.name,
        reader=reader.name,
        num_bytes=len(content.encode()),
        num_writer=num_writer,
        num_reader=num_reader,
        num_groups=num_groups,
        num_one_to_one=one_to_one,
        unaligned=unaligned,
    )
