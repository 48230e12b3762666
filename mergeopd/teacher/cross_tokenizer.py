"""Teachers with another tokenizer: conversion and alignment of a response's tokens. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.responses import Alignment, EndTokens, Unaligned, align, written_text
from mergeopd.align.vocab import VocabularyMap, made_for
from mergeopd.data.renderer import Renderer
from mergeopd.errors import StorageError
from mergeopd.recipe.bridges import Bridge
from mergeopd.storage.folders import atomic_folder, verify
from mergeopd.types import Message, Rollout, TokenIds

# Default chunk rows of `bridge_loss`; longer groups are treated as failed alignments.
_LONGEST_GROUP = 256
_MAP_FILE = "map.safetensors"
_PROBES = ("The", "a", "1")


@dataclass(frozen=True)
class CrossTokenizer:
    """One teacher with another tokenizer than the student's, and the recipe's bridge to it.

    `inside`: after a prompt the teacher's tokenizer encodes a response as the middle of a text. Otherwise as
    the beginning of one, where some tokenizers (SentencePiece's) add a space.
    """

    teacher: str
    bridge: Bridge
    renderer: Renderer
    student: ByteTokenizer
    other: ByteTokenizer
    ends: EndTokens
    inside: bool

    @classmethod
    def of(
        cls, name: str, bridge: Bridge, student: Renderer, num_ids: int, teacher: Renderer
    ) -> CrossTokenizer:
        """Build from both renderers; of the student, only the first `num_ids` ids are used.

        Raises TokenizerError when tokens of either tokenizer cannot be converted to bytes.
        """
        backend = teacher.tokenizer.truncated_backend(teacher.vocab_size)
        other = ByteTokenizer.of(backend, f"the tokenizer of teacher '{name}'")
        return cls(
            teacher=name,
            bridge=bridge,
            renderer=teacher,
            student=ByteTokenizer.of(student.tokenizer.truncated_backend(num_ids), "the student's tokenizer"),
            other=other,
            inside=_cuts_inside(teacher, other),
            ends=EndTokens(
                (student.end_id, *(i for i in student.eos_ids if i != student.end_id)), teacher.end_id
            ),
        )

    def align(self, rollouts: Sequence[Rollout]) -> list[Alignment]:
        """Align responses with the teacher's tokens, as far as its context reaches after its own prompts."""
        encode = self.other.encode_inside if self.inside else self.other.encode
        responses = [rollout.response_ids for rollout in rollouts]
        alignments = align(responses, self.student.tokens, self.other.tokens, encode, self.ends)
        budgets = [self.renderer.max_positions - len(self.renderer.render(r.prompt)) for r in rollouts]
        by_identity = self.bridge.kind in ("pieces", "gold", "projection")
        return [_usable(one, budget, by_identity) for one, budget in zip(alignments, budgets, strict=True)]

    def in_student_ids(self, generated: TokenIds, *, ended: bool) -> tuple[tuple[int, ...], bool]:
        """Encode the teacher's generated ids in the student's; also return whether they are complete.

        `ended`: the last token is the teacher's end token, which the student's replaces. Text that looks like
        a special token stays text. A response that ends within a character, or is not UTF-8, is cut there and
        gets no end token.
        """
        text, whole = written_text(generated[:-1] if ended else generated, self.other.tokens)
        [ids] = self.student.encode([text])
        return (*ids, *self.ends.student[: int(ended and whole)]), whole


def _usable(alignment: Alignment, budget: int, by_identity: bool) -> Alignment:
    """Leave out and count groups that are too long for a bridge or beyond the teacher's context.

    The teacher often needs more tokens than the student, whose number the recipe limits. Where only one side
    begins with a space, a bridge that compares tokens by identity would train the student to add or drop that
    space, so the first group is left out.
    """
    sizes = alignment.student_stops - alignment.student_starts
    short = np.maximum(sizes, alignment.teacher_stops - alignment.teacher_starts) <= _LONGEST_GROUP
    read = alignment.teacher_stops <= budget
    same = np.ones(len(sizes), bool)
    starts_together = alignment.teacher_starts[:1].tolist() == [0]
    same[:1] = not (by_identity and alignment.space_on_one_side and starts_together)
    keep = short & read & same
    if keep.all():
        return alignment
    left_out = {
        Unaligned.TOO_LONG: int(sizes[~short & read].sum()),
        Unaligned.NO_ROOM: int(sizes[~read].sum()),
        Unaligned.LEADING_SPACE: int(sizes[~same & short & read].sum()),
    }
    stops = alignment.teacher_stops[keep]
    return replace(
        alignment,
        teacher_ids=alignment.teacher_ids[: int(stops[-1]) if len(stops) else 0],
        student_starts=alignment.student_starts[keep],
        student_stops=alignment.student_stops[keep],
        teacher_starts=alignment.teacher_starts[keep],
        teacher_stops=stops,
        unaligned={**alignment.unaligned, **{reason: n for reason, n in left_out.items() if n}},
    )


def _cuts_inside(teacher: Renderer, tokenizer: ByteTokenizer) -> bool:
    """Whether a response after the teacher's prompt is encoded like the middle of a text.

    Tested with the teacher's own template. Also True where the prompt's last token would merge with the
    response's first: the teacher then reads the prompt as it is rendered for generation.
    """
    if not tokenizer.tokens.prefix:
        return False
    prompt = teacher.template.render((Message("user", "?"),), add_generation_prompt=True)
    before = teacher.tokenizer.encode(prompt)
    for probe in _PROBES:
        if teacher.tokenizer.encode(prompt + probe) == [*before, *tokenizer.encode([probe])[0]]:
            return False
    return True


def vocabulary_map(
    cache: Path, student: ByteTokenizer, teacher: ByteTokenizer, ends: EndTokens, k: int = 4
) -> VocabularyMap:
    """Load the map of a pair from `cache`, or build it (seconds for 150,000 tokens) and save it there.

    Its folder is named by the fingerprints of both tokenizers, the end tokens and `k`, so that a changed
    tokenizer gets a new map.

    Raises StorageError when the saved map is damaged or the disk fails, TokenizerError when it was made for
    another pair.
    """
    pair = made_for(student.tokens, teacher.tokens, ends, k)
    folder = cache / hashlib.sha256(pair.encode()).hexdigest()[:20]
    if not folder.exists():
        made = VocabularyMap.build(student, teacher, ends, k)
        try:
            with atomic_folder(folder) as temporary:
                made.save(temporary / _MAP_FILE)
        except StorageError:
            # Another run may have made the same map meanwhile. Any other failure is raised.
            if not folder.exists():
                raise
        return made
    fault = verify(folder)
    if fault is not None:
        raise StorageError(
            f"{folder}: the vocabulary map is damaged: {fault}; delete the folder, and it is built again"
        )
    return VocabularyMap.load(folder / _MAP_FILE, pair, student.tokens, teacher.tokens)
