"""Create renderers from model folders: read configs, weight headers, tokenizers and templates."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mergeopd.config.suggest import did_you_mean
from mergeopd.config.tree import Keys
from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer, turn_end
from mergeopd.data.teacher_prompt import PromptTemplate, TeacherPrompt
from mergeopd.errors import DataError, ModelError, TokenizerError
from mergeopd.messages import shown
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts, Weights, head_tensor
from mergeopd.models.layout import check_layout
from mergeopd.models.reward_facts import score_tensor
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.parallelism import check_backend
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.bridges import KINDS
from mergeopd.recipe.models import SET_BY_RENDERING, Student
from mergeopd.recipe.plan import RewardModelPlan, TeacherPlan
from mergeopd.recipe.rollout import LocalRollout, RolloutSettings
from mergeopd.types import Message

FindHead = Callable[[ModelFacts, Checkpoint], str]
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class ModelReader:
    """Creates the renderer of each model of a recipe; problems are added to `findings`.

    `num_shared`: number of leading ids that a teacher without a bridge shares with the student. `files` maps
    model folders to digests of their weights, and small files to digests of their bytes. `now` is the time in
    templates.
    """

    def __init__(self, findings: Findings, now: datetime) -> None:
        self._findings = findings
        self._now = now
        self._tokenizers: dict[tuple[str | None, ...], Tokenizer] = {}
        self.files: dict[str, str] = {}
        self.num_shared: dict[str, int] = {}

    def check_replay(self, student: Student, rollout: RolloutSettings | None) -> None:
        """Report routes that cannot be replayed, because the student has none."""
        if not isinstance(rollout, LocalRollout) or not rollout.replay_routes:
            return
        try:
            facts = ModelFacts.read(Path(student.model))
        except ModelError:
            return  # reported with the model
        if facts.experts is None:
            message = f"the student, {facts.model_type}, is not a mixture of experts"
            self._findings.report(("rollout", "replay_routes"), message, "remove the key")

    def student(self, student: Student) -> Renderer | None:
        """Create the student's renderer; None if there is a problem."""
        place: Keys = ("student", "model")
        folder = Path(student.model)
        facts, tokenizer = self._model(place, folder), self._tokenizer(place, folder)
        if facts is not None:
            check_backend(self._findings, student, facts)
        if facts is None or tokenizer is None or not self._fits(place, folder, tokenizer, facts):
            return None
        place, template = self._template(
            place, folder, tokenizer, ("student", "template"), student.template, student.template_arguments
        )
        if student.end_tokens is None:
            renderer = self._renderer(facts, tokenizer, place, template)
            if renderer is not None and renderer.end_id not in _configured(facts, tokenizer):
                self._findings.notes.append(
                    f"the student's chat template ends turns with {renderer.end_token!r}, which its "
                    "generation_config.json does not name: its responses end there too, and the export names "
                    "it"
                )
            return renderer
        ends = self._ends(student.end_tokens, tokenizer)
        return None if ends is None else self._renderer(facts, tokenizer, place, template, ends)

    def _ends(self, tokens: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...] | None:
        """Ids of a recipe's end tokens; None if one does not exist."""
        ids = []
        for index, token in enumerate(tokens):
            encoded = tokenizer.encode(token)
            if len(encoded) != 1:
                self._findings.report(
                    ("student", "end_tokens", index),
                    f"{token!r} is not one token of {shown(tokenizer.folder)}, but {len(encoded)}",
                    "name a token of its tokenizer.json",
                )
                return None
            ids += encoded
        return tuple(dict.fromkeys(ids))

    def teacher(self, teacher: TeacherPlan, student: Renderer | None) -> Renderer | None:
        """Create a teacher's renderer; without a bridge, its tokenizer must be the student's.

        A self-teacher, and one behind an API, has the student's renderer with its own teacher prompt.
        """
        is_other = teacher.student is None and teacher.api is None
        renderer = self._other_model(teacher, student) if is_other else student
        prompt = self._teacher_prompt(teacher)
        if renderer is None or prompt is None:
            return None
        if student is not None and teacher.name in self.num_shared:
            self._check_shared(teacher, student, renderer)
        if student is not None and teacher.bridge is None and student.end_id not in renderer.closing_ids:
            self._findings.notes.append(
                f"teacher '{teacher.name}' ends turns with {renderer.end_token!r}, the student with "
                f"{student.end_token!r}: the token that ends a response is left out of this teacher's terms; "
                "`student.template` can give the student the teacher's chat template"
            )
        if teacher.api is not None:
            renderer = replace(renderer, max_positions=sys.maxsize)  # the API knows its context
        elif prompt.system is not None:
            self._check_system_message(("teachers", teacher.name, "system"), renderer.template, prompt.system)
        return replace(renderer, teacher_prompt=prompt)

    def _teacher_prompt(self, teacher: TeacherPlan) -> TeacherPrompt | None:
        """Create the teacher's prompt; None if it is not a valid template."""
        if teacher.prompt is None:
            return TeacherPrompt(teacher.system)
        path: Keys = ("teachers", teacher.name, "prompt")
        source, name = teacher.prompt, ".".join(map(str, path))
        template = self._findings.attempt(
            path, lambda: PromptTemplate(source, name=name, now=lambda: self._now), "correct the template"
        )
        return None if template is None else TeacherPrompt(teacher.system, template)

    def _check_system_message(self, place: Keys, template: ChatTemplate, system: str) -> None:
        """Report a chat template that leaves system messages out (templates that reject them raise)."""
        prompt = Message("user", "?")
        try:
            ignores_system = template.render((prompt,)) == template.render(
                (Message("system", system), prompt)
            )
        except DataError:
            return
        if ignores_system:
            message = "the chat template leaves system messages out, so this one would have no effect"
            self._findings.report(place, message, "write it into the teacher's `prompt`")

    def _check_quantized(self, teacher: TeacherPlan, facts: ModelFacts) -> None:
        """Report `quantize` of weights that are quantised already; note activations that are not."""
        if facts.quantization is None:
            return
        if teacher.quantize is not None:
            self._findings.report(
                ("teachers", teacher.name, "quantize"),
                f"the weights in {shown(teacher.folder)} are quantised already ({facts.quantization.method})",
                "remove the key, or name a folder with float weights",
            )
        elif facts.quantization.quantizes_activations:
            self._findings.notes.append(
                f"teacher '{teacher.name}' is a folder that quantises activations, too: here its quantised "
                "weights are used with activations as they are"
            )

    def _other_model(self, teacher: TeacherPlan, student: Renderer | None) -> Renderer | None:
        def compare(place: Keys, own: Tokenizer) -> None:
            if student is not None:
                self._compare(teacher, student.tokenizer, own, place)

        return self._of_card(("teachers", teacher.name, "card"), teacher, head_tensor, compare)

    def reward_model(self, card: Keys, model: RewardModelPlan) -> Renderer | None:
        """Create the renderer of a reward model, which reads text, so that its tokenizer is its own."""
        return self._of_card(card, model, score_tensor, lambda place, tokenizer: None)

    def _of_card(
        self,
        card: Keys,
        model: TeacherPlan | RewardModelPlan,
        find_head: FindHead,
        compare: Callable[[Keys, Tokenizer], None],
    ) -> Renderer | None:
        """Create the renderer of a card's model; `compare` checks its tokenizer."""
        assert model.model is not None
        assert model.tokenizer is not None
        model_place = (*card, "model")
        # Without a tokenizer in the card, problems of the model's tokenizer are located at the model.
        own = model.tokenizer == model.model
        tokenizer_place = model_place if own else (*card, "tokenizer")
        folder = Path(model.tokenizer)
        served = model.served if isinstance(model, TeacherPlan) else None
        if served is None:
            weights: Weights = "readable" if isinstance(model, TeacherPlan) else "float"
            facts = self._model(model_place, Path(model.model), find_head, weights)
        else:  # the weights of the servers are checked by the card's sample
            facts = self._served_model(model_place, Path(model.model), hidden_states=served.hidden_states)
        if facts is None or served is not None:
            pass
        elif model.fingerprint not in (None, self.files[model.model]):
            self._findings.report(
                (*card, "fingerprint"),
                f"the weights in {model.model} are not those of the card",
                "fetch the weights of the card, or create a new card with mergeopd new teacher"
                if isinstance(model, TeacherPlan)
                else f"fetch the weights of the card, or write their digest: {self.files[model.model]}",
            )
        if facts is not None and isinstance(model, TeacherPlan):
            self._check_quantized(model, facts)
        tokenizer = self._tokenizer(tokenizer_place, folder)
        if tokenizer is None:
            return None
        fits = facts is None or self._fits(tokenizer_place, folder, tokenizer, facts)
        compare(tokenizer_place, tokenizer)
        place, template = self._template(
            tokenizer_place, folder, tokenizer, (*card, "template"), model.template, model.template_arguments
        )
        return self._renderer(facts, tokenizer, place, template) if facts is not None and fits else None

    def _compare(self, teacher: TeacherPlan, student: Tokenizer, own: Tokenizer, place: Keys) -> None:
        """Report a tokenizer that differs without a bridge; note a bridge that is not needed."""
        if teacher.bridge is not None:
            if student.difference(own) is None:
                self._findings.notes.append(
                    f"teacher '{teacher.name}' has the student's tokenizer: "
                    "without a bridge, its loss is exact"
                )
            return
        shared = student.num_shared(own)
        if shared is None:
            self._report_difference(teacher, place, f"the student's: {student.difference(own)}")
        else:
            self.num_shared[teacher.name] = shared

    def _report_difference(self, teacher: TeacherPlan, place: Keys, what: str) -> None:
        self._findings.report(
            place,
            f"the tokenizer differs from {what}",
            f"choose a teacher of the student's family, or give this one a bridge: "
            f"`bridge: {KINDS[0]}` at teachers.{teacher.name} (or {', '.join(KINDS[1:])})",
        )

    def _check_shared(self, teacher: TeacherPlan, student: Renderer, own: Renderer) -> None:
        """Report an end token that only one of two tokenizers has; note other tokens that only one has."""
        num = min(self.num_shared[teacher.name], student.vocab_size, own.vocab_size)
        self.num_shared[teacher.name] = num
        ends = [d.end_token for d in (student, own) if d.end_id >= num]
        if ends:
            place = ("teachers", teacher.name, "card")
            what = f"the student's in added tokens, and one of them ends responses: {ends[0]!r}"
            self._report_difference(teacher, place, what)
            return
        theirs, mine = (d.tokenizer.added_from(num) if d.vocab_size > num else () for d in (own, student))
        if theirs:
            self._findings.notes.append(
                f"teacher '{teacher.name}' has {_tokens(theirs)} that the student does not have: its "
                f"distributions are those over the {num} ids that both have, without these"
            )
        if mine:
            self._findings.notes.append(
                f"the student has {_tokens(mine)} that teacher '{teacher.name}' does not have: rollouts and "
                f"losses are over the {num} ids that both have, without these; evaluation has all"
            )

    def _model(
        self,
        place: Keys,
        folder: Path,
        find_head: FindHead = head_tensor,
        weights: Weights = "float",
    ) -> ModelFacts | None:
        """Read the facts of a model; None if its weights are not complete. `find_head` checks its head."""
        facts = self._findings.attempt(place, lambda: ModelFacts.read(folder, weights))
        if facts is None and not (folder / "config.json").exists():
            return None
        checkpoint = self._findings.attempt(place, lambda: Checkpoint.open(folder))
        if facts is None or checkpoint is None:
            return None
        head = self._findings.attempt(place, lambda: find_head(facts, checkpoint))
        if head is None:
            return None
        if str(folder) not in self.files:
            self._findings.attempt(place, lambda: check_layout(facts, checkpoint, head))
            fingerprint = self._findings.attempt(place, lambda: checkpoint.fingerprint)
            if fingerprint is None:
                return None
            self.files[str(folder)] = fingerprint
            self._remember(folder, CONFIG_FILES)
        return facts

    def _served_model(self, place: Keys, folder: Path, *, hidden_states: bool) -> ModelFacts | None:
        """Read the facts of a model that servers have; with `hidden_states`, its head must be here."""
        facts = self._findings.attempt(place, lambda: ModelFacts.read(folder, "any"))
        if facts is not None and hidden_states:
            checkpoint = self._findings.attempt(place, lambda: Checkpoint.open(folder))
            if (
                checkpoint is None
                or self._findings.attempt(place, lambda: head_tensor(facts, checkpoint)) is None
            ):
                return None
            self.files[str(folder)] = checkpoint.fingerprint
        self._remember(folder, CONFIG_FILES)
        return facts

    def check_weights(self, teacher: TeacherPlan) -> None:
        """Report a served teacher whose weights are not here, although the evaluation loads them."""
        place, folder = ("teachers", teacher.name, "card", "model"), teacher.folder

        def check() -> None:
            facts, checkpoint = ModelFacts.read(folder, "readable"), Checkpoint.open(folder)
            check_layout(facts, checkpoint, head_tensor(facts, checkpoint))

        self._findings.attempt(
            place,
            check,
            "the evaluation measures this teacher and needs its weights here: name a folder with them, or "
            "leave the teacher out of the evaluation",
        )

    def _remember(self, folder: Path, names: Sequence[str]) -> None:
        for file in (folder / name for name in names):
            if file.is_file():
                self.files[str(file)] = file_digest(file)

    def _tokenizer(self, place: Keys, folder: Path) -> Tokenizer | None:
        return self._findings.attempt(place, lambda: self._load_tokenizer(folder))

    def _load_tokenizer(self, folder: Path) -> Tokenizer:
        """Load a tokenizer. Equal files are loaded once, because large vocabularies take a second."""
        self._remember(folder, TOKENIZER_FILES)
        digests = tuple(self.files.get(str(folder / name)) for name in TOKENIZER_FILES)
        if digests not in self._tokenizers:
            self._tokenizers[digests] = Tokenizer.load(folder)
        return self._tokenizers[digests]

    def _fits(self, place: Keys, folder: Path, tokenizer: Tokenizer, facts: ModelFacts) -> bool:
        """Whether the head has a row for every id, except for added tokens, which texts must not contain."""
        if tokenizer.added_from(facts.vocab_rows) is not None:
            return True
        self._findings.report(
            place,
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, but the model only "
            f"{facts.vocab_rows} (vocab_size in {facts.folder / 'config.json'})",
            "use the tokenizer that belongs to the model",
        )
        return False

    def _template(
        self,
        place: Keys,
        folder: Path,
        tokenizer: Tokenizer,
        file_place: Keys,
        file: str | None,
        arguments: Mapping[str, Any],
    ) -> tuple[Keys, ChatTemplate | None]:
        """Return the place of a chat template and the template: that of `file`, or the tokenizer's."""

        def compiled(place: Keys, text: str, name: str) -> ChatTemplate | None:
            template = self._findings.attempt(
                place,
                lambda: ChatTemplate(
                    text, tokenizer.special_tokens, name=name, now=lambda: self._now, arguments=arguments
                ),
                "correct the template",
            )
            if template is not None:
                self._check_arguments((*file_place[:-1], "template_arguments"), template)
            return template

        if file is not None:
            text = self._findings.attempt(file_place, lambda: self._text(Path(file)))
            return file_place, None if text is None else compiled(file_place, text, shown(Path(file)))
        own = folder / "chat_template.jinja"
        if tokenizer.chat_template is not None:
            config = f"{shown(folder / 'tokenizer_config.json')}, chat_template"
            name = shown(own) if own.is_file() else config
            return place, compiled(place, tokenizer.chat_template, name)
        where, key = ("card", "template") if "card" in place else ("recipe", "student.template")
        remedy = f"add {shown(own)}, or name one in the {where} (`{key}: FILE.jinja`)"
        self._findings.report(place, f"{folder}: has no chat template to render prompts", remedy)
        return place, None

    def _check_arguments(self, place: Keys, template: ChatTemplate) -> None:
        """Report arguments that the template does not use."""
        for name in template.arguments:
            if name not in template.variables:
                known = sorted(template.variables - template.special_tokens.keys() - set(SET_BY_RENDERING))
                listed = f"its variables are {', '.join(known)}" if known else "it has no variables"
                self._findings.report(
                    (*place, name),
                    f"the chat template does not use '{name}' ({template.name})",
                    did_you_mean(name, known, f"remove it; {listed}"),
                )

    def _text(self, file: Path) -> str:
        try:
            self.files[str(file)] = file_digest(file)
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error

    def _renderer(
        self,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        place: Keys,
        template: ChatTemplate | None,
        ends: tuple[int, ...] | None = None,
    ) -> Renderer | None:
        """Create a renderer. Responses end at `ends`, by default at the end tokens of config and template."""
        if template is None:
            return None
        eos_ids = ends or _configured(facts, tokenizer)
        vocab_size = min(tokenizer.vocab_size, facts.vocab_rows)
        unknown = [i for i in eos_ids if i >= vocab_size]
        if unknown:
            self._findings.report(
                place,
                f"{facts.folder}: eos_token_id {unknown[0]} does not exist, the model has {vocab_size} ids",
                "correct it in generation_config.json, or in config.json where there is none",
            )
            return None
        written = turn_end(tokenizer, template, eos_ids) if ends is None else None
        added = () if written is None or written in eos_ids or written >= vocab_size else (written,)
        return Renderer(tokenizer, template, vocab_size, (*eos_ids, *added), facts.max_positions)


def _configured(facts: ModelFacts, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the end tokens of a model's configuration, as transformers' `generate` does, else EOS."""
    return facts.eos_ids or (tokenizer.eos_id,)


def _tokens(texts: Sequence[str]) -> str:
    """Format tokens: `2 tokens ('<think>', '</think>')`; at most three are listed."""
    more = f", and {len(texts) - 3} more" if len(texts) > 3 else ""
    named = ", ".join(map(repr, texts[:3]))
    return f"{len(texts)} {'token' if len(texts) == 1 else 'tokens'} ({named}{more})"


def check_student_folder(folder: Path, student: Renderer) -> None:
    """Check that a folder has a model with the vocabulary of the recipe's student.

    Raises ModelError or TokenizerError. A folder without a tokenizer is not compared.
    """
    facts, checkpoint = ModelFacts.read(folder), Checkpoint.open(folder)
    head_tensor(facts, checkpoint)
    num_ids = student.vocab_size
    if facts.vocab_rows < num_ids:
        raise ModelError(
            f"{folder}: the model has {facts.vocab_rows} ids, the student's tokenizer {num_ids}; "
            "choose a model that the recipe's student became"
        )
    if (folder / "tokenizer.json").is_file():
        difference = student.tokenizer.difference(Tokenizer.load(folder))
        if difference is not None:
            raise TokenizerError(
                f"{folder}: the tokenizer differs from the student's: {difference}; "
                "choose a model that the recipe's student became"
            )


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
