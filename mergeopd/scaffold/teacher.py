"""`mergeopd new teacher`: write a card with a sample response, by which runs verify the model."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mergeopd.config.folders import Missing, existing_file, existing_model
from mergeopd.config.locate import Origins
from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError, NumericsError, RecipeError, TeacherError
from mergeopd.messages import option_problem, shown
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.preflight.models import ModelReader
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.models import Canary
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.scaffold.files import (
    by_option,
    is_text,
    name_problems,
    native_dtype,
    refuse_existing,
    render,
    write_new,
    write_schema,
)
from mergeopd.types import Sampling, TokenIds, token_ids

DEFAULT_PROMPT = "Say who you are in one sentence."
MAX_TOKENS = 64
_COLUMNS = 100
_OWN_TEMPLATE = "name one in the card (`template: FILE.jinja`)"  # the remedy of check, for a card that exists


@dataclass(frozen=True, slots=True)
class NewTeacherOptions:
    """The options of the command. `model` is a folder or a cached hub id; default domain: its name."""

    name: str
    model: str
    domains: Sequence[str]
    template: Path | None
    prompt: str

    @property
    def card_file(self) -> Path:
        return Path("teachers", f"{self.name}.yaml")


@dataclass(frozen=True)
class ProbedModel:
    """A model that has passed every check without weights."""

    plan: TeacherPlan
    renderer: Renderer
    fingerprint: str


def probe(options: NewTeacherOptions) -> ProbedModel:
    """Check the model as `mergeopd check` checks a card, without reading weights.

    Raises:
        RecipeError: every mistake, by option.
        StorageError: the card exists.
    """
    problems = name_problems("NAME", [options.name], "teacher")
    problems += name_problems("--domain", options.domains, "domain")
    if not is_text(options.prompt) or not options.prompt:
        problems.append(option_problem("--prompt", "is empty or not valid UTF-8", "write a user message"))
    if not problems:
        refuse_existing(options.card_file)
    here = Path.cwd()
    model = existing_model(options.model, None, here)
    if isinstance(model, Missing):
        problems.append(option_problem("--model", model.message, model.remedy))
    elif not is_text(options.model):
        problems.append(option_problem("--model", "the path is not valid UTF-8", "rename the folder"))
    template = None if options.template is None else existing_file(str(options.template), here, "template")
    if isinstance(template, Missing):
        problems.append(option_problem("--template", template.message, template.remedy))
    if isinstance(model, Missing) or isinstance(template, Missing) or problems:
        raise RecipeError(problems)
    return _read(options, model, template)


def _read(options: NewTeacherOptions, folder: Path, template: Path | None) -> ProbedModel:
    plan = TeacherPlan(
        name=options.name,
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
    findings = Findings(Origins(options.card_file, None, {}))
    reader = ModelReader(findings, datetime.now())
    renderer = reader.teacher(plan, None)
    if renderer is None or findings.problems:
        card = f"teachers.{options.name}.card"
        problems = by_option(findings.problems, {f"{card}.template": "--template"}, "--model")
        advice = "name one with --template FILE.jinja"
        raise RecipeError(
            [
                option_problem(p.location.file, p.message, p.remedy.replace(_OWN_TEMPLATE, advice))
                for p in problems
            ]
        )
    dtype = native_dtype(Checkpoint.open(folder))
    return ProbedModel(plan.model_copy(update={"dtype": dtype}), renderer, reader.files[str(folder)])


def take_canary(probed: ProbedModel, prompt: str) -> Canary:
    """Load the teacher, generate a greedy response, and measure the log-probabilities of its tokens.

    They are computed in the checkpoint's precision and rounded to 0.001 nats. The response is encoded from
    its text, as in a run, even if that results in other tokens than those generated.

    Raises:
        RecipeError: the prompt does not fit, or the response is empty.
        TeacherError: the output is NaN or uniform.
        ModelError: weights and configuration do not match.
    """
    # torch and transformers take seconds to import, so they come after every check that needs neither.
    from mergeopd.data.canary import sample_ids
    from mergeopd.models.causal import pick_device
    from mergeopd.rollout.local import Generator, generate
    from mergeopd.rollout.protocol import GenerationRequest
    from mergeopd.teacher.canary import logprobs, refuse_uniform
    from mergeopd.teacher.local import TeacherSource, TeacherStore
    from mergeopd.teacher.protocol import TeacherSequence

    plan, renderer, device = probed.plan, probed.renderer, pick_device()
    vocab = renderer.vocab_size
    prompt_ids = _prompt_ids(renderer, prompt)
    room = min(MAX_TOKENS, renderer.max_positions - len(prompt_ids))
    store = TeacherStore({plan.name: TeacherSource(plan.folder, plan.dtype, vocab)}, device)
    with store.open(plan.name) as teacher:
        head = store.head(plan.name)
        generator = Generator(teacher.body, head, renderer.eos_ids, renderer.tokenizer, device)
        requests = [GenerationRequest("canary", 0, prompt_ids)]
        greedy = Sampling(temperature=0.0, max_new_tokens=room)
        try:
            [response] = generate(generator, requests, greedy, seed=0, batch_size=1, progress=lambda _: None)
        except NumericsError as error:
            raise TeacherError(
                f"{shown(plan.folder)}: gives probabilities that are NaN; the weights are damaged"
            ) from error
        written = tuple(i for i in response.response_ids.tolist() if i not in renderer.eos_ids)
        text = _whole_characters(renderer.tokenizer.decode(written))
        while len(ids := sample_ids(renderer, prompt, text)[1]) > room:
            text = text[:-1]
        if not ids:
            raise _bad_prompt("the teacher responds with no token", "choose another prompt")
        sequence = TeacherSequence(prompt_ids, token_ids(ids))
        [(_, hidden)] = teacher.hidden([sequence], sequence.num_tokens)
        values = logprobs(hidden, head, ids)
    if ids == written:
        # The negative log-probability of the likeliest token is at most the entropy: no false alarm.
        refuse_uniform(plan.name, -sum(values) / len(values), vocab)
    return Canary(prompt=prompt, response=text, logprobs=tuple(round(v, 3) + 0.0 for v in values))


def _prompt_ids(renderer: Renderer, prompt: str) -> TokenIds:
    """Return the ids of a prompt that leaves space for a response. Raises RecipeError."""
    from mergeopd.data.canary import sample_ids

    try:
        ids, _ = sample_ids(renderer, prompt, "")
    except DataError as error:
        raise _bad_prompt(str(error), "change the prompt or the template") from error
    if not 0 < len(ids) < renderer.max_positions:
        raise _bad_prompt(
            f"takes {len(ids)} tokens, and the teacher's context holds {renderer.max_positions}",
            "choose one that leaves space for a response",
        )
    return token_ids(ids)


def _bad_prompt(message: str, remedy: str) -> RecipeError:
    return RecipeError([option_problem("--prompt", message, remedy)])


def _whole_characters(text: str) -> str:
    """Remove a last character truncated by the length limit, unless it is the only one."""
    return text.rstrip("\ufffd") or text


def card_text(
    options: NewTeacherOptions,
    fingerprint: str,
    canary: Canary,
    written: Callable[[Path], str] = shown,
) -> str:
    """Return a card. `written` formats paths: relative to the current folder if possible, so that the project
    can move, unless the card is for another folder.
    """
    numbers = ", ".join(map(str, canary.logprobs))
    return render(
        "card",
        options=options,
        model=written(Path(options.model)) if Path(options.model).is_dir() else options.model,
        template=None if options.template is None else written(options.template),
        domains=list(dict.fromkeys(options.domains or (options.name,))),
        fingerprint=fingerprint,
        canary=canary,
        logprobs=textwrap.indent(textwrap.fill(numbers, _COLUMNS, break_on_hyphens=False), "    "),
    )


def write_card(options: NewTeacherOptions, fingerprint: str, canary: Canary) -> None:
    """Write the card. Raises StorageError if it exists or the disk fails."""
    write_new(options.card_file, card_text(options, fingerprint, canary))
    write_schema("card")
