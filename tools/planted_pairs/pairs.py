"""The two sets of pairs: A for choosing rules and thresholds, B for the report alone.

The verdicts that count as right were fixed before either set was measured. B has other tasks, seeds, sizes,
templates and depths than A, and other ways to make the same defect.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_experts.tokens import END_ID, SYSTEM, TEMPLATE
from transformers import Qwen3ForCausalLM

from mergeopd.reporting.inspection import Verdict
from planted_pairs.experts import (
    TEXT_END,
    Change,
    Experts,
    load,
    new_head,
    permute_rows,
    random_tails,
    swapped_tails,
    thoughtful,
    towards,
)

HEADINGS = (
    "{%- for message in messages -%}### {{ message['role'] }}\n{{ message['content'] }}\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}### response\n{%- endif -%}"
)
INSTRUCTIONS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] }}<|end|>"
    "{%- else -%}[INST] {{ message['content'] }} [/INST]{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Pair:
    """A student and a teacher for the prompts of a domain, and the verdicts that are right.

    `depth` is the token from which a noisy teacher is noisy; verdicts may miss it by two.
    """

    experts: Experts
    domain: str
    student: Path
    teacher: Path
    right: tuple[str, ...]
    verifier: Any
    depth: int | None = None
    student_arguments: Mapping[str, Any] = field(default_factory=dict)
    teacher_arguments: Mapping[str, Any] = field(default_factory=dict)

    def accepts(self, verdict: Verdict) -> bool:
        """Whether a verdict is right."""
        at = self.depth is None or (verdict.beyond is not None and abs(verdict.beyond - self.depth) <= 2)
        return verdict.kind in self.right and at

    def recipe(self) -> dict[str, Any]:
        """Return a recipe for a merge with this teacher alone."""
        student = {"model": str(self.student), "template_arguments": dict(self.student_arguments)}
        return {
            "recipe": 1,
            "name": "pair",
            "seed": self.experts.seed,
            "threads": 1,
            "student": student,
            "teachers": {"teacher": {"card": "teacher.yaml"}},
            "prompts": [
                {
                    "source": str(self.experts.prompts(self.domain)),
                    "domain": self.domain,
                    "verifier": self.verifier,
                    "teachers": "teacher",
                }
            ],
            "rollout": {"max_new_tokens": 64},
            "phases": [{"name": "merge", "loss": "reverse_kl", "updates": 60, "prompts_per_round": 64}],
            "optimizer": {"lr": 3e-3, "betas": [0.9, 0.98], "warmup_updates": 10, "schedule": "linear"},
            "output": "run",
        }

    def write(self, folder: Path) -> Path:
        """Write the recipe and the teacher's card into `folder`; return the recipe's path."""
        folder.mkdir(parents=True, exist_ok=True)
        card = {"card": 1, "name": "teacher", "model": str(self.teacher)}
        if self.teacher_arguments:
            card["template_arguments"] = dict(self.teacher_arguments)
        (folder / "teacher.yaml").write_text(json.dumps(card, indent=1))
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(self.recipe(), indent=1))
        return path


class Maker:
    """Makes pairs from a set of experts; changed models are folders in `folder`."""

    def __init__(self, experts: Experts, folder: Path) -> None:
        self.experts, self.folder = experts, folder

    def of(self, model: str) -> Path:
        return (self.experts.folder / model).resolve()

    def pair(
        self, domain: str, right: str, *, student: Path | None = None, teacher: Path, **more: Any
    ) -> Pair:
        answer = self.experts.rows(domain)[0].answer
        more = {"verifier": "json" if answer.startswith("{") else "exact", **more}
        student = student or self.of("base")
        return Pair(self.experts, domain, student, teacher, tuple(right.split(" or ")), **more)

    def model(
        self,
        name: str,
        source: Path,
        change: Change | None = None,
        *,
        trained: Callable[[], Qwen3ForCausalLM] | None = None,
        template: str | None = None,
        tokens: tuple[str, ...] = (),
        end: str | None = None,
    ) -> Path:
        """Return a changed copy of a model folder; one that exists is not made again.

        Args:
            change: changes the weights.
            trained: returns other weights.
            template: another chat template.
            tokens: special tokens to add to the vocabulary, in rows that the embedding has to spare.
            end: the token that ends responses by the folder's configuration.
        """
        target = (self.folder / name).resolve()
        if target.is_dir():
            return target
        model = load(source) if trained is None else trained()
        partial_copy = target.with_name(f"{name}.partial")
        shutil.rmtree(partial_copy, ignore_errors=True)
        shutil.copytree(source, partial_copy)
        with torch.no_grad():
            if change is not None:
                change(model)
        if tokens:
            tokenizer = self.experts.with_tokens(tokens)
            tokenizer.save(str(partial_copy / "tokenizer.json"))
            if end is not None:
                model.generation_config.eos_token_id = tokenizer.token_to_id(end)
                edit(partial_copy / "tokenizer_config.json", eos_token=end)
        model.save_pretrained(partial_copy)
        if template is not None:
            (partial_copy / "chat_template.jinja").write_text(template)
        partial_copy.rename(target)
        return target

    # Defects that both sets plant.

    def wrong_template(self, domain: str, template: str) -> Pair:
        """The teacher's folder has a chat template with which it was not trained."""
        return self.pair(
            domain,
            "template_mismatch",
            teacher=self.model(f"wrong_template_{domain}", self.of(domain), template=template),
        )

    def thinking(self, domain: str, tags: tuple[str, str], *, student_thinks: bool) -> Pair:
        """Both models can think before they respond or not; one template lets them, the other does not.

        A response without thinking begins after both tags if they are a pair of brackets around the thought,
        after the second if it names the response.
        """
        rows, (begin, end) = self.experts.rows(domain), tags
        off = self.experts.encode(rows, tokens=tags, opening=begin + end)
        on = self.experts.encode(thoughtful(rows, begin, end), tokens=tags)
        template = TEMPLATE.replace(
            "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}",
            "{%- if add_generation_prompt -%}<|assistant|>"
            f"{{%- if not enable_thinking -%}}{begin}{end}{{%- endif -%}}{{%- endif -%}}",
        )
        own = on if student_thinks else off
        train = self.experts.train
        student = self.model(
            f"student_thinks_{student_thinks}",
            self.of("base"),
            trained=lambda: train(self.of("base"), own, updates=300, enough=0.3, cooldown=10),
            template=template,
            tokens=tags,
        )
        teacher = self.model(
            "thinks_or_not",
            self.of(domain),
            trained=lambda: train(self.of(domain), [*on, *off], updates=500, enough=0.9, cooldown=80),
            template=template,
            tokens=tags,
        )
        return self.pair(
            domain,
            "template_mismatch",
            student=student,
            teacher=teacher,
            student_arguments={"enable_thinking": student_thinks},
            teacher_arguments={"enable_thinking": not student_thinks},
            verifier={"kind": "regex", "pattern": f"(?s)^(.*{re.escape(end)})?(?P<answer>.*)$"},
        )

    def shifted_specials(self, domain: str, ids: tuple[int, ...]) -> Pair:
        """Special tokens have the embeddings of others: the weights belong to a tokenizer with other ids."""
        teacher = self.model(f"shifted_specials_{domain}", self.of(domain), permute_rows(ids))
        return self.pair(domain, "template_mismatch or wrong_teacher", teacher=teacher)

    def new_head(self, domain: str, std: float) -> Pair:
        """The teacher's head has random weights."""
        teacher = self.model(f"new_head_{domain}", self.of(domain), new_head(std, self.experts.seed))
        return self.pair(domain, "wrong_teacher", teacher=teacher)

    def noisy(self, domain: str, depth: int, tails: Callable[..., Any], updates: int) -> Pair:
        """The teacher was trained on responses that are noise from `depth` on."""
        rows = tails(self.experts.encode(self.experts.rows(domain)), depth, self.experts.seed)
        teacher = self.model(
            f"noisy_{domain}",
            self.of(domain),
            trained=lambda: self.experts.train(self.of(domain), rows, updates=updates),
        )
        return self.pair(domain, "noisy", teacher=teacher, depth=depth)

    def other_end(self, domain: str, *, of_student: bool, in_template: bool) -> Pair:
        """One of both ends responses with the end token of base models, by its weights and configuration."""
        source = self.of("base" if of_student else domain)
        text_end = self.experts.with_tokens((TEXT_END,)).token_to_id(TEXT_END)
        assert text_end is not None
        template = TEMPLATE.replace("<|end|>", TEXT_END) if in_template else None
        changed = self.model(
            f"other_end_{domain}_{of_student}_{in_template}",
            source,
            permute_rows((END_ID, text_end)),
            template=template,
            tokens=(TEXT_END,),
            end=TEXT_END,
        )
        other = self.model(
            f"usual_end_{domain}_{of_student}", self.of(domain if of_student else "base"), tokens=(TEXT_END,)
        )
        student, teacher = (changed, other) if of_student else (other, changed)
        return self.pair(domain, "template_mismatch", student=student, teacher=teacher)

    def between(self, name: str, domain: str, share: float) -> Path:
        """Return a model on the way from the base to an expert, as an early checkpoint is."""
        return self.model(name, self.of("base"), towards(self.of(domain), share))


def edit(file: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2))


Makers = Mapping[str, Callable[[], Pair]]


def set_a(experts: Callable[[str, int], Experts], folder: Path) -> Makers:
    """Pairs of the quick start's experts: four domains, one seed."""
    make = Maker(experts("quickstart", 0), folder)
    pair, of = make.pair, make.of
    return {
        "wrong chat template": lambda: make.wrong_template("sort", HEADINGS),
        "thinking on, student off": lambda: make.thinking(
            "sort", ("<think>", "</think>"), student_thinks=False
        ),
        "shifted special ids": lambda: make.shifted_specials("tool", (0, 1, 2, 3, 4)),
        "re-initialised head": lambda: make.new_head("cells", 0.02),
        "the student itself": lambda: pair("sort", "nothing_new", teacher=of("base")),
        "a weaker teacher": lambda: pair(
            "sort",
            "nothing_new",
            student=make.between("later", "sort", 0.3),
            teacher=make.between("earlier", "sort", 0.1),
        ),
        # The expert has a system prompt of its own in its template, which is right for it.
        "another domain's prompts": lambda: pair("sort", "wrong_teacher", teacher=of("total")),
        "noisy after depth 20": lambda: make.noisy("cells", 20, random_tails, 80),
        "base EOS, instruct EOS": lambda: make.other_end("sort", of_student=True, in_template=True),
        # The embedding of this expert has more rows than the student's.
        "a good one": lambda: pair("tool", "ready", teacher=of("tool")),
        "a student from elsewhere": lambda: pair(
            "cells", "cold_start", student=of("sort"), teacher=of("cells")
        ),
        # More of the same for choosing thresholds.
        "no generation prompt": lambda: make.wrong_template("cells", TEMPLATE.partition("{%- if add_gen")[0]),
        "thinking off, student on": lambda: make.thinking(
            "sort", ("<think>", "</think>"), student_thinks=True
        ),
        "shifted roles": lambda: make.shifted_specials("total", (2, 3, 4)),
        "a head of large weights": lambda: make.new_head("sort", 0.3),
        "a head of medium weights": lambda: make.new_head("tool", 0.05),
        "a smaller weak teacher": lambda: pair("tool", "nothing_new", teacher=of("small_base")),
        "sort on prompts of cells": lambda: pair("cells", "wrong_teacher", teacher=of("sort")),
        "noisy after depth 10": lambda: make.noisy("tool", 10, swapped_tails, 80),
        "instruct EOS, base EOS": lambda: make.other_end("tool", of_student=False, in_template=True),
        "instruct EOS, base EOS of the weights": lambda: make.other_end(
            "sort", of_student=False, in_template=False
        ),
        "base EOS of the weights, instruct EOS": lambda: make.other_end(
            "total", of_student=True, in_template=False
        ),
        "a good one for sort": lambda: pair("sort", "ready", teacher=of("sort")),
        "a good one for total": lambda: pair("total", "ready", teacher=of("total")),
        "a good one for cells": lambda: pair("cells", "ready", teacher=of("cells")),
        "a good one for a smaller student": lambda: pair(
            "sort", "ready", student=of("small_base"), teacher=of("sort")
        ),
        "a student from cells": lambda: pair("tool", "cold_start", student=of("cells"), teacher=of("tool")),
        "a student from total": lambda: pair("sort", "cold_start", student=of("total"), teacher=of("sort")),
    }


def set_b(experts: Callable[[str, int], Experts], folder: Path) -> Makers:
    """Pairs of experts of three other sets, with other tasks, seeds, sizes, tokenizers and templates."""
    held_out, states, chains = (
        Maker(experts(name, seed), folder / name)
        for name, seed in (("held_out", 1), ("states", 2), ("chains", 1))
    )
    return {
        "wrong chat template": lambda: held_out.wrong_template("order", INSTRUCTIONS),
        "thinking off, student on": lambda: held_out.thinking(
            "dedupe", ("<|reason|>", "<|respond|>"), student_thinks=True
        ),
        "shifted special ids": lambda: chains.shifted_specials("add", (2, 3)),
        "re-initialised head": lambda: states.new_head("interleave", 0.1),
        "the student itself": lambda: states.pair("insert", "nothing_new", teacher=states.of("base")),
        "a weaker teacher": lambda: held_out.pair("dedupe", "nothing_new", teacher=held_out.of("small_base")),
        "another domain's prompts": lambda: held_out.pair(
            "stack", "wrong_teacher", teacher=held_out.of("swap")
        ),
        "noisy after depth 8": lambda: states.noisy("insert", 8, swapped_tails, 120),
        "base EOS, instruct EOS": lambda: chains.other_end("form", of_student=False, in_template=False),
        "a good one": lambda: smaller_student(states),
        "a student from elsewhere": lambda: chains.pair(
            "shift", "cold_start", student=chains.of("form"), teacher=chains.of("shift")
        ),
    }


def smaller_student(make: Maker) -> Pair:
    """A teacher with a system prompt of its own, with which it was trained, for a smaller student."""
    domain, system = "walk", "reverse every step"
    rows = make.experts.encode(make.experts.rows(domain), system=system)
    teacher = make.model(
        "with_system",
        make.of(domain),
        trained=lambda: make.experts.train(make.of(domain), rows, updates=100),
        template=f"{SYSTEM}{system}{TEMPLATE}",
    )
    return make.pair(domain, "ready", student=make.of("small_base"), teacher=teacher)


SETS = {"A": set_a, "B": set_b}
