"""Every tool runs its smallest job: in this process, except where the tool itself starts others."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from byte_tokenizers import byte_level
from fake_server import FakeServer, TorchModel
from small_experts import TOOLS  # puts TOOLS on the path

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.sandbox.client import sandbox_problem

ROOT = TOOLS.parent
HOOKS = {"docs_site"}  # called by the build of the documentation
# Tools whose smallest job another test runs.
ELSEWHERE = {
    "bench_teachers",
    "draw_terminal",
    "fault",
    "inspect_trials",
    "make_recipe_reference",
    "make_tiny_experts",
}
SMALL_STEP = "--hidden 64 --layers 1 --vocab 64 --batch 2 --prompt 8 --new-tokens 3 --steps 1"
SMALL_LOSS = "--tokens 256 --vocab 2048 --d-student 8 --d-teacher 8 --repeats 1 --peers"
SMALL_ROUNDS = (
    "--teachers 2 --prompts 4 --new-tokens 2 --hidden 64 --layers 1 --vocab 64 --rounds 2 --repeats 1"
)
SMALL_BRIDGE = "--groups 32 --vocab-s 60 --vocab-t 70 --d-student 8 --d-teacher 8 --repeats 1"
SMALL_ROUND = "--responses 4 --tokens 16"
SHORT_ANSWERS = "--answers 2 --tokens 16 --repeats 1"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a tool's command line in this process and returns what it prints."""

    def call(module: ModuleType, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def run_here(command: list[str], **_: Any) -> None:
    """What `subprocess.run(command, check=True)` does with `python -m mergeopd ...`, without a process."""
    from mergeopd.cli import main

    assert command[:3] == [sys.executable, "-m", "mergeopd"]
    before, sys.argv = sys.argv, ["mergeopd", *command[3:]]
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    assert code in (0, None), command


def test_no_tool_is_left_out() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    tools = {path.stem for path in TOOLS.glob("*.py")} - HOOKS
    assert {
        name for name in tools - ELSEWHERE if f'"{name}"' not in text and f"{name}.py" not in text
    } == set()
    tested = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name in ELSEWHERE if f"{name}.py" not in tested} == set()


def test_bench_step(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load("bench_step")
    monkeypatch.setattr(tool, "KEEPING", {})
    measured: list[dict[str, Any]] = []

    def once(*arguments: Any) -> dict[str, Any]:
        if not measured:
            measured.append(measure(*arguments))
        return dict(measured[0])

    measure = tool.measure
    monkeypatch.setattr(tool, "measure", once)
    monkeypatch.setattr(tool, "trl_problem", lambda: "trl is not tested here")
    result = json.loads(call(tool, *SMALL_STEP.split(), "--json"))
    assert result["mergeopd_s"] > result["bound_s"] > 0
    assert "generation" in call(tool, *SMALL_STEP.split())


def test_simulate_cluster(call: Callable[..., str]) -> None:
    """On four times the ranks, a rank sends fewer bytes and trains on fewer responses."""
    tool = load("simulate_cluster")
    sizes = "--responses 64 --tokens 64 --teachers 3"
    few, many = (json.loads(call(tool, *f"--ranks {ranks} {sizes} --json".split())) for ranks in (4, 16))
    for result in (few, many):
        assert list(result["stages"]) == list(tool.STAGES)
        assert result["total"]["seconds"] > 0
    sent = [result["stages"]["rollouts"]["sent_bytes"] for result in (few, many)]
    assert 3 < sent[0] / sent[1] < 5
    assert "16 ranks, 64 responses" in tool.table(many)


def test_bench_engines(call: Callable[..., str], write_job_in: Callable[..., Path], tmp_path: Path) -> None:
    write_job_in(tmp_path)
    server = FakeServer(TorchModel(tmp_path / "base"))
    sizes = ["--prompts", "3", "--input", "4", "--output", "3", "--repeats", "1", "--json"]
    result = json.loads(call(load("bench_engines"), server.url, "--model", tmp_path / "base", *sizes))
    server.close()
    assert result["output_tokens"] == 9
    assert result["ours"][0] > 0


def test_bench_loss(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load("bench_loss")
    assert json.loads(call(tool, *SMALL_LOSS.split(), "--json"))["ratio_to_floor"] > 0
    monkeypatch.setattr(tool, "peak_in_fresh_process", lambda *_: 1 << 20)
    assert "fused_loss" in call(tool, *SMALL_LOSS.split(), "--divergence", "jsd")


@pytest.mark.long
def test_bench_against(call: Callable[..., str]) -> None:
    """This checkout against itself."""
    tool = load("bench_against")
    sizes = SMALL_STEP.replace("--steps 1", "--steps 3")
    result = json.loads(call(tool, ROOT, *sizes.split(), "--pairs", 1, "--loss", SMALL_LOSS, "--json"))
    assert set(result) == {"cpu_s", "generation_s", "teacher_s", "update_s", "loss"}
    assert all(ratio > 0 for ratio in result.values())


def test_bench_rounds(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load("bench_rounds")
    runs: list[dict[str, float]] = []
    monkeypatch.setattr(tool, "run", lambda *_, run=tool.run: runs.append(run(*_)) or runs[-1])
    result = json.loads(call(tool, *SMALL_ROUNDS.split(), "--json"))
    assert result["cpu"]["ratio"] == pytest.approx(runs[3]["cpu"] / runs[2]["cpu"], abs=1e-3)
    assert "2 teachers" in tool.table(result)


def test_bench_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the limit on the address space, which would be this process's own."""
    tool = load("bench_streaming")
    monkeypatch.setattr(tool, "LENGTH", 8)
    load("bench_teachers").write_model(
        tmp_path, seed=0, hidden_size=64, intermediate_size=64, num_hidden_layers=3
    )
    cases = {name: case for name, case in tool.CASES.items() if name != "limited"}
    result = {name: case(tool.Job(tmp_path, tokens=128, repeats=1)) for name, case in cases.items()}
    assert result["pair"]["equal_bits"]
    assert result["pair"]["layer_bytes"] < result["pair"]["bytes_read_in_a_pass"]
    assert [one["teachers"] for one in result["many"]] == [1, 4, 16]
    for one in result["many"]:
        one.update(result.pop(f"peak{one['teachers']}"))
    limited = {"allowed_bytes": 1, "streamed": "scored", "resident": "Cannot allocate memory"}
    assert "| 16 |" in tool.table({**result, "limited": limited})


def test_bench_bridge(call: Callable[..., str]) -> None:
    tool = load("bench_bridge")
    rows = json.loads(call(tool, *SMALL_BRIDGE.split(), "--threads", 1, "--json"))
    assert [row["kind"] for row in rows] == ["gold", "uld", "forward", "reverse"]
    assert "32 groups" in call(
        tool, *SMALL_BRIDGE.split(), "--threads", 1, "--kinds", "uld", "--clock", "cpu"
    )


def test_bench_objectives(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load("bench_objectives")
    for name, size in {"VOCAB": 80, "ANSWERS": 2, "PROMPT": 3, "RESPONSE": 4, "HIDDEN": 64}.items():
        monkeypatch.setattr(tool, name, size)
    rows = json.loads(call(tool, "--repeats", 1, "--json"))
    assert rows["exact reverse KL"]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in rows.values())


def test_bench_align(call: Callable[..., str], tmp_path: Path) -> None:
    tool = load("bench_align")
    for name, extra in (("one", ()), ("two", ("abc",))):
        (tmp_path / name).mkdir()
        byte_level(extra).save(str(tmp_path / name / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("hello\nall 1\n", encoding="utf-8")
    options = [*SHORT_ANSWERS.split(), "--text", text, "--trl-python", shutil.which("false")]
    result = json.loads(call(tool, tmp_path / "one", tmp_path / "two", *options, "--json"))
    assert (result["num_answers"], result["num_student_tokens"]) == (2, 32)
    assert "trl_skipped" in result
    assert "Without TRL" in call(tool, tmp_path / "one", tmp_path / "two", *options)


def test_bench_rollouts(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, which exchanges nothing; tests/dist has processes that do."""
    tool = load("bench_rollouts")
    monkeypatch.setattr(
        tool, "launch", lambda given: [tool.measure(SingleProcess(), given.responses, given.tokens)]
    )
    result = json.loads(call(tool, *SMALL_ROUND.split(), "--json"))
    assert (result["round_tokens"], result["array_bytes_sent"]) == (64, 64 * 8)
    assert "4 responses of 16 tokens" in call(tool, *SMALL_ROUND.split())


def test_bench_sandbox(call: Callable[..., str]) -> None:
    if (problem := sandbox_problem()) is not None:
        pytest.skip(problem)
    tool = load("bench_sandbox")
    assert [task.is_correct for task in tool.make_tasks(3)] == [True, False, True]
    printed = call(tool, "--programs", 3, "--workers", 1)
    assert "3 programs, 1 workers" in printed
    assert printed.count("programs/minute") == 3


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory,
    write_job_in: Callable[..., Path],
    make_model: Callable[..., Path],
) -> Path:
    """The smallest recipe with the quickstart's domains and phases, and experts that can be averaged."""
    folder = tmp_path_factory.mktemp("project")
    teachers = {"total": "one", "sort": "two", "tool": "two"}
    phase = {"updates": 1, "prompts_per_round": 3}
    recipe = {
        "prompts": [
            {"source": f"{domain}.jsonl", "domain": domain, "teachers": name}
            for domain, name in teachers.items()
        ],
        "rollout": {"max_new_tokens": 2},
        "phases": [
            {**phase, "name": "cold", "text": "teacher", "loss": "forward_kl"},
            {**phase, "name": "merge", "loss": "reverse_kl"},
        ],
        "evaluation": {
            "prompts": [
                {"source": f"eval_{domain}.jsonl", "domain": domain, "verifier": "exact", "expert": name}
                for domain, name in teachers.items()
            ],
            "max_new_tokens": 2,
        },
    }
    path = write_job_in(folder, recipe)
    for seed, name in enumerate(("one", "two"), start=2):
        made = make_model(name, seed=seed, vocab=6, model_type="stablelm", eos=4)
        shutil.copytree(made, folder / name, dirs_exist_ok=True)
    for domain in teachers:
        row = {"prompt": "a", "answer": json.dumps(domain if domain == "sort" else 1)}
        for prefix in ("", "eval_"):
            (folder / f"{prefix}{domain}.jsonl").write_text(json.dumps({**row, "prompt": prefix or "b"}))
    return path


def test_compare_objectives(
    project: Path, tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load("compare_objectives")
    monkeypatch.setattr(tool, "RECIPE", project)
    monkeypatch.setattr(tool, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=run_here))
    printed = call(tool, "--only", "exact", "--balance", "on", "--seeds", 0, "--updates", 5)
    assert "Recovered headroom in %" in printed
    exports = [folder.parent.name for folder in (tmp_path / "runs").glob("*/export")]
    assert len(exports) == 2


def test_plant_failures(
    project: Path, tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load("plant_failures")
    for name, value in {"RECIPE": project, "METHODS": (), "UPDATES": 4, "PROMPTS": 3}.items():
        monkeypatch.setattr(tool, name, value)
    printed = call(tool, "--only", "teacher_is_student", "--output", tmp_path)
    assert re.search(r"teacher_is_student +│ +4 +│ +yes +│ .*identical_teacher 1 \(1\)", printed)


@pytest.mark.long
def test_soak_and_fault(project: Path, tmp_path: Path) -> None:
    """Four processes: the undisturbed run, the counted one, one that is killed, one that ends it."""
    options = ["--set", "evaluation=null", "--kills", "1", "--seed", "1", "--folder", str(tmp_path)]
    command = [sys.executable, str(TOOLS / "soak.py"), str(project), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills 1, runs 1, differences 0" in done.stdout


def test_merge_bench(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two candidates at equal updates and at equal time; figures are those of the runs' own results."""
    from small_experts import small_settings

    tool = load("merge_bench")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "SETS", {"agents": small_settings(24)})
    out = call(
        tool,
        *("--sets", "agents", "--seeds", 3, "--only", "sft", "--updates", 4, "--prompts", 9),
        *("--prompts-per-round", 6, "--equal-time", "--jobs", 1),
    )
    (folder,) = (tmp_path / "runs" / "bench").iterdir()
    documents = {
        path.name.removesuffix(".json"): json.loads(path.read_text()) for path in folder.glob("*.json")
    }
    equal_updates = [name for name in documents if "-4-base-" in name]
    assert {name.split("-")[0] for name in equal_updates} == {"sft", tool.DEFAULT.replace(" ", "_")}
    assert "4 updates" in out
    assert "the time of the default" in out
    assert "best static merge" in out
    for name, document in documents.items():
        suites = json.loads((folder / name / "result.json").read_text())["suites"]
        for domain, recovered in document["recovered"].items():
            assert recovered == pytest.approx(suites[domain]["recovered"]["value"])
        (kept,) = (suite["over_base"]["value"] for suite in suites.values() if suite["expert"] is None)
        assert document["kept"] == pytest.approx(kept)
        assert document["num_tokens"] > 0


def test_repair_bench(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two updates a phase: a line per stage, whose skill of the start is the base's of the run."""
    from rich.console import Console
    from small_experts import load_script, small_settings

    tool = load("repair_bench")
    load_script().make(tmp_path / "quickstart-5", small_settings(24), 5, 1, Console(quiet=True))
    monkeypatch.setattr(tool, "STAGES", {"learn": 1})
    few = [f"phases.{i}.updates=1" for i in range(6)] + [f"phases.{i}.prompts_per_round=4" for i in range(6)]
    changes = ["optimizer.warmup_updates=0", "evaluation.prompts.0.limit=20", *few]
    printed = call(tool, tmp_path, tmp_path / "out", "--seeds", 5, "--set", *changes)
    stages = re.findall(r"seed 5  (\w+) +facts +([\d.]+) %  skill +([\d.]+) %", printed)
    assert [stage for stage, _, _ in stages] == ["start", "learn"]
    result = json.loads((tmp_path / "out/5/runs/learn/result.json").read_text())
    accuracy = result["suites"]["reverse"]["accuracy"]
    assert [float(skill) for *_, skill in stages] == pytest.approx(
        [100 * accuracy[model]["value"] for model in ("base", "merged")], abs=0.05
    )


def test_intervals_of_the_merge_bench() -> None:
    """Student's t by the textbook: mean 2, standard deviation 1, three values: 4.30 / sqrt(3) = 2.48."""
    assert load("merge_bench").interval([0.01, 0.02, 0.03]) == "+2.0 ± 2.5"


def test_candidates_of_the_merge_bench_have_equal_updates_and_prompts() -> None:
    from small_experts import small_settings

    tool = load("merge_bench")
    for name, phases_of in tool.CANDIDATES.items():
        phases = phases_of(120)
        assert sum(phase["updates"] for phase in phases) == 120
        job = tool.Job("agents", 0, name, 120, prompts_per_round=8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tool, "_prompts", lambda *_: Path("prompts"))
            patch.setattr(tool, "_card", lambda *_: Path("card"))
            phases = tool.recipe(job, small_settings())["phases"]
        rounds = {phase["prompts_per_round"] / phase.get("updates_per_round", 1) for phase in phases}
        assert rounds == {8}
        assert ("four updates" in name) == any(phase.get("updates_per_round") == 4 for phase in phases)


def test_check_plan(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and operations of the plan are those that a run counts."""
    tool = load("check_plan")
    size = tool.Size(64, 2, 64)
    small = tool.Job("small", size, (size, tool.Size(64, 1, 64)), 8, 6, 4, rounds=2)

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        run_here(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tool, "JOBS", (small,))
    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=run))
    options = ["--hardware", "cpu:2,8GiB", "--repeats", "1"]
    [row] = json.loads(call(tool, *options, "--json").partition("\n{")[2].join(("{", "")))["jobs"]
    headers = 2 * 8192
    assert 0 <= row["measured_bytes_read"] - row["planned_bytes_read"] < headers
    # A response may end before its last token.
    for stage in ("rollout", "teachers", "update"):
        assert row["measured_flops"][stage] == pytest.approx(row["planned_flops"][stage], rel=0.05)
    assert row["memory_ratio"] > 0
    assert "memory within 10%" in call(tool, *options, "--clock", "cpu")
