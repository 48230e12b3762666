"""Teachers with another tokenizer: what they read of an answer, and which of its tokens that is. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mergeopd.align.answers import Alignment, EndTokens, Unaligned, align, written_text
from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.vocab import MadeFor, VocabularyMap
from mergeopd.data.renderer import Renderer
from mergeopd.errors import StorageError
from mergeopd.recipe.bridges import Bridge, ProjectionBridge
from mergeopd.storage.folders import atomic_folder, verify
from mergeopd.types import Message, Rollout, TokenIds

# Rows that `bridge_loss` compares at once; a group of more is no alignment worth learning from.
_LONGEST_GROUP = 256
_MAP_FILE = "map.safetensors"
_PROBES = ("The", "a", "1")


@dataclass(frozen=True)
class CrossTokenizer:
    """One teacher with another tokenizer than the student's, and the recipe's bridge to it.

    `inside`: behind a prompt the teacher's tokenizer cuts an answer as in the middle of a text, and not as
    one that begins there, to which some tokenizers (SentencePiece's) put a space.
    """

    teacher: str
    bridge: Bridge
    dialect: Renderer
    student: ByteTokenizer
    other: ByteTokenizer
    ends: EndTokens
    inside: bool

    @classmethod
    def of(
        cls, name: str, bridge: Bridge, student: Renderer, num_ids: int, teacher: Renderer
    ) -> CrossTokenizer:
        """Of the student the first `num_ids` ids are used.

        Raises TokenizerError where the tokens of one of them cannot be turned back into bytes.
        """
        backend = teacher.tokenizer.first(teacher.vocab_size)
        other = ByteTokenizer.of(backend, f"the tokenizer of teacher '{name}'")
        return cls(
            teacher=name,
            bridge=bridge,
            dialect=teacher,
            student=ByteTokenizer.of(student.tokenizer.first(num_ids), "the student's tokenizer"),
            other=other,
            inside=_cuts_inside(teacher, other),
            ends=EndTokens(
                (student.end_id, *(i for i in student.eos_ids if i != student.end_id)), teacher.end_id
            ),
        )

    def align(self, rollouts: Sequence[Rollout]) -> list[Alignment]:
        """The answers as the teacher reads them, as far as its context reaches behind its prompts."""
        encode = self.other.encode_inside if self.inside else self.other.encode
        answers = [rollout.response_ids for rollout in rollouts]
        found = align(answers, self.student.tokens, self.other.tokens, encode, self.ends)
        rooms = [self.dialect.max_positions - len(self.dialect.render(r.prompt)) for r in rollouts]
        by_identity = self.bridge.kind in ("pieces", "gold", "projection")
        return [_usable(one, room, by_identity) for one, room in zip(found, rooms, strict=True)]

    def in_student_ids(self, written: TokenIds, *, ended: bool) -> tuple[tuple[int, ...], bool]:
        """What the teacher wrote in the student's ids, and whether that is all of it.

        `ended`: the last token is the teacher's end; the student's takes its place. What looks like a special
        token is text here too. An answer that breaks off within a character, or is no UTF-8, is taken up to
        there and does not end.
        """
        text, whole = written_text(written[:-1] if ended else written, self.other.tokens)
        [ids] = self.student.encode([text])
        return (*ids, *self.ends.student[: int(ended and whole)]), whole

    def vocabulary_map(self, cache: Path) -> VocabularyMap:
        """The two vocabularies onto each other, kept in `cache`. Raises what `vocabulary_map` does."""
        pieces = ProjectionBridge() if self.bridge.projection is None else self.bridge.projection
        return vocabulary_map(cache, self.student, self.other, self.ends, pieces.pieces)


def _usable(found: Alignment, room: int, by_identity: bool) -> Alignment:
    """Groups that a bridge could not take in one piece, or the teacher not read, are left out and counted.

    The teacher's tokens are often more than the student's, whose number the recipe limits. Where one side
    begins with a space that the other has not, a bridge that goes by identity would teach to begin answers
    with a space, or without the student's own, so it leaves the first group out.
    """
    sizes = found.student_stops - found.student_starts
    short = np.maximum(sizes, found.teacher_stops - found.teacher_starts) <= _LONGEST_GROUP
    read = found.teacher_stops <= room
    same = np.ones(len(sizes), bool)
    same[:1] = not (by_identity and found.space_on_one_side and found.teacher_starts[:1].tolist() == [0])
    keep = short & read & same
    if keep.all():
        return found
    left_out = {
        Unaligned.TOO_LONG: int(sizes[~short & read].sum()),
        Unaligned.NO_ROOM: int(sizes[~read].sum()),
        Unaligned.LEADING_SPACE: int(sizes[~same & short & read].sum()),
    }
    stops = found.teacher_stops[keep]
    return replace(
        found,
        teacher_ids=found.teacher_ids[: int(stops[-1]) if len(stops) else 0],
        student_starts=found.student_starts[keep],
        student_stops=found.student_stops[keep],
        teacher_starts=found.teacher_starts[keep],
        teacher_stops=stops,
        unaligned={**found.unaligned, **{reason: n for reason, n in left_out.items() if n}},
    )


def _cuts_inside(teacher: Renderer, tokenizer: ByteTokenizer) -> bool:
    """Whether an answer behind the teacher's prompt gets the ids of a text that goes on.

    Tried with the template's own words. Where the prompt's last token and an answer would grow together, the
    answer counts as going on: what the teacher then sees is the prompt as it is rendered for it to answer.
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
    """The map of a pair from `cache`, or made (seconds for 150,000 tokens) and kept there.

    Its folder is named by the fingerprints of both tokenizers, the end tokens and `k`, so that a changed
    tokenizer has a map of its own.

    Raises:
        StorageError: what is kept is damaged, or the disk refuses.
        TokenizerError: what is kept was made for another pair.
    """
    made_for = MadeFor.of(student.tokens, teacher.tokens, ends, k)
    folder = cache / made_for.digest
    if not folder.exists():
        made = VocabularyMap.build(student, teacher, ends, k)
        try:
            with atomic_folder(folder) as temporary:
                made.save(temporary / _MAP_FILE)
        except StorageError:
            # Another run may have made the same map meanwhile. Any other failure is one.
            if not folder.exists():
                raise
        return made
    fault = verify(folder)
    if fault is not None:
        raise StorageError(
            f"{folder}: the vocabulary map is damaged: {fault}; delete it, and it is made again"
        )
    return VocabularyMap.load(folder / _MAP_FILE, made_for, student.tokens, teacher.tokens)
