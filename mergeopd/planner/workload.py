"""The work of a round, from a resolved recipe: responses, lengths, and who scores and generates them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from mergeopd.data.documents import MAX_TOKENS
from mergeopd.recipe.loss_terms import DIVERGENCE_TERMS
from mergeopd.recipe.plan import Plan, SourcePlan
from mergeopd.recipe.routing import author
from mergeopd.recipe.training import Phase, off_policy_origin, on_policy_fraction
from mergeopd.teacher.protocol import capabilities, required_of


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a text: their mean and their maximum."""

    mean: float
    longest: int


@dataclass(frozen=True, slots=True)
class TextLengths:
    """Lengths of the prompts and responses of a source."""

    prompt: Lengths
    response: Lengths

    @property
    def mean(self) -> float:
        return self.prompt.mean + self.response.mean

    @property
    def longest(self) -> int:
        return self.prompt.longest + self.response.longest


@dataclass(frozen=True, slots=True)
class Group:
    """Responses of a round that have one source and one origin.

    `responses` is their number, a mean where the origin is drawn. `teachers` score them, `writer` is the
    teacher that generates them.
    """

    source: str
    origin: str
    responses: float
    lengths: TextLengths
    teachers: tuple[str, ...]
    writer: str | None = None
    text_responses: float = 0.0
    """Responses that the writer generates before the phase: one text for every prompt and sample."""

    @property
    def tokens(self) -> float:
        return self.responses * self.lengths.mean

    @property
    def trained(self) -> float:
        """Response tokens in the loss."""
        return self.responses * self.lengths.response.mean


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """A phase: its groups of a round, and what its loss needs.

    `kept_numbers` is what a teacher's targets keep for a token, None for hidden states; by teacher.
    `num_divergences` and `has_support` are those of the loss; `text_responses` the responses that each
    teacher generates before the phase begins.
    """

    name: str
    updates: int
    updates_per_round: int
    groups: tuple[Group, ...]
    kept_numbers: Mapping[str, int | None]
    num_divergences: int
    has_support: bool
    needs_prior_policy: bool
    batch_size: int
    samples: int
    text_responses: Mapping[str, float]

    @property
    def rounds(self) -> int:
        return self.updates // self.updates_per_round

    @property
    def tokens(self) -> float:
        return sum(group.tokens for group in self.groups)

    @property
    def trained(self) -> float:
        return sum(group.trained for group in self.groups)

    @property
    def generated(self) -> tuple[Group, ...]:
        """The groups that the student generates."""
        return tuple(group for group in self.groups if group.origin == "student" and group.responses)

    def of_teacher(self, name: str) -> tuple[Group, ...]:
        """Return the groups that a teacher scores."""
        return tuple(group for group in self.groups if name in group.teachers and group.responses)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers that score, by name."""
        return tuple(sorted({name for group in self.groups for name in group.teachers if group.responses}))

    @property
    def teacher_sets(self) -> tuple[tuple[str, ...], ...]:
        return tuple(sorted({group.teachers for group in self.groups if group.responses}))


def phase_work(
    plan: Plan, phase: Phase, lengths: Mapping[str, TextLengths], num_prompts: Mapping[str, int]
) -> PhaseWork:
    """Return the work of a phase; `lengths` are those of each source with the phase's settings.

    `num_prompts` are those of files, where they are known: a teacher generates a prompt's text once.
    """
    shares, routed = plan.shares(phase), plan.teachers_of(phase)
    settings = plan.rollout_of(phase)
    fraction = fmean(on_policy_fraction(phase, done) for done in range(phase.updates))
    groups: list[Group] = []
    text_responses: dict[str, float] = {}
    for source in plan.sources_of(phase):
        prompts = phase.prompts_per_round * shares[source.name] / sum(shares.values())
        scorers = routed.scoring([source.name]) if phase.loss.needs_teacher else frozenset()
        teachers = tuple(sorted(name for name in scorers if plan.teachers[name].api is None))
        own = lengths[source.name]
        if source.text_field is not None:
            groups.append(Group(source.name, "dataset", prompts, own, teachers))
            continue
        student = prompts * fraction * settings.samples_per_prompt
        if student:
            groups.append(Group(source.name, "student", student, own, teachers))
        other = off_policy_origin(phase)
        if other is None or fraction == 1.0:
            continue
        weights = routed.routed.get(source.name, {})
        writer = author(weights) if other == "teacher" and weights else None
        samples = settings.samples_per_prompt if other == "teacher" else 1
        of_round = prompts * (1 - fraction)
        drawn = of_round * (phase.updates // phase.updates_per_round)
        texts = samples * min(drawn, num_prompts.get(source.name, drawn)) if writer else 0.0
        groups.append(Group(source.name, other, of_round * samples, own, teachers, writer, texts))
        if writer is not None:
            text_responses[writer] = text_responses.get(writer, 0.0) + texts
    return PhaseWork(
        name=phase.name,
        updates=phase.updates,
        updates_per_round=phase.updates_per_round,
        groups=tuple(groups),
        kept_numbers=_kept_numbers(plan, phase),
        num_divergences=sum(phase.loss.uses(term) for term in DIVERGENCE_TERMS),
        has_support=phase.loss.support is not None,
        needs_prior_policy=plan.needs_prior_policy(phase),
        batch_size=settings.batch_size,
        samples=settings.samples_per_prompt,
        text_responses=text_responses,
    )


def longest_response(plan: Plan, phase: Phase, source: SourcePlan) -> int:
    """Return the most tokens that a response to a source's prompts can have in a phase."""
    if source.text_field is not None:
        return source.max_tokens or MAX_TOKENS
    if source.environment is not None:
        return int(source.environment.max_tokens)
    return plan.rollout_of(phase).max_new_tokens


def _kept_numbers(plan: Plan, phase: Phase) -> dict[str, int | None]:
    kept: dict[str, int | None] = {}
    for name, teacher in plan.teachers.items():
        required = None if teacher.api is not None else required_of(phase.loss, teacher)
        if required is None:
            continue
        spec = capabilities(teacher).smallest(required) if teacher.bridge is None else required
        widths = {"top_k": 2 * (spec.k or 0) + 3, "student_top_k": (spec.k or 0) + 2, "sampled": 2}
        kept[name] = widths.get(spec.kind)
    return kept
