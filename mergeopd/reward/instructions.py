"""The verifier of instructions that a program can check: IFEval, arXiv 2311.07911, strict.

Every check takes the response and the arguments that IFEval's data have for the instruction.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from inspect import signature
from types import MappingProxyType
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import InstructionVerifier
from mergeopd.reward.protocol import Verify, reference_values

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|\n+")
_ABBREVIATIONS = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No|Inc|Jr|Sr)\.$")


def build_instructions(spec: InstructionVerifier, allow_code: Collection[str]) -> Verify:
    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        values = reference_values(spec.kind, reference)
        problem = _problem(values)
        if problem is not None:
            raise VerifierError(f"verifier {spec.kind!r}: {problem}; correct the prompt file")
        return float(bool(response.strip()) and all(check(response) for check in _checks(values)))

    return verify


def instructions_problem(spec: InstructionVerifier, reference: str) -> str | None:
    """Return which instruction of a reference cannot be checked."""
    return _problem(reference_values(spec.kind, reference))


def _problem(values: Mapping[str, Any]) -> str | None:
    names, arguments = values["instructions"], values["arguments"]
    if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
        return "instructions and arguments must be lists of the same length"
    if not names:
        return "there are no instructions"
    for name, given in zip(names, arguments, strict=True):
        if name not in CHECKS:
            return f"the instruction {name!r} is unknown or cannot be checked"
        if not isinstance(given, dict | None):
            return f"the arguments of {name} are not an object"
        needed = list(signature(CHECKS[name]).parameters)[1:]
        present = {key: value for key, value in (given or {}).items() if value is not None}
        if lacking := [argument for argument in needed if argument not in present]:
            return f"the instruction {name} lacks the argument {lacking[0]!r}"
        for argument in needed:
            if not _fits(argument, present[argument]):
                return f"{argument}: {json.dumps(present[argument])} does not fit the instruction {name}"
    return None


def _fits(argument: str, value: Any) -> bool:
    if argument.endswith("relation"):
        return value in ("less than", "at least")
    if argument in ("keywords", "forbidden_words"):
        return isinstance(value, list) and all(isinstance(word, str) and word for word in value)
    if argument.startswith(("num_", "nth_")) or argument.endswith("frequency"):
        return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value) >= 0
    return isinstance(value, str) and bool(value.strip())


def _checks(values: Mapping[str, Any]) -> list[Callable[[str], bool]]:
    def bound(name: str, given: Mapping[str, Any] | None) -> Callable[[str], bool]:
        check = CHECKS[name]
        own = {key: value for key, value in (given or {}).items() if key in signature(check).parameters}
        return lambda response: check(response, **own)

    return [bound(*pair) for pair in zip(values["instructions"], values["arguments"], strict=True)]


def _compared(count: int, relation: str, bound: float) -> bool:
    return count < bound if relation == "less than" else count >= bound


# --------------------------------------------------------------------------------- words and characters


def _keywords(text: str, keywords: list[str]) -> bool:
    return all(word.casefold() in text.casefold() for word in keywords)


def _keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(text.casefold().count(keyword.strip().casefold()), relation, frequency)


def _forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(Counter(text.lower())[letter.strip().lower()], let_relation, let_frequency)


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    num_capital = sum(word.isupper() for word in re.findall(r"[\w'\u2019-]+", text))
    return _compared(num_capital, capital_relation, capital_frequency)


def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compared(len(_WORD.findall(text)), relation, num_words)


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compared(_count_sentences(text), relation, num_sentences)


def _count_sentences(text: str) -> int:
    count, start = 0, 0
    for match in _SENTENCE_END.finditer(text):
        last_word = text[max(start, match.start() - 8) : match.start() + 1]
        ends = "\n" in match[0] or not _ABBREVIATIONS.search(last_word)
        if ends:
            count += bool(_WORD.search(text, start, match.start()))
            start = match.end()
    return count + bool(_WORD.search(text, start))


# ------------------------------------------------------------------------------------------------ format


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if parts and not parts[0]:
        del parts[0]
    if parts and not parts[-1]:
        del parts[-1]
    return all(parts) and len(parts) == num_paragraphs


def _first_word_of_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in re.split(r"\n\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    word = _WORD.search(parts[nth_paragraph - 1])
    return word is not None and word[0].casefold() == first_word.strip().casefold()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = [re.escape(letter) for letter in re.sub(r"[.\s]", "", postscript_marker)]
    return re.search(r"\b" + r"\.?[ ]?".join(letters), text, re.IGNORECASE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-)[^\n]+$", text, re.MULTILINE)) == num_bullets


def _constrained(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


def _highlights(text: str, num_highlights: int) -> bool:
    marked = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool((double or single).strip()) for double, single in marked) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\b{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n<>]+>>", text))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())


def _is_quoted(text: str) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


CHECKS: Mapping[str, Callable[..., bool]] = MappingProxyType(
    {
        "change_case:capital_word_frequency": _capital_words,
        "change_case:english_capital": lambda text: text.isupper(),
        "change_case:english_lowercase": lambda text: text.islower(),
        "combination:repeat_prompt": _repeats_prompt,
        "combination:two_responses": _two_responses,
        "detectable_content:number_placeholders": _placeholders,
        "detectable_content:postscript": _postscript,
        "detectable_format:constrained_response": _constrained,
        "detectable_format:json_format": _json,
        "detectable_format:multiple_sections": _sections,
        "detectable_format:number_bullet_lists": _bullets,
        "detectable_format:number_highlighted_sections": _highlights,
        "detectable_format:title": _title,
        "keywords:existence": _keywords,
        "keywords:forbidden_words": _forbidden_words,
        "keywords:frequency": _keyword_frequency,
        "keywords:letter_frequency": _letter_frequency,
        "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
        "length_constraints:number_paragraphs": _number_paragraphs,
        "length_constraints:number_sentences": _number_sentences,
        "length_constraints:number_words": _number_words,
        "punctuation:no_comma": lambda text: "," not in text,
        "startend:end_checker": _ends_with,
        "startend:quotation": _is_quoted,
    }
)
"""IFEval's instructions, without `language:response_language`, which needs a language detector."""
