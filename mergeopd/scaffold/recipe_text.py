"""The text of a new recipe: every value chosen is written down, with what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergeopd.recipe.bridges import KINDS
from mergeopd.scaffold.files import quoted
from mergeopd.scaffold.prompts import PromptFile


@dataclass(frozen=True, slots=True)
class Expert:
    """A teacher. `listed`: its card names its domains, so that the recipe need not.

    `tokenizer` is the folder of its tokenizer; `crossed`: that is another one than the student's.
    """

    name: str
    card: str
    folder: Path
    dtype: str
    domains: tuple[str, ...]
    listed: bool
    tokenizer: Path
    crossed: bool = False


@dataclass(frozen=True, slots=True)
class RecipeDraft:
    """What goes into a recipe. Paths as they are to be written; `schema`: the project has one for editors."""

    name: str
    student: str
    student_dtype: str
    experts: Sequence[Expert]
    trained: Sequence[PromptFile]
    measured: Sequence[PromptFile]
    max_new_tokens: int
    left_out: Sequence[str]
    schema: bool


def recipe_text(draft: RecipeDraft) -> str:
    """The whole file."""
    several = len({file.domain for file in draft.trained}) > 1
    editor = (
        "# yaml-language-server: $schema=../docs/schema/recipe.schema.json"
        if draft.schema
        else "# Editors complete and check this file by `mergeopd schema`, saved where you tell them."
    )
    left_out = "".join(f"  # left out: {quoted(note)}\n" for note in draft.left_out)
    verifiers = any(file.verifier for file in draft.trained)
    return f"""\
{editor}
# Paths start at the folder above recipes/. Every key: docs/recipe.md of mergeopd.
#   mergeopd check recipes/{draft.name}.yaml             finds mistakes, loads nothing
#   mergeopd run recipes/{draft.name}.yaml --updates 2   a smoke run; without --updates it goes on
recipe: 1
name: {quoted(draft.name)}
seed: 0
# threads: 8                # CPU threads are part of the plan; fix them where the machine may change

# What is trained. Weights, gradient and optimizer are float32 whatever `dtype` the passes have.
student:
  model: {quoted(draft.student)}
  dtype: {draft.student_dtype}
  micro_batch_tokens: 16384   # most tokens in one forward and backward; lower it when memory is short

# The experts, by the names this recipe uses. `dtype` is that of their files, so nothing is copied.
teachers:
{_teachers(draft.experts)}
# What is trained on. A prompt is taught by every teacher whose card lists its domain, unless `teachers` says.
# `share: 2` draws a file's prompts twice as often.{_verifier_remark(verifiers)}
prompts:
{"".join(f"  - {_source(file, _explicit(file, draft.experts))}" for file in draft.trained)}{left_out}
# How the student answers.
rollout:
  samples_per_prompt: 1
  temperature: 1.0
  max_new_tokens: {draft.max_new_tokens}

phases:
  # A student that seldom gets an answer right imitates its teachers' answers first:
  # - {{name: cold_start, text: teacher, updates: 50, loss: forward_kl}}
  # The student writes, and at every token its teacher says what it would have done.
  - name: merge
    text: student
    updates: 200
    prompts_per_round: 64
    loss: reverse_kl        # or forward_kl, jsd, or weights: {{reverse_kl: 1.0, forward_kl: 0.2}}
{_balance(several)}
optimizer:
  lr: 1.0e-6                # for models of a billion parameters and more; tiny ones want 1.0e-4 and up
  warmup_updates: 10
  schedule: cosine          # over all phases together, to zero

{_evaluation(draft.measured, draft.experts)}
checkpoint:
  every: 50                 # updates; an interrupted run goes on from the newest one
  keep: 3

# report: {{tensorboard: true}}   # events for TensorBoard; needs pip install 'mergeopd[tensorboard]'

output: {quoted(f"runs/{draft.name}")}
"""


def _teachers(experts: Sequence[Expert]) -> str:
    return "".join(
        f"  {quoted(expert.name)}: {{card: {quoted(expert.card)}, dtype: {expert.dtype}"
        f"{f', bridge: {KINDS[0]}' if expert.crossed else ''}}}\n"
        for expert in experts
    )


def _verifier_remark(verifiers: bool) -> str:
    return (
        "\n# A verifier shows how often the student is right; it is no part of the loss." if verifiers else ""
    )


def _explicit(file: PromptFile, experts: Sequence[Expert]) -> list[str]:
    """Names of the file's teachers where their cards do not all say that they teach its domain."""
    teachers = [expert for expert in experts if file.domain in expert.domains]
    return [] if all(expert.listed for expert in teachers) else [expert.name for expert in teachers]


def _rival(file: PromptFile, experts: Sequence[Expert]) -> str:
    """The teacher to compare with, where the domain has several and the recipe has to say which."""
    teachers = [expert.name for expert in experts if file.domain in expert.domains]
    return teachers[0] if len(teachers) > 1 else ""


def _source(file: PromptFile, teachers: Sequence[str], expert: str = "") -> str:
    parts = [f"source: {quoted(file.path)}", f"domain: {quoted(file.domain)}"]
    if teachers:
        parts.append(f"teachers: [{', '.join(map(quoted, teachers))}]")
    if file.verifier:
        parts.append(f"verifier: {file.verifier}")
    if expert:
        parts.append(f"expert: {quoted(expert)}")
    if file.prompt_field != "prompt":
        parts.append(f"prompt_field: {file.prompt_field}")
    if file.verifier and file.reference_field != "answer":
        parts.append(f"reference_field: {file.reference_field}")
    return f"{{{', '.join(parts)}}}\n"


def _balance(several: bool) -> str:
    if not several:
        return ""
    return "    balance: {tokens: equal}  # each domain counts alike, however long its answers are\n"


def _evaluation(measured: Sequence[PromptFile], experts: Sequence[Expert]) -> str:
    """Accuracy before and after, or how to have it."""
    if not measured:
        return """\
# Held-out prompts with references show what was won: base, experts, their weight average and the student.
# evaluation:
#   prompts:
#     - {source: data/eval.jsonl, domain: DOMAIN, verifier: exact}   # or number, json, regex
"""
    entries = "".join(f"    - {_source(file, (), _rival(file, experts))}" for file in measured)
    return f"""\
# What was won: base, experts, their weight average and the student on held-out prompts, at the end.
evaluation:
  prompts:
{entries}"""
