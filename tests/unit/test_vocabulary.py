"""Names and words that were replaced must not come back in the folders that are free of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLEAN = (
    ".github",
    "examples",
    "mergeopd",
    "recipes",
    "teachers",
    "tests/dist",
    "tests/e2e",
    "tests/errors",
    "tests/examples",
    "tests/gpu",
    "tests/invariant",
    "tests/support",
    "tests/unit/config",
    "tests/unit/inspection",
    "tests/unit/recipe",
    "tests/unit/reporting",
    "tests/unit/storage",
    "tests/unit/tools",
    "tools/launch",
    "tools/step_bench",
)
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".txt", ".toml", ".sh", ".sbatch", ".html")

# Kind, old, new. "name": a class, function, parameter, field or variable that a Python file defines.
# "function": a function or method of that name. "module": the end of a path, without `.py`. "word": anywhere in a file.
REPLACED = (
    ("name", "Ranks", "Communicator"),
    ("name", "Alone", "SingleProcess"),
    ("name", "Processes", "TorchCommunicator"),
    ("function", "first", "run_on_first"),
    ("function", "share", "run_and_gather"),
    ("function", "spread", "scatter_gather"),
    ("name", "is_apart", "outside_collective"),
    ("name", "Agreed", "CollectiveAbort"),
    ("name", "Told", "ErrorToReport"),
    ("name", "EndedElsewhere", "PeerFailed"),
    ("name", "Place", "RankInfo, Placement, SourceLocation or SpillSlot"),
    ("name", "readers", "loss_ranks"),
    ("name", "tells", "reports_stats"),
    ("name", "Writer", "Generator"),
    ("module", "engine/writing", "engine/rollouts"),
    ("name", "Past", "StudentSnapshots"),
    ("name", "Follower", "Snapshot"),
    ("name", "Moving", "SnapshotRule"),
    ("module", "room", "memory"),
    ("name", "Room", "LengthBudget"),
    ("module", "words", "schema_text"),
    ("module", "recipe/checking", "recipe/verifiers"),
    ("module", "selves", "self_teacher_checks"),
    ("module", "companions", "hf_folder"),
    ("name", "verdicts", "rewards"),
    ("name", "teaching", "teacher_loss_weight"),
    ("name", "silent_fraction", "zero_advantage_fraction"),
    ("name", "behaviour_gap", "rollout_logprob_gap"),
    ("function", "whole", "unsharded"),
    ("function", "accumulate", "accumulate_gradients"),
    ("function", "apply", "optimizer_step"),
    ("module", "loss/blocks", "loss/full_vocabulary"),
    ("module", "loss/reduced", "loss/top_k"),
    ("name", "_refuse_strangers", "_check_ids_known"),
    ("name", "lopsided", "leading_space_differs"),
    ("name", "blamed", "with_teacher_names"),
    ("name", "teach", "distill_on"),
    ("name", "Dialect", "Renderer"),
    ("name", "Script", "TeacherPrompt"),
    ("module", "own_prompts", "teacher_prompt"),
    ("name", "_hear", "_check_system_message"),
    ("name", "deaf", "ignores_system"),
    ("name", "hears", "ignores_system"),
    ("module", "ready_answers", "trajectory"),
    ("name", "Crossing", "CrossTokenizer or AlignedTokens"),
    ("name", "Observed", "TeacherTargets"),
    ("name", "Kept", "TargetSpec"),
    ("function", "kept", "required_target"),
    ("name", "Turn", "TeacherPass"),
    ("name", "Pack", "MicroBatchPlan"),
    ("name", "UpdateWork", "UpdatePlan"),
    ("name", "RoundWork", "RoundSchedule"),
    ("name", "look_back", "score_prior_policy"),
    ("name", "Before", "OldLogProbs"),
    ("name", "TeacherTexts", "TeacherRolloutCache"),
    ("name", "Staff", "ResolvedTeachers"),
    ("name", "hire", "resolve_teachers"),
    ("name", "Desk", "SourceResolver"),
    ("name", "Merge", "Trainer"),
    ("name", "Watch", "StopGuard"),
    ("name", "StopNow", "AbandonRound"),
    ("name", "Parts", "what each stage uses"),
    ("name", "micros", "micro_batches"),
    ("name", "found", "the thing's own name"),
    ("module", "bridge/ranks", "cross_tokenizer/sorted_l1"),
    ("module", "bridge/sides", "cross_tokenizer/rows"),
    ("module", "bridge/kinds", "cross_tokenizer/bridges"),
    ("name", "RecipeWish", "NewRecipeOptions"),
    ("name", "Sketch", "RecipeDraft"),
    ("name", "Candidate", "ProbedModel"),
    ("name", "silent", "hidden_when_constant"),
    ("name", "dull", "hidden_when_constant"),
    ("word", "anew", "again"),
    ("word", "alike", "equally, or leave it out"),
    ("word", "dear", "expensive"),
    ("word", "for want of", "without, or out of"),
    ("word", "stands for", "means, or represents"),
    ("word", "in vain", "leave it out"),
    ("word", "go on", "resume, or continue"),
    ("word", "goes on", "resumes, or continues"),
    ("word", "one that is the student", "self-teacher"),
    ("word", "whoever", "name who it is"),
)


def defined(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Kind, name and line of everything that a syntax tree defines; imported names are others' definitions."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield "name", name, node.lineno
                yield "function", name, node.lineno
            case (
                ast.ClassDef(name=name)
                | ast.arg(arg=name)
                | ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
            ):
                yield "name", name, node.lineno


def occurrences(path: Path, text: str) -> Iterator[str]:
    """The replaced names and words of a file, each as `PATH:LINE: old (new)`."""
    replaced = {(kind, old): new for kind, old, new in REPLACED}
    module = path.with_suffix("").as_posix()
    for (kind, old), new in replaced.items():
        if kind == "module" and f"/{module}".endswith(f"/{old}"):
            yield f"{path}: {old} ({new})"
        elif kind == "word":
            pattern = r"[\s#]+".join(old.split())
            for match in re.finditer(rf"\b{pattern}\b", text, re.IGNORECASE):
                yield f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {old} ({new})"
    if path.suffix == ".py":
        for kind, name, line in defined(ast.parse(text)):
            if (kind, name) in replaced:
                yield f"{path}:{line}: {name} ({replaced[kind, name]})"


@pytest.mark.parametrize("folder", CLEAN)
def test_replaced_names_and_words_do_not_come_back(folder: str) -> None:
    files = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    assert files
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in files}
    assert [line for path, text in texts.items() for line in occurrences(path, text)] == []


def test_every_kind_is_found() -> None:
    text = (
        "from a import Ranks\n# Paid dear, for want\n# of time.\nclass Alone:\n    first = 0\n"
        "    def share(self, micros): self.found = 1\n"
    )
    assert list(occurrences(Path("mergeopd/preflight/room.py"), text)) == [
        "mergeopd/preflight/room.py: room (memory)",
        "mergeopd/preflight/room.py:2: dear (expensive)",
        "mergeopd/preflight/room.py:2: for want of (without, or out of)",
        "mergeopd/preflight/room.py:4: Alone (SingleProcess)",
        "mergeopd/preflight/room.py:6: share (run_and_gather)",
        "mergeopd/preflight/room.py:6: micros (micro_batches)",
        "mergeopd/preflight/room.py:6: found (the thing's own name)",
    ]
    assert list(occurrences(Path("mergeopd/preflight/classroom.py"), "# already, unlike before")) == []


def test_the_table_has_no_row_twice() -> None:
    rows = [row[:2] for row in REPLACED]
    assert len(rows) == len(set(rows))
    assert {kind for kind, _ in rows} == {"name", "function", "module", "word"}
