"""Teachers with another tokenizer through the whole engine, against what no bridge is needed for, and a model
without any of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_jobs import END, write_byte_job, write_model
from enumeration import engine_round
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeopd.align.responses import Unaligned
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build_evaluation
from mergeopd.engine.clock import Clock
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.stages import Stages
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Event, Note
from mergeopd.rollout.protocol import Completion
from mergeopd.scaffold.recipe import NewRecipeOptions, new_recipe
from mergeopd.teacher.token_view import AlignedTokens
from mergeopd.types import Rollout

CPU = torch.device("cpu")
SAME = [("a", "b")]
OTHER = [("b", "c"), ("c", "a"), ("a", "b")]
ANSWERS = ("abcab", "bcb", "é\u0301 z", "a", "cabcabcab")


def parts_of(
    folder: Path, *, merges=OTHER, turned: bool = True, bridge: object = None, **phase: object
) -> Models:
    teacher = {"card": "other.yaml", "dtype": "float64"} | ({} if bridge is None else {"bridge": bridge})
    recipe = {
        "teachers": {"other": teacher},
        "phases": [{"name": "merge", "updates": 1, "prompts_per_round": 3, **phase}],
    }
    return load_models(
        preflight(write_byte_job(folder, recipe, merges=merges, turned=turned)), Machine(CPU, SingleProcess())
    )


def rollouts_of(parts: Models, *, cut: Sequence[int] = ()) -> list[Rollout]:
    """Every answer to every prompt, as the student's tokens; those of `cut` without an end."""
    student = parts.inputs.student
    [prompts] = parts.inputs.prompts.values()
    found = []
    for prompt in prompts:
        for sample, answer in enumerate(ANSWERS):
            ids = [*student.tokenizer.encode(answer), *([] if sample in cut else [student.end_id])]
            logprobs = tuple(-1.0 - 0.1 * i for i in range(len(ids)))
            finish = "length" if sample in cut else "eos"
            rollout = Rollout(prompt, sample, student.render(prompt), tuple(ids), "student", finish, logprobs)
            found.append(rollout)
    return found


def gradient(parts: Models, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    [(found, _)] = engine_round(parts, rollouts)
    return found


@pytest.mark.parametrize(
    ("bridge", "loss"),
    [
        ({"gold": {"beta": 0.3}}, {"jsd": {"weight": 1.0, "beta": 0.3}}),
        ({"pieces": {"jsd": 0.3}}, {"jsd": {"weight": 1.0, "beta": 0.3}}),
        ("pieces", {"forward_kl": 1.0}),
        ({"gold": {"merge": "bayesian"}}, {"jsd": 1.0}),
        ({"projection": {"direction": "forward"}}, {"forward_kl": 1.0}),
        ({"projection": {"direction": "reverse"}}, {"reverse_kl": 1.0}),
        ("span", {"sampled_reverse_kl": 1.0}),
    ],
)
def test_a_bridge_over_one_tokenizer_equals_the_exact_loss(
    tmp_path: Path, bridge: object, loss: dict[str, object]
) -> None:
    """Whole path, float64: the same raw gradient as without a bridge."""
    plain = parts_of(tmp_path / "plain", merges=SAME, turned=False, loss=loss)
    bridged = parts_of(tmp_path / "bridged", merges=SAME, turned=False, bridge=bridge, loss=loss)
    rollouts = rollouts_of(plain, cut=(2,))
    expected, found = gradient(plain, rollouts), gradient(bridged, rollouts)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-9 * largest), name


@pytest.mark.parametrize("bridge", ["span", "gold"])
def test_a_bridged_teacher_of_one_term_has_the_weight_of_that_term(tmp_path: Path, bridge: str) -> None:
    """The bridge replaces the terms that the teacher is in: here the second alone, 0.4 x 0.5."""
    terms = {"reverse_kl": {"teachers": "self"}, "forward_kl": {"teachers": {"other": 0.5}, "weight": 0.4}}
    selves = {"student": "start"}

    def parts_with(**changes: object) -> Models:
        teachers = {"other": {"card": "other.yaml", "dtype": "float64", "bridge": bridge}, "self": selves}
        phase = {"name": "merge", "updates": 1, "prompts_per_round": 3, "loss": terms, **changes}
        source = {"source": "p.jsonl", "domain": "d", "teachers": {"other": 0.2, "self": 1.0}}
        recipe = {"teachers": teachers, "phases": [phase], "prompts": [source]}
        folder = tmp_path / str(len(changes))
        return load_models(
            preflight(write_byte_job(folder, recipe, merges=OTHER, turned=True)),
            Machine(CPU, SingleProcess()),
        )

    own, routed = parts_with(), parts_with(loss="forward_kl")
    route = own.plan.teachers_of(own.plan.phases[0]).route
    rollouts = rollouts_of(routed)
    expected = gradient(routed, rollouts)  # 1.0 x 0.2; the student itself has no gradient
    found = gradient(own, [replace(rollout, prompt=route(rollout.prompt)) for rollout in rollouts])
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-9 * largest), name


@pytest.mark.parametrize("bridge", ["span", "gold"])
@pytest.mark.parametrize("whole", [{"discount": 0.9}, {"early_gain": 0.5}])
def test_prompts_of_bridged_teachers_beside_advantages_of_whole_responses(
    tmp_path: Path, bridge: str, whole: dict[str, float]
) -> None:
    """Log-ratios of single tokens are credited to other tokens; a bridge has none, and teaches as ever."""

    def parts_with(**sampled: float) -> Models:
        recipe = {
            "teachers": {
                "other": {"card": "other.yaml", "dtype": "float64", "bridge": bridge},
                "self": {"student": "start"},
            },
            "prompts": [
                {"source": "p.jsonl", "domain": "d", "teachers": {"other": 0.7}},
                {"source": "q.jsonl", "domain": "q", "teachers": {"self": 1.0}},
            ],
            "phases": [
                {
                    "name": "merge",
                    "updates": 1,
                    "prompts_per_round": 3,
                    "loss": {"sampled_reverse_kl": sampled},
                }
            ],
        }
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / "q.jsonl").write_text('{"prompt": "bb"}')
        return load_models(
            preflight(write_byte_job(tmp_path, recipe, merges=OTHER, turned=True)),
            Machine(CPU, SingleProcess()),
        )

    def gradient_of(parts: Models) -> dict[str, Tensor]:
        rollouts = []
        for [prompt, *_] in parts.inputs.prompts.values():
            student = parts.inputs.student
            ids = (*student.tokenizer.encode("abcab"), student.end_id)
            mu = (-1.0,) * len(ids)
            rollouts.append(Rollout(prompt, 0, student.render(prompt), ids, "student", "eos", mu))
        return gradient(parts, rollouts)

    # The student itself has nothing to say to its own answer, so all of the gradient is the bridge's.
    expected, found = gradient_of(parts_with(weight=1.0)), gradient_of(parts_with(weight=1.0, **whole))
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-9 * largest), name


def pieces(ids: Sequence[int], table: dict[int, bytes]) -> list[bytes]:
    return [table[i] for i in ids]


def byte_table(parts: Models, *, teacher: bool) -> dict[int, bytes]:
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = (parts.inputs.teachers["other"] if teacher else parts.inputs.student).tokenizer
    values = {}
    for written, i in tokenizer.backend.get_vocab().items():
        # "Ġ" stands for a space and so on: the alphabet maps every byte to a printable character.
        values[i] = b"" if written == END else b"".join(_byte(c, ByteLevel) for c in written)
    return values


def _byte(character: str, level: type) -> bytes:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(table) == set(level.alphabet())
    return bytes([table[character]])


def groups(own: list[bytes], other: list[bytes]) -> list[tuple[range, range]]:
    """Brute force: cut wherever both sides have written the same number of bytes."""
    found, i, j = [], 0, 0
    for stop in range(1, len(own) + 1):
        length = sum(map(len, own[:stop]))
        ends = [s for s in range(1, len(other) + 1) if sum(map(len, other[:s])) == length]
        if ends and ends[0] > j:
            found.append((range(i, stop), range(j, ends[0])))
            i, j = stop, ends[0]
    return found


def logprobs(folder: Path, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Tensor, torch.nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1), model


@pytest.mark.parametrize("bridge", ["uld", {"gold": {"weights": [0.8, 0.4]}}, "span"])
def test_with_other_tokens_the_gradient_is_that_of_the_definition(tmp_path: Path, bridge: object) -> None:
    """Dense, one answer at a time, groups by brute force; groups have several tokens on either side."""
    kind = bridge if isinstance(bridge, str) else next(iter(bridge))
    parts = parts_of(
        tmp_path, bridge=bridge, loss={"sampled_reverse_kl" if kind == "span" else "reverse_kl": 0.6}
    )
    rollouts = rollouts_of(parts, cut=(2,))
    found = gradient(parts, rollouts)
    student, teacher = parts.inputs.student, parts.inputs.teachers["other"]
    own_bytes, other_bytes = byte_table(parts, teacher=False), byte_table(parts, teacher=True)
    pairs = [(s, t) for s, b in own_bytes.items() for t, c in other_bytes.items() if b == c and b]
    pairs.append((student.end_id, teacher.end_id))
    total = sum(len(r.response_ids) for r in rollouts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    sizes: set[tuple[int, int]] = set()
    loss = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        is_cut = rollout.finish == "length"
        content = rollout.response_ids if is_cut else rollout.response_ids[:-1]
        text = b"".join(pieces(content, own_bytes)).decode()
        other_ids = [*teacher.tokenizer.encode(text), *([] if is_cut else [teacher.end_id])]
        cuts = groups(
            pieces(content, own_bytes), pieces(other_ids[: len(other_ids) - (not is_cut)], other_bytes)
        )
        if not is_cut:
            cuts.append((range(len(content), len(content) + 1), range(len(other_ids) - 1, len(other_ids))))
        logits = model(torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])).logits[0]
        log_S = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        log_T, _ = logprobs(tmp_path / "other", teacher.render(rollout.prompt), other_ids)
        log_T = log_T.detach()
        at_S = log_S[range(len(log_S)), list(rollout.response_ids)]
        at_T = log_T[range(len(log_T)), other_ids]
        for mine, theirs in cuts:
            sizes.add((len(mine), len(theirs)))
            weight = 0.6 * 0.7 / total
            if kind == "span":
                advantage = (at_T[list(theirs)].sum() - at_S[list(mine)].sum()).detach()
                loss = loss - weight * advantage * at_S[list(mine)].sum()
                continue
            q_S = (log_S[mine[0]] + at_S[list(mine)[1:]].sum()).exp()
            q_T = (log_T[theirs[0]] + at_T[list(theirs)[1:]].sum()).exp()
            loss = loss + weight * len(mine) * _distance(kind, q_S, q_T, pairs)
    loss.backward()
    assert {s for s in sizes if s[0] > 1}
    assert {s for s in sizes if s[1] > 1}
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-8, atol=1e-8 * largest), name


def _distance(kind: str, q_S: Tensor, q_T: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    in_S, in_T = ([p[k] for p in pairs] for k in (0, 1))
    value = torch.zeros((), dtype=torch.float64)
    weight = 1.0
    if kind == "gold":
        s, t = q_S[in_S], q_T[in_T]
        m = 0.5 * t + 0.5 * s
        value = 0.8 * (0.5 * t * (t / m).log() + 0.5 * s * (s / m).log()).sum()
        q_S = q_S[[i for i in range(len(q_S)) if i not in in_S]]
        q_T = q_T[[i for i in range(len(q_T)) if i not in in_T]]
        weight = 0.4
    size = max(len(q_S), len(q_T))
    rank = [torch.cat([q.sort(descending=True).values, q.new_zeros(size - len(q))]) for q in (q_S, q_T)]
    return value + weight * (rank[0] - rank[1]).abs().sum()


@pytest.mark.parametrize("bridge", ["gold", "span"])
def test_responses_without_an_aligned_token_have_no_gradient_and_are_counted(
    tmp_path: Path, bridge: str
) -> None:
    """Half a character, cut off: a micro-batch of nothing else, and one beside others."""
    parts = parts_of(tmp_path, bridge=bridge, loss={"sampled_reverse_kl": 1.0})
    whole = rollouts_of(parts)[0]
    half = parts.inputs.student.tokenizer.encode("é")[:1]
    cut = replace(whole, response_ids=tuple(half * 14), finish="length", logprobs_behaviour=(-1.0,) * 14)
    [(alone, nothing)] = engine_round(parts, [cut])
    assert all(float(g.abs().max()) == 0.0 for g in alone.values())
    without = nothing.teachers(parts.views)["other"]
    assert (without.divergence, without.logprob_gap) == ({bridge: None}, None)
    [(together, stats)] = engine_round(parts, [whole, cut])
    assert any(float(g.abs().max()) > 0.0 for g in together.values())
    figures = stats.teachers(parts.views)["other"].bridge
    assert figures is not None
    assert figures.unaligned_fraction == pytest.approx(14 / (14 + len(whole.response_ids)))


def test_special_tokens_spelled_out_by_a_teacher_are_text(tmp_path: Path) -> None:
    """The student's end token spelled out ends nothing; half a character at the limit is left out."""
    parts = parts_of(tmp_path, bridge="gold", loss="forward_kl")
    crossing, student = parts.inputs.cross_tokenizers["other"], parts.inputs.student
    [spelled] = crossing.other.encode([f"ab{END}c é"])
    ids, whole = crossing.in_student_ids([*spelled, crossing.ends.teacher], ended=True)
    assert whole
    assert [i for i in ids if i == student.end_id] == [ids[-1]]
    assert student.tokenizer.decode(ids[:-1]) == f"ab{END}c é"
    cut, whole = crossing.in_student_ids(spelled[:-1], ended=False)
    assert not whole
    assert student.tokenizer.decode(cut) == f"ab{END}c "
    assert crossing.in_student_ids([crossing.ends.teacher], ended=True) == ((student.end_id,), True)


def test_a_span_is_a_policy_term_also_beside_a_divergence(tmp_path: Path) -> None:
    """It can be corrected and left unclipped, and answers of another policy are noted."""
    phase = {"name": "merge", "updates": 1, "prompts_per_round": 3, "loss": "reverse_kl"}
    recipe = {
        "teachers": {"other": {"card": "other.yaml", "bridge": "span"}},
        "rollout": {"temperature": 0.7, "max_new_tokens": 6},
        "phases": [phase],
    }
    plain = preflight(write_byte_job(tmp_path, recipe, merges=OTHER, turned=True))
    assert any("policy terms without correction" in note for note in plain.notes)
    recipe["phases"] = [{**phase, "clip_ratio": None, "correction": "truncate"}]
    corrected = preflight(write_byte_job(tmp_path, recipe, merges=OTHER, turned=True))
    assert not any("correction" in note for note in corrected.notes)


def test_responses_are_truncated_to_the_teachers_context(tmp_path: Path) -> None:
    """Within the recipe's limit in the student's tokens an answer may be far longer in the teacher's."""
    parts = parts_of(tmp_path, merges=[("b", "c")], bridge="gold", loss="reverse_kl")
    crossing, whole = parts.inputs.cross_tokenizers["other"], rollouts_of(parts)[0]
    student, teacher = parts.inputs.student, parts.inputs.teachers["other"]
    room = teacher.max_positions - len(teacher.render(whole.prompt))
    num_pairs = room // 2 + 5
    ids = (*student.tokenizer.encode("ab" * num_pairs), student.end_id)
    assert len(ids) == num_pairs + 1
    long = replace(whole, response_ids=ids, logprobs_behaviour=(-1.0,) * len(ids))
    first, second = crossing.align([long, whole])
    assert len(first.teacher_ids) == first.teacher_stops[-1] == room // 2 * 2
    assert dict(first.unaligned) == {Unaligned.NO_ROOM: num_pairs + 1 - room // 2}
    assert not second.unaligned


def test_a_text_that_takes_more_tokens_of_the_student_ends_with_its_context(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, bridge="gold", loss="forward_kl")
    crossing, student = parts.inputs.cross_tokenizers["other"], parts.inputs.student
    [[prompt, *_]] = parts.inputs.prompts.values()
    [ids] = crossing.other.encode(["bc" * 70])
    assert len(ids) == 70
    view = AlignedTokens(crossing, student, None)
    for written, length, finish in (
        (ids, student.max_positions - len(student.render(prompt)), "length"),
        (ids[:20], 41, "eos"),
    ):
        found = Completion((*written, crossing.ends.teacher), (), "eos")
        translated, how = view.student_ids(found, prompt)
        assert (len(translated), how) == (length, finish)


def test_a_new_recipe_has_a_bridge_where_the_tokenizer_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_byte_job(tmp_path, {}, merges=OTHER, turned=True)
    (tmp_path / "same.yaml").write_text('{"card": 1, "name": "same", "model": "base"}')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_bytes((tmp_path / "p.jsonl").read_bytes())
    files = ["other=p.jsonl", "same=q.jsonl"]
    inputs, _ = new_recipe(NewRecipeOptions("both", "base", ["other.yaml", "same.yaml"], files))
    assert {name: crossing.bridge.kind for name, crossing in inputs.cross_tokenizers.items()} == {
        "other": "pieces"
    }


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)


def test_weights_of_another_tokenizer_are_not_merged(tmp_path: Path) -> None:
    """Though all shapes fit: the embedding's rows are other tokens', or fewer."""
    source = {"source": "q.jsonl", "domain": "d", "verifier": "exact", "reference_field": "answer"}
    recipe = {
        "teachers": {"other": {"card": "other.yaml", "bridge": "gold"}},
        "phases": [{"name": "merge", "updates": 1, "loss": "reverse_kl"}],
        "evaluation": {"prompts": [source]},
    }
    inputs_file = write_byte_job(tmp_path, recipe, merges=OTHER, turned=True)
    (tmp_path / "q.jsonl").write_text('{"prompt": "ba", "answer": "c"}')
    write_model(tmp_path / "other", seed=3, vocab=260, hidden=32)
    inputs, notes = preflight(inputs_file), Notes()
    assert inputs.plan.evaluation is not None
    stages = Stages(notes, Clock(), SingleProcess(), None)
    evaluation = build_evaluation(inputs, inputs.plan.evaluation, Machine(CPU, SingleProcess()), stages)
    measured = evaluation.run(tmp_path / "base", None)
    assert notes.texts == ["no static merge: other has another tokenizer than the student"]
    assert [model.kind for model in measured.models] == ["base", "expert", "merged"]
