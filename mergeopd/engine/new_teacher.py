"""`mergeopd new teacher`: a card, with what the teacher is recognised by."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mergeopd.engine.dialect import Dialect
from mergeopd.engine.findings import Findings
from mergeopd.engine.new_file import (
    by_option,
    is_text,
    name_problems,
    native_dtype,
    option_problem,
    quoted,
    refuse_existing,
    write_new,
)
from mergeopd.engine.reading import ModelReader
from mergeopd.errors import DataError, NumericsError, RecipeError, TeacherError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.recipe.folders import Missing, existing_file, existing_model
from mergeopd.recipe.locate import Origins, shown
from mergeopd.recipe.models import Canary
from mergeopd.recipe.plan import TeacherPlan

DEFAULT_PROMPT = "Say who you are in one sentence."
MAX_TOKENS = 64
_COLUMNS = 100
_OWN_TEMPLATE = "name one in the card (`template: FILE.jinja`)"  # what check says of a card that exists


@dataclass(frozen=True, slots=True)
class TeacherWish:
    """What was asked for. `model` is a folder or a hub id in the local cache; no domains: one of its name."""

    name: str
    model: str
    domains: Sequence[str]
    template: Path | None
    prompt: str

    @property
    def card_file(self) -> Path:
        """Where the card goes, below the current folder."""
        return Path("teachers", f"{self.name}.yaml")


@dataclass(frozen=True)
class Candidate:
    """A model that can teach, as far as can be seen without reading its weights."""

    plan: TeacherPlan
    dialect: Dialect
    fingerprint: str


def examine(wish: TeacherWish) -> Candidate:
    """Check all that `mergeopd check` would of a card, before a weight is read.

    Raises:
        RecipeError: every mistake, by option.
        StorageError: the card exists.
    """
    problems = name_problems("NAME", [wish.name], "teacher")
    problems += name_problems("--domain", wish.domains, "domain")
    if not is_text(wish.prompt) or not wish.prompt:
        problems.append(option_problem("--prompt", "is empty or no text", "write a message of a user"))
    if not problems:
        refuse_existing(wish.card_file)
    here = Path.cwd()
    model = existing_model(wish.model, None, here)
    if isinstance(model, Missing):
        problems.append(option_problem("--model", model.message, model.remedy))
    elif not is_text(wish.model):
        problems.append(option_problem("--model", "the path is no text in UTF-8", "rename the folder"))
    template = None if wish.template is None else existing_file(str(wish.template), here, "template")
    if isinstance(template, Missing):
        problems.append(option_problem("--template", template.message, template.remedy))
    if isinstance(model, Missing) or isinstance(template, Missing) or problems:
        raise RecipeError(problems)
    return _read(wish, model, template)


def _read(wish: TeacherWish, folder: Path, template: Path | None) -> Candidate:
    """Configuration, headers, tokenizer and template, and whether the canary's prompt can be written."""
    plan = TeacherPlan(
        name=wish.name,
        student=None,
        model=str(folder),
        tokenizer=str(folder),
        template=None if template is None else str(template),
        dtype="float32",
        system=None,
        prompt=None,
        fingerprint=None,
        canary=None,
        bridge=None,
    )
    findings = Findings(Origins(wish.card_file, None, {}))
    reader = ModelReader(findings, datetime.now())
    dialect = reader.teacher(plan, None)
    if dialect is None or findings.problems:
        card = f"teachers.{wish.name}.card"
        found = by_option(findings.problems, {f"{card}.template": "--template"}, "--model")
        advice = "name one with --template FILE.jinja"
        raise RecipeError(
            [
                option_problem(p.location.file, p.message, p.remedy.replace(_OWN_TEMPLATE, advice))
                for p in found
            ]
        )
    dtype = native_dtype(Checkpoint.open(folder))
    return Candidate(plan.model_copy(update={"dtype": dtype}), dialect, reader.files[plan.model])


def take_canary(candidate: Candidate, prompt: str) -> Canary:
    """Load the teacher, have it answer greedily, and measure the log-probabilities of its answer.

    They are taken in the precision of the file, rounded to 0.001 nats. An answer that its tokenizer would
    cut otherwise than it was written is measured as the tokenizer cuts it, since a run sees the text alone.

    Raises:
        RecipeError: the prompt does not fit, or the answer is empty.
        TeacherError: the output is NaN or uniform.
        ModelError: weights and configuration are not of one model.
    """
    # torch and transformers take seconds to import: after all that can go wrong without them.
    from mergeopd.engine.build import pick_device
    from mergeopd.engine.canary import logprobs, refuse_uniform, sample_ids
    from mergeopd.rollout.local import Request, Writer, generate
    from mergeopd.teacher.store import TeacherSource, TeacherStore
    from mergeopd.types import Sampling

    plan, dialect, device = candidate.plan, candidate.dialect, pick_device()
    vocab = dialect.vocab_size
    try:
        prompt_ids, _ = sample_ids(dialect, prompt, "")
    except DataError as error:
        raise _bad_prompt(str(error), "change the prompt or the template") from error
    room = min(MAX_TOKENS, dialect.max_positions - len(prompt_ids))
    if not prompt_ids or room < 1:
        raise _bad_prompt(
            f"takes {len(prompt_ids)} tokens, and the teacher's context holds {dialect.max_positions}",
            "choose one that leaves room for an answer",
        )
    store = TeacherStore({plan.name: TeacherSource(Path(plan.model), plan.dtype, vocab)}, device)
    with store.open(plan.name) as teacher:
        head = store.heads([plan.name])[plan.name]
        writer = Writer(teacher.body, head, dialect.eos_ids, dialect.tokenizer, device)
        sampling = Sampling(temperature=0.0, max_new_tokens=room)
        try:
            [answer] = generate(
                writer,
                [Request("canary", 0, prompt_ids)],
                sampling,
                seed=0,
                batch_size=1,
                progress=lambda _: None,
            )
        except NumericsError as error:
            raise TeacherError(
                f"{shown(Path(plan.model))}: gives probabilities that are NaN; the weights are damaged"
            ) from error
        written = tuple(i for i in answer.response_ids if i not in dialect.eos_ids)
        text = _whole_characters(dialect.tokenizer.decode(written))
        while len(ids := sample_ids(dialect, prompt, text)[1]) > room:
            text = text[:-1]
        if not ids:
            raise _bad_prompt("the teacher answers it with nothing at all", "choose another prompt")
        [(_, hidden)] = teacher.hidden([prompt_ids], [ids], len(prompt_ids) + len(ids))
        values = logprobs(hidden, head, ids)
    if ids == written:
        # The likeliest token is at least as likely as the entropy says: this never blames a sane teacher.
        refuse_uniform(plan.name, -sum(values) / len(values), vocab)
    return Canary(prompt=prompt, response=text, logprobs=tuple(round(v, 3) + 0.0 for v in values))


def _bad_prompt(message: str, remedy: str) -> RecipeError:
    return RecipeError([option_problem("--prompt", message, remedy)])


def _whole_characters(text: str) -> str:
    """Without a character that the length limit cut in two, unless there is nothing else."""
    return text.rstrip("\ufffd") or text


def card_text(wish: TeacherWish, fingerprint: str, canary: Canary) -> str:
    """The card, commented."""
    domains = ", ".join(map(quoted, dict.fromkeys(wish.domains or (wish.name,))))
    template = (
        "# template: FILE.jinja   # a chat template of its own; default: the tokenizer's"
        if wish.template is None
        else f"template: {quoted(shown(wish.template))}   # its chat template"
    )
    numbers = textwrap.fill(
        ", ".join(str(value) for value in canary.logprobs),
        _COLUMNS,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
    return f"""\
# What teacher {wish.name} is, whatever recipe uses it. Paths start at the folder above teachers/.
card: 1
name: {quoted(wish.name)}   # for people
model: {quoted(_as_written(wish.model))}   # Hugging Face folder, or a hub id that is in the local cache
{template}
domains: [{domains}]   # taught by it unless a recipe says otherwise
# licence: Apache-2.0   # of the weights, for people

# Other weights in its place are refused before a run begins.
fingerprint: {quoted(fingerprint)}

# Its own answer, and the log-probability (nats) of each token of it. A model that sees it otherwise does not
# teach. When you change the model or its template, have a new card written.
canary:
  prompt: {quoted(canary.prompt)}
  response: {quoted(canary.response)}
  logprobs: [
{numbers}
  ]
"""


def _as_written(model: str) -> str:
    """A folder below the current one by its relative path, so that the project can move."""
    return shown(Path(model)) if Path(model).is_dir() else model


def write_card(wish: TeacherWish, fingerprint: str, canary: Canary) -> None:
    """Write the card. Raises StorageError when it exists or the disk refuses."""
    write_new(wish.card_file, card_text(wish, fingerprint, canary))
