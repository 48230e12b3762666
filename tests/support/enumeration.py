"""A round of the engine, and the same on Hugging Face models with autograd, for the enumeration tests.

All responses of at most two tokens over a five-token vocabulary, in float64. Gradients are compared rather
than updates, as Adam would hide a wrong scale.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeopd.batch.objective import phase_objective
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build, build_environments
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.loop import Trainer
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.samples import SampleTaker
from mergeopd.engine.score import CollectedRound
from mergeopd.engine.stages import Stages
from mergeopd.engine.teacher_rollouts import TeacherRolloutCache
from mergeopd.engine.update_stats import UpdateStats
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Reporter, Reporters
from mergeopd.types import Prompt, Rollout

Gradients = dict[str, Tensor]
CPU = torch.device("cpu")
V, EOS = 5, 4
ANSWERS = [(EOS,), *((x, y) for x in range(V - 1) for y in range(V))]
TEMPLATE_IDS = {"one": (0, 1, 2, 3, 0, 1, 2), "two": ()}
VERIFIER = {"kind": "regex", "pattern": "."}


def build_parts(write_job: Callable[..., Path], *overrides: str, **phase: object) -> Models:
    phases = [{"name": "merge", "updates": 2, "prompts_per_round": 4, "text": "dataset", **phase}]
    recipe = write_job({"phases": phases}, dtype="float64")
    return load_models(preflight(recipe, overrides), Machine(CPU, SingleProcess()))


def trainer_of(parts: Models, reporter: Reporter | None = None) -> Trainer:
    return build(parts, reporter=reporter or Reporters(), clock=Clock(), interrupt=Interrupt())


def teacher_rollouts_of(parts: Models, reporter: Reporter | None = None) -> TeacherRolloutCache:
    stages = Stages(reporter or Reporters(), Clock(), SingleProcess(), None)
    return TeacherRolloutCache(
        parts.plan,
        student=parts.inputs.student,
        renderers=parts.inputs.teachers,
        teachers=parts.teachers,
        api_teachers={},
        views=parts.views,
        environments=build_environments(parts.plan.sources, parts.plan, SingleProcess()),
        stages=stages,
    )


def engine_round(
    parts: Models,
    rollouts: Sequence[Rollout],
    grades: Sequence[float | None] | None = None,
    *,
    round_index: int = 0,
    sgd_lr: float = 0.0,
) -> list[tuple[dict[str, Tensor], UpdateStats]]:
    """Raw gradient by parameter and statistics of every update; a step of gradient descent after each.

    On a grid of processes, where it is collective, rank 0 has the gradients, and there is no step.
    """
    phase, trainer = parts.plan.phases[0], trainer_of(parts)
    work = trainer.pipeline.work(rollouts, round_index, phase.updates_per_round)
    collected = CollectedRound(phase, 0, rollouts, grades or [None] * len(rollouts), work)
    results = []
    with trainer.scorer.score(collected) as scored:
        for done, update in enumerate(work.updates):
            objective = phase_objective(phase, done, has_policy=parts.plan.has_policy(phase))
            stats = trainer.updater.accumulate_gradients(
                objective,
                trainer.updater.prepare(scored, update, done),
                update.packs[parts.student.placement.dp_rank],
                scored.targets,
                SampleTaker((), objective),
                trainer.stages,
            )
            gradients = {name: g.clone() for name, g in parts.student.gradients().items()}
            results.append((gradients, stats))
            parts.student.optimizer_step(0.0)
            if not sgd_lr:
                continue
            with torch.no_grad():
                state = {part.name: part.tensor for part in parts.student.state()}
                for name, gradient in gradients.items():
                    state[f"master.{name}"].sub_(sgd_lr * gradient)
    return results


def response_logprobs(
    model: torch.nn.Module, prompt: Sequence[int], responses: Sequence[Sequence[int]], tau: float
) -> list[Tensor]:
    """Full-vocabulary log-probabilities of the responses to one prompt, each `[len(response), V]`.

    One forward pass; shorter responses are padded at their end.
    """
    longest = max(map(len, responses))
    ids = torch.tensor([[*prompt, *response, *[0] * (longest - len(response))] for response in responses])
    logits = model(ids).logits[:, len(prompt) - 1 : -1, :V]
    rows = torch.log_softmax(logits / tau, -1)
    return [row[: len(response)] for row, response in zip(rows, responses, strict=True)]


def logprobs(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int], tau: float) -> Tensor:
    """Full-vocabulary log-probabilities of each position of one response, `[len(response), V]`."""
    return response_logprobs(model, prompt, [response], tau)[0]


def rollout_logprobs(
    model: torch.nn.Module, rollouts: Sequence[Rollout], tau: float, template: Sequence[int] = ()
) -> list[Tensor]:
    """The same for every rollout, in one forward pass per prompt; `template` precedes the prompts."""
    by_prompt: dict[bytes, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        by_prompt.setdefault(rollout.prompt_ids.tobytes(), []).append(i)
    result: dict[int, Tensor] = {}
    for members in by_prompt.values():
        prompt = (*template, *rollouts[members[0]].prompt_ids)
        rows = response_logprobs(model, prompt, [rollouts[i].response_ids for i in members], tau)
        result.update(zip(members, rows, strict=True))
    return [result[i] for i in range(len(rollouts))]


def divergences(loss: dict, log_s: Tensor, log_t: Tensor) -> Tensor:
    """Per position, by the definitions; `loss` as in a recipe."""
    if "support" in loss:
        return on_support(loss, log_s, log_t)
    s, t = log_s.exp(), log_t.exp()
    total = loss.get("reverse_kl", 0.0) * (s * (log_s - log_t)).sum(-1)
    total = total + loss.get("forward_kl", 0.0) * (t * (log_t - log_s)).sum(-1)
    if "jsd" in loss:
        beta = loss["jsd"]["beta"]
        log_m = (beta * t + (1 - beta) * s).log()
        jsd = beta * (t * (log_t - log_m)).sum(-1) + (1 - beta) * (s * (log_s - log_m)).sum(-1)
        total = total + loss["jsd"]["weight"] * jsd
    total = total + loss.get("tvd", 0.0) * 0.5 * (s - t).abs().sum(-1)
    if "skew_forward_kl" in loss:  # alpha 0.2; the reverse one has its default, 0.1
        total = total + (t * (log_t - (0.2 * t + 0.8 * s).log())).sum(-1)
        total = total + 0.5 * (s * (log_s - (0.1 * s + 0.9 * t).log())).sum(-1)
    if "alpha_divergence" in loss:
        alpha = loss["alpha_divergence"]["alpha"]
        total = total + (1 - (t**alpha * s ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))
    if "clipped_forward_kl" in loss:
        total = total + (t * (log_t - log_s)).clamp(max=0.2).sum(-1)
    return total * loss.get("temperature", 1.0) ** 2


def on_support(loss: dict, log_s: Tensor, log_t: Tensor) -> Tensor:
    """Divergences over the likeliest tokens, position by position: with a tail, or the generalised KLs."""
    support, positions = loss["support"], []
    for row_s, row_t in zip(log_s, log_t, strict=True):
        best = {"student": set(row_s.topk(support["top_k"]).indices.tolist())}
        best["teacher"] = set(row_t.topk(support["top_k"]).indices.tolist())
        best["union"] = best["student"] | best["teacher"]
        ids = sorted(best[support["of"]])
        s, t = row_s[ids], row_t[ids]
        if support["rest"] == "generalised":
            p, q = s.exp(), t.exp()
            value = loss.get("reverse_kl", 0.0) * (p * (s - t) - p + q).sum()
            positions.append(value + loss.get("forward_kl", 0.0) * (q * (t - s) - q + p).sum())
            continue
        rest = [i for i in range(len(row_s)) if i not in ids]
        s = torch.cat([s, row_s[rest].logsumexp(0, keepdim=True)])
        t = torch.cat([t, row_t[rest].logsumexp(0, keepdim=True)])
        whole = {key: value for key, value in loss.items() if key != "support"}
        positions.append(divergences(whole, s[None], t[None])[0])
    return torch.stack(positions)


class Reference:
    """Three Hugging Face models in float64 and plain autograd."""

    def __init__(self, parts: Models) -> None:
        def load(folder: str) -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

        self.student = load(parts.plan.student.model)
        self.teachers = {name: load(t.model) for name, t in parts.plan.teachers.items()}

    def teacher_logprobs(self, rollouts: Sequence[Rollout], tau: float) -> list[dict[str, Tensor]]:
        """Log-probabilities of every rollout under each of its teachers."""
        result: list[dict[str, Tensor]] = [{} for _ in rollouts]
        for name, model in self.teachers.items():
            taught = [i for i, rollout in enumerate(rollouts) if name in rollout.prompt.scorers]
            with torch.no_grad():
                rows = rollout_logprobs(model, [rollouts[i] for i in taught], tau, TEMPLATE_IDS[name])
            for i, row in zip(taught, rows, strict=True):
                result[i][name] = row
        return result

    def token_losses(self, loss: dict, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Loss of every response token, by rollout; teacher weights included, denominators not."""
        tau = loss.get("temperature", 1.0)
        students = rollout_logprobs(self.student, rollouts, tau)
        losses = []
        for rollout, log_s, log_t in zip(
            rollouts, students, self.teacher_logprobs(rollouts, tau), strict=True
        ):
            total = torch.zeros(len(log_s), dtype=torch.float64)
            for name, weight in rollout.prompt.teachers.items():
                total = total + weight * divergences(loss, log_s, log_t[name])
            if rollout.origin != "student":
                ids = torch.tensor(rollout.response_ids)
                total = total - loss.get("nll", 0.0) * log_s.gather(1, ids[:, None])[:, 0]
            losses.append(total)
        return losses

    def gradient(self, total: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*self.student.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).abs().max()) <= tolerance * scale, name


def prompts_of(parts: Models) -> list[Prompt]:
    """The prompts of all sources, with the teachers that they have in the first phase."""
    route = parts.plan.teachers_of(parts.plan.phases[0]).route
    return [route(p) for name in sorted(parts.inputs.prompts) for p in parts.inputs.prompts[name]]


def rollouts_of(parts: Models, reference: Reference) -> list[Rollout]:
    """Every response to every prompt, with log-probs of teacher two at temperature 1.2; `a` at the end means cut off."""
    rollouts = []
    for prompt in prompts_of(parts):
        ids = parts.inputs.student.render(prompt)
        with torch.no_grad():
            behaviour = response_logprobs(reference.teachers["two"], ids, ANSWERS, 1.2)
        for i, (answer, behaviour_rows) in enumerate(zip(ANSWERS, behaviour, strict=True)):
            mu = tuple(float(row[y]) for row, y in zip(behaviour_rows, answer, strict=True))
            finish = "eos" if answer[-1] == EOS else "length" if answer[-1] == 0 else "stop"
            rollouts.append(Rollout(prompt, i, ids, answer, "student", finish, mu))  # type: ignore[arg-type]
    return rollouts


def rewards_of(rollouts: Sequence[Rollout]) -> list[float]:
    """1 if the ids add up to a multiple of 3, else 0; always 0 for the third prompt."""
    keys = sorted({r.prompt.key for r in rollouts})
    return [float(sum(r.response_ids) % 3 == 0 and keys.index(r.prompt.key) != 2) for r in rollouts]


def methods_parts(write_job: Callable[..., Path], *overrides: str, **phase: object) -> Models:
    settings = ["rollout.samples_per_prompt=21"]
    settings += [f"prompts.{i}.verifier={VERIFIER}".replace("'", '"') for i in range(2)]
    return build_parts(write_job, *settings, *overrides, **{"text": "student", **phase})


def advantages(rollouts: Sequence[Rollout], grades: Sequence[float], std: str) -> list[float]:
    values = [0.0] * len(rollouts)
    for key in {r.prompt.key for r in rollouts}:
        group = [i for i, r in enumerate(rollouts) if r.prompt.key == key and r.finish != "length"]
        rewards = [grades[i] for i in group]
        mean = statistics.fmean(rewards)
        spread = {"unbiased": statistics.stdev, "biased": statistics.pstdev, "none": lambda _: 1.0}[std](
            rewards
        )
        for i in group:
            epsilon = 0.0 if std == "none" else 1e-6
            values[i] = (grades[i] - mean) / (spread + epsilon)
    return values


class Plain:
    """Log-probabilities of the Hugging Face models for every response, and sums of them."""

    def __init__(self, parts: Models) -> None:
        self.reference = Reference(parts)
        self.rollouts = rollouts_of(parts, self.reference)
        self.lp: list[Tensor] = []  # with a graph
        self.gaps: list[dict[str, Tensor]] = []  # log p_T - log p_S of the response tokens
        self.kl: list[dict[str, Tensor]] = []  # reverse KL by position, with a graph
        students = rollout_logprobs(self.reference.student, self.rollouts, 1.0)
        teachers = self.reference.teacher_logprobs(self.rollouts, 1.0)
        for r, log_s, log_teachers in zip(self.rollouts, students, teachers, strict=True):
            ids = torch.tensor(r.response_ids)[:, None]
            self.lp.append(log_s.gather(1, ids)[:, 0])
            gaps, kl = {}, {}
            for name, log_t in log_teachers.items():
                gaps[name] = (log_t - log_s.detach()).gather(1, ids)[:, 0]
                kl[name] = (log_s.exp() * (log_s - log_t)).sum(-1)
            self.gaps.append(gaps)
            self.kl.append(kl)

    def rho(self, i: int) -> Tensor:
        return (self.lp[i].detach() - self.lp[i].new_tensor(self.rollouts[i].logprobs_behaviour)).exp()

    def d(self, i: int) -> Tensor:
        """The weighted sum of the teachers' gaps."""
        return sum(w * self.gaps[i][n] for n, w in self.rollouts[i].prompt.teachers.items())  # type: ignore[return-value]

    def early(self, i: int, gain: float) -> Tensor:
        """The same, with each gap weighted by the share of the teacher's gaps before it (IW-OPD)."""
        total = torch.zeros_like(self.lp[i].detach())
        for name, weight in self.rollouts[i].prompt.teachers.items():
            gap = self.gaps[i][name]
            behind = torch.stack([gap[:t].abs().sum() for t in range(len(gap))]) / gap.abs().sum()
            total += weight * (1 + gain * (1 - behind)) * gap
        return total

    def exact(self, i: int) -> Tensor:
        return sum(w * self.kl[i][n] for n, w in self.rollouts[i].prompt.teachers.items())  # type: ignore[return-value]

    def num_tokens(self, members: Sequence[int] | None = None) -> int:
        return sum(len(self.rollouts[i].response_ids) for i in members or range(len(self.rollouts)))

    def domains(self, members: Sequence[int] | None = None) -> dict[str, list[int]]:
        result: dict[str, list[int]] = {}
        for i in members or range(len(self.rollouts)):
            result.setdefault(self.rollouts[i].prompt.domain, []).append(i)
        return result

    def gradient(self, total: Tensor) -> Gradients:
        names, parameters = zip(*self.reference.student.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(total, parameters, retain_graph=True), strict=True))


def first_update(
    parts: Models, rollouts: Sequence[Rollout], grades: Sequence[float | None] | None = None
) -> Gradients:
    """The gradient of a round of one update."""
    [(gradient, _)] = engine_round(parts, rollouts, grades)
    return gradient


def is_zero(gradients: Gradients) -> bool:
    """Whether all gradients are exactly zero; NaN is not."""
    return all(bool((g == 0).all()) for g in gradients.values())
