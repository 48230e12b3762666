"""The command line: output, files and exit codes."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from byte_tokenizers import byte_level

from mergeopd import __version__
from mergeopd.cli import app, main
from mergeopd.cli.opening import open_with
from mergeopd.storage.lock import exclusive

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]

DATASET = {
    "phases": [{"name": "merge", "updates": 1, "text": "dataset", "loss": "nll", "prompts_per_round": 4}]
}
EVALUATED = {
    "evaluation": {
        "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
        "max_new_tokens": 2,
    }
}

NO_CANARY = (
    "teachers one and two have no canary, so a wrong or damaged model is not detected; "
    "`mergeopd new teacher` writes one"
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `mergeopd ARGUMENTS` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergeopd", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        shown = capsys.readouterr()
        return code, re.sub(r"\A[\d :-]+  mergeopd \S+, .*\n", "", shown.out), shown.err  # the first line

    return call


@pytest.fixture
def job(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`write_job`, in a folder that is also the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    return lambda *args, **kwargs: write_job(*args, **kwargs).relative_to(tmp_path)


def test_help_names_the_commands_and_nothing_else(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert [name for name in ("run", "check", "eval", "schema") if f" {name} " in plain] == [
        "run",
        "check",
        "eval",
        "schema",
    ]
    assert plain.index(" new ") < plain.index(" check ")
    assert "--version" in plain
    assert "--show-completion" not in plain


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"mergeopd {__version__}\n", "")


def test_a_good_recipe(command: Command, job: Callable[..., Path]) -> None:
    recipe = job()
    assert command("check", recipe) == (
        0,
        f"note: {NO_CANARY}\n"
        "  left   left   2 prompts  drawn 2 times  by one and two 0.5\n"
        "  right  right  2 prompts  drawn 2 times  by two 0.7\n"
        "job.yaml: OK. 2 teachers, 4 prompts, 2 updates in 1 phase.\n",
        "",
    )
    code, out, err = command("check", recipe, "--json", "--set", "optimizer.lr=0.005")
    document = json.loads(out)
    assert (code, err, document["ok"], document["notes"]) == (0, "", True, [NO_CANARY])
    assert re.fullmatch("[0-9a-f]{64}", document["plan"])


def test_all_problems_go_to_stderr(command: Command, job: Callable[..., Path], tmp_path: Path) -> None:
    recipe = job()
    (tmp_path / "left.jsonl").write_text("")
    code, out, err = command("check", recipe, "--set", "optimizer.lrr=1", "--set", "seed=-1")
    assert (code, out) == (2, "")
    assert err == (
        "job.yaml:21:14  prompts[0].source\n"
        "    left.jsonl: has no prompts; a source needs at least one row\n"
        "--set #1  optimizer.lrr\n"
        "    unknown key 'lrr'; did you mean 'lr'?\n"
        "--set #2  seed\n"
        "    expected a whole number >= 0 and < 9223372036854775808, found -1\n"
        "\n3 problems.\n"
    )
    code, out, err = command("check", recipe, "--json", "--set", "optimizer.lrr=1")
    assert (code, err) == (2, "")
    document = json.loads(out)
    assert document["ok"] is False
    assert [problem["path"] for problem in document["problems"]] == ["prompts[0].source", "optimizer.lrr"]
    assert document["problems"][0]["line"] == 21


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom mergeopd.cli import main\nsys.argv = ['mergeopd', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'ruamel', 'tokenizers', 'jinja2', 'mergeopd.api'}\n"
        "print('heavy:', *sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_run_shows_that_it_works_before_anything_slow(tmp_path: Path) -> None:
    """On a terminal; with a recipe that is not there, so that nothing else is shown before the error."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mergeopd", "run", "none.yaml"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with suppress(OSError):  # Linux's end of a terminal
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    assert process.wait() == 2
    assert shown.startswith(b"\r\x1b[2Kreading none.yaml")  # before the imports of rich, pydantic and others
    assert shown.index(b"\x1b[2K", 10) < shown.index(b"no such file")
    assert b"1 problem." in shown[shown.index(b"no such file") :]


def test_pipes_get_a_first_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    open_with(Path("a\x1b[2Jb.yaml"))()
    line = capsys.readouterr().out
    assert re.fullmatch(rf"[\d-]+ [\d:]+  mergeopd {__version__}, a\\x1b\[2Jb.yaml\n", line)
    open_with(Path("a.yaml"), only_terminal=True)()  # as in the first of several processes
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["check", "run", "eval"])
def test_a_recipe_that_is_not_there(command: Command, tmp_path: Path, name: str) -> None:
    code, out, err = command(name, tmp_path / "none.yaml")
    assert (code, out) == (2, "")
    assert "none.yaml" in err
    assert "1 problem." in err


@pytest.mark.parametrize("arguments", [("check",), ("check", "x.yaml", "--jsn"), ("chek", "x.yaml")])
def test_wrong_usage_exits_with_2(command: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--set", "optimizer.lr", "2"), "--set takes one word; write --set optimizer.lr=2"),
        (("-v",), "write -v before the command: mergeopd -v check"),
    ],
)
def test_misplaced_words_have_a_remedy(command: Command, arguments: tuple[str, ...], remedy: str) -> None:
    code, out, err = command("check", "x.yaml", *arguments)
    assert (code, out) == (2, "")
    assert remedy in err
    # Neither is in the way of what is meant otherwise.
    assert "no such file" in command("check", "--set", "seed", "x.yaml")[2]


def test_verbose_logs_stages_and_details_to_stderr(
    command: Command, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEOPD_VERBOSE", "0")  # put back afterwards
    recipe = job({"phases": [{**DATASET["phases"][0], "loss": "reverse_kl"}]})
    logger = logging.getLogger("mergeopd")
    try:
        code, _, err = command("-vv", "run", recipe)
    finally:
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
    assert code == 0
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in err.splitlines()]
    stages = [line.removeprefix("mergeopd.engine.clock: ") for line in lines if "engine.clock" in line]
    assert [stage for stage in stages if " " not in stage][:2] == ["startup", "startup"]
    assert "rollout" in stages
    weights = Path("one/model.safetensors").stat().st_size
    read = re.search(r"mergeopd\.teacher\.local: read (\d+) bytes of teacher one", err)
    assert read is not None
    assert 0 < int(read[1]) <= weights
    assert "device cpu" in err
    monkeypatch.setenv("MERGEOPD_VERBOSE", "0")
    assert command("run", recipe, "--set", "output=other")[2] == ""


@pytest.mark.parametrize(("options", "name"), [((), "recipe"), (("--card",), "card")])
def test_schema(command: Command, options: tuple[str, ...], name: str) -> None:
    code, out, _ = command("schema", *options)
    assert code == 0
    assert json.loads(out) == json.loads((ROOT / "docs" / "schema" / f"{name}.schema.json").read_text())


def test_evaluation_prompts_that_are_trained_on_need_permission(
    command: Command, job: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = job(EVALUATED)
    (tmp_path / "held_out.jsonl").write_text(
        '{"prompt": "b", "answer": "c"}\n{"prompt": "a", "answer": "c"}\n'
    )
    code, _, err = command("check", recipe)
    assert code == 2
    assert (
        "evaluation.prompts[0].source\n    1 of 2 prompts are also trained on; remove them from one file"
        in err
    )
    code, out, _ = command("check", recipe, "--set", "evaluation.prompts.0.allow_overlap=true")
    assert code == 0
    assert out.splitlines()[0] == "note: 1 of 2 evaluation prompts of 'held_out' are also trained on"


def test_check_is_light_and_quick(job: Callable[..., Path]) -> None:
    """Through the installed console script, with tokenizers, templates, prompts and checkpoints to read."""
    recipe = job(EVALUATED)
    script = Path(sys.executable).with_name("mergeopd")
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['mergeopd', 'check', {str(recipe)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & sys.modules.keys()\n"
        "    print('heavy:', *sorted(heavy))\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[3].startswith("job.yaml: OK.")
    assert done.stdout.splitlines()[4] == "heavy:"
    assert seconds < 10, "about half a second on an idle machine; ten on one that is not"


def test_interrupting_leaves_no_traceback(
    command: Command, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergeopd.engine.run.preflight", interrupted)
    assert command("run", job()) == (
        130,
        "",
        "Interrupted. There is no checkpoint yet; run the same command to start again.\n",
    )
    Path("run/checkpoints/step-7").mkdir(parents=True)
    assert command("run", "job.yaml")[2].endswith("resume from the newest checkpoint, of update 7.\n")
    monkeypatch.setattr("mergeopd.api.preflight", interrupted)
    code, _, err = command("check", "job.yaml")
    assert code == 130
    assert "Traceback" not in err


# -------------------------------------------------------------------------------------------- run folders


@pytest.fixture
def ran(command: Command, job: Callable[..., Path]) -> Path:
    """The recipe of a run that is finished."""
    recipe = job({**DATASET, **EVALUATED})
    code, _, err = command("run", recipe)
    assert code == 0, err
    return recipe


def test_a_finished_run_shows_its_result(command: Command, ran: Path) -> None:
    code, out, err = command("run", ran)
    assert (code, err) == (0, "")
    assert out.startswith("This run is finished: run\n")
    assert "right" in out
    assert re.search(r"result +run/result\.json", out)
    assert re.search(r"student +run/export", out)


def test_a_changed_plan_is_refused_with_its_differences(command: Command, ran: Path) -> None:
    code, out, err = command("run", ran, "--set", "optimizer.lr=0.005", "--set", "prompts.0.share=2")
    assert (code, out) == (1, "")
    assert err == (
        "error: run belongs to a run that started with other settings or files:\n"
        "    sources[0].share: 1.0 -> 2.0\n"
        "    optimizer.lr: 0.01 -> 0.005\n"
        "undo the changes to resume it, declare them with --allow-change KEY, start over with --fresh, "
        "which moves this run to run.1, or choose another folder with --set output=...\n"
    )
    code, out, _ = command("check", ran, "--set", "optimizer.lr=0.005")
    assert code == 0
    assert "note: run belongs to a run that started with other settings" in out


def test_fresh_keeps_the_earlier_run_and_starts_over(command: Command, ran: Path) -> None:
    metrics = Path("run/metrics.jsonl").read_text()
    code, out, err = command("run", ran, "--fresh", "--set", "optimizer.lr=0.005")
    assert (code, err) == (0, "")
    assert "note: the earlier run was moved from run to run.1; delete it if it is not needed" in out
    assert Path("run.1/metrics.jsonl").read_text() == metrics
    assert Path("run.1/export/model.safetensors").is_file()
    assert '"lr": 0.005' in Path("run/metrics.jsonl").read_text()
    code, out, _ = command("run", ran, "--fresh")
    assert "moved from run to run.2" in out
    assert command("run", ran, "--fresh", "--allow-change", "seed")[0] == 2


def test_fresh_touches_neither_other_folders_nor_a_wrong_recipe(
    command: Command, job: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = job(DATASET)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    code, _, err = command("run", recipe, "--fresh")
    assert (code, "is not empty and not a run folder" in err) == (1, True)
    (tmp_path / "run" / "thesis.txt").unlink()
    assert command("run", recipe, "--fresh")[0] == 0  # an empty folder is that of no run
    assert command("run", recipe, "--fresh", "--set", "optimizer.lr=-1")[0] == 2
    with exclusive(tmp_path / "run"):
        code, _, err = command("run", recipe, "--fresh")
        assert (code, "another process" in err) == (1, True)
    assert not (tmp_path / "run.1").exists()


def test_a_link_to_another_disk_survives_fresh(
    command: Command, job: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = job(DATASET)
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "real")
    for arguments in ((), ("--fresh",)):
        assert command("run", recipe, *arguments)[0] == 0
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "disk" / "real.1" / "export").is_dir()
    assert (tmp_path / "disk" / "real" / "export").is_dir()


def test_a_smoke_run_does_not_claim_the_folder(command: Command, job: Callable[..., Path]) -> None:
    phases = [{**DATASET["phases"][0], "updates": 6}]
    recipe = job({"phases": phases, "checkpoint": {"every": 3}})
    smoke = ("run", recipe, "--updates", "1")
    assert command(*smoke)[0] == 3
    code, out, _ = command(*smoke)  # the same settings resume
    assert (code, "resumes after update 1 of 6" in out) == (3, True)
    code, out, _ = command(*smoke, "--set", "seed=5")
    assert (code, "a smoke run (--updates) with other settings was moved from run to run.1" in out) == (
        3,
        True,
    )
    assert len(Path("run.1/metrics.jsonl").read_text().splitlines()) == 2
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1
    # A declared change resumes it instead; the first regular checkpoint claims the folder.
    allowed = ("--set", "seed=6", "--allow-change", "seed")
    code, out, _ = command("run", recipe, "--updates", "2", *allowed)
    assert (code, "resumes after update 1 of 6" in out) == (3, True)
    code, _, err = command(*smoke, "--set", "seed=7")
    assert (code, "seed: 6 -> 7" in err) == (1, True)


def test_a_run_without_a_limit_claims_the_folder(
    command: Command, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = job({"phases": [{**DATASET["phases"][0], "updates": 6}]})
    assert command("run", recipe, "--updates", "1")[0] == 3

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mergeopd.engine.run.train", interrupted)
        assert command("run", recipe)[0] == 130
    code, _, err = command("run", recipe, "--updates", "1", "--set", "seed=7")
    assert (code, "seed: 3 -> 7" in err) == (1, True)


def test_lists_and_sections_that_come_or_go(command: Command, ran: Path) -> None:
    code, _, err = command("run", ran, "--set", 'rollout.stop=["d"]', "--set", "evaluation=null")
    assert code == 1
    assert '    rollout.stop: [] -> ["d"]\n' in err
    assert re.search(r"\n    evaluation: \{.*\.\.\. -> null\n", err)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("left.jsonl", "left.jsonl"),
        ("base/model.safetensors", "base"),
        ("two/tokenizer_config.json", "two/tokenizer_config.json"),
        ("one/config.json", "one/config.json"),
    ],
)
def test_changed_files_are_named(command: Command, ran: Path, changed: str, told: str) -> None:
    file = Path(changed)
    content = bytearray(file.read_bytes())
    if file.suffix == ".safetensors":
        content[-1] ^= 1
    elif file.suffix == ".jsonl":
        content += b'\n{"prompt": "d", "answer": "c", "response": "c"}\n'
    else:
        content += b"\n"
    file.write_bytes(content)
    code, out, err = command("run", ran)
    assert (code, out) == (1, "")
    assert err.splitlines()[1:-1] == [f"    {told} has other contents now"]


def test_a_folder_that_is_no_run_is_left_alone(command: Command, job: Callable[..., Path]) -> None:
    recipe = job()
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("")
    code, out, err = command("run", recipe, "--set", "output=mine")
    assert (code, out) == (1, "")
    assert err == "error: mine is not empty and not a run folder; choose another with --set output=...\n"
    assert os.listdir("mine") == ["thesis.txt"]


def test_a_damaged_plan_is_reported_with_other_problems(command: Command, job: Callable[..., Path]) -> None:
    recipe = job()
    Path("run").mkdir()
    Path("run/plan.yaml").write_text("format: 1\n")
    code, _, err = command("check", recipe)
    assert code == 2
    assert "output\n    run/plan.yaml is damaged or of another version of mergeopd" in err


# ------------------------------------------------------------------------------------------------- eval


def test_eval_measures_any_folder(command: Command, ran: Path) -> None:
    code, out, err = command("eval", ran, "--model", "two", "--output", "measured.json")
    assert code == 0, err
    document = json.loads(Path("measured.json").read_text())
    assert set(document["suites"]) == {"right"}
    accuracy = document["suites"]["right"]["accuracy"]
    assert accuracy["merged"] == accuracy["expert/two"]
    assert "right" in out


def test_eval_needs_something_to_measure(command: Command, job: Callable[..., Path]) -> None:
    code, _, err = command("eval", job())
    assert (code, err) == (
        2,
        "job.yaml  evaluation\n    missing section; add `evaluation.prompts`\n\n1 problem.\n",
    )
    recipe = job(EVALUATED)
    code, _, err = command("eval", recipe)
    assert (code, err) == (
        1,
        "error: run/export: the run has not exported a student yet; run it, or name a folder with --model\n",
    )
    code, _, err = command("eval", recipe, "--only", "expert/tow")
    assert (code, err) == (
        1,
        "error: --only expert/tow: the recipe measures no such model; "
        "name base, expert/two, merge/weight_average or merged\n",
    )
    code, _, err = command("eval", recipe, "--model", "nowhere")
    assert (code, err) == (1, "error: nowhere: there is no such folder; name a Hugging Face model folder\n")


def test_a_function_with_a_mistake_is_found_before_the_run(
    command: Command, job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_of_test_cli.py").write_text(
        "def score(answer, reference):\n    return 1.0\n\n1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    verifier = {"kind": "user", "function": "reward_of_test_cli:score"}
    prompts = [{"source": "held_out.jsonl", "domain": "right", "verifier": verifier}]
    recipe = job({"allow_code": ["reward_of_test_cli:score"], "evaluation": {"prompts": prompts}})
    code, _, err = command("run", recipe)
    assert code == 1
    assert "ZeroDivisionError" in err
    assert not Path("run").exists()


# ------------------------------------------------------------------------------------------------- new


def test_from_models_and_prompts_to_a_run(command: Command, job: Callable[..., Path]) -> None:
    job().unlink()
    Path("data").mkdir()
    Path("left.jsonl").rename("data/left.jsonl")
    code, out, err = command("new", "teacher", "left", "--model", "two", "--prompt", "a b c")
    assert code == 0, err
    assert err == "Loading two to generate a sample ...\n"
    assert re.fullmatch(
        r'left responds: "[a-d ]+"\n'
        r"teachers/left\.yaml: written\. A recipe uses it by `left: teachers/left\.yaml`\.\n",
        out,
    )
    assert command("new", "recipe", "first", "--student", "base") == (
        0,
        "recipes/first.yaml: written. 1 teacher, 2 prompts, 200 updates in 1 phase.\n"
        "Try it: mergeopd run recipes/first.yaml --updates 2\n",
        "",
    )
    assert command("check", "recipes/first.yaml") == (
        0,
        # 50 rounds of 256 prompts
        "  left  left  2 prompts  drawn 6,400 times  by left\n"
        "recipes/first.yaml: OK. 1 teacher, 2 prompts, 200 updates in 1 phase.\n",
        "",
    )
    short = {"rollout.max_new_tokens": 2, "phases.0.prompts_per_round": 2, "phases.0.updates_per_round": 1}
    fast = (*(part for key, value in short.items() for part in ("--set", f"{key}={value}")), "--updates", "1")
    code, _, err = command("run", "recipes/first.yaml", *fast)
    assert (code, err) == (
        3,
        "stopped by --updates after 1 of 200 updates, all saved; run the same command to resume\n",
    )


def test_new_reports_missing_options_and_existing_files(command: Command, job: Callable[..., Path]) -> None:
    job()
    code, out, err = command("new", "recipe", "first")
    assert (code, out) == (2, "")
    assert "--student\n    missing option: the model to train; name its folder: --student DIR\n" in err
    assert err.endswith("\n3 problems.\n")
    Path("teachers").mkdir()
    Path("teachers/x.yaml").touch()
    assert command("new", "teacher", "x", "--model", "two") == (
        1,
        "",
        "error: teachers/x.yaml exists already; choose another name, or remove it first\n",
    )
    assert os.listdir("teachers") == ["x.yaml"]


COMMANDS = ("run", "check", "eval", "report", "schema", "new recipe", "new teacher")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_can_be_parsed(
    command: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command(*name.split(), "--help")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(map(len, plain.splitlines())) <= 80
    found = re.search(r"Example: mergeopd (.*?)\n *\n", plain, re.DOTALL)
    assert found is not None
    words = shlex.split(found[1].partition(" > ")[0])
    current: Any = typer.main.get_command(app)
    for step in name.split():
        current, words = current.commands[step], words[words.index(step) + 1 :]
    current.make_context(name, words)  # raises on what it does not know


def test_completion_lists_the_commands() -> None:
    script = Path(sys.executable).with_name("mergeopd")
    asked = {"_MERGEOPD_COMPLETE": "complete_bash", "COMP_WORDS": "mergeopd new ", "COMP_CWORD": "2"}
    done = subprocess.run([script], env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["recipe", "teacher"]


def test_tokenizers_are_compared(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (tmp_path / "some.txt").write_text("hello 1\n")
    code, out, err = command("tokenizers", "own", "own", "--text", "some.txt", "--json")
    document = json.loads(out)
    assert (code, err, document["difference"]) == (0, "", None)
    assert document["coverage"][0]["num_writer"] == 5  # he|ll|o| 1|newline
    code, out, err = command("tokenizers", "own", "own", "--text", "some.txt")
    assert (code, err) == (0, "")
    assert "Both give every text the same ids: a teacher needs no bridge." in out
    code, out, err = command("tokenizers", "own", "owl")
    assert (code, out) == (2, "")
    assert err == "B\n    unknown tokenizer folder 'owl'; did you mean 'own'?\n\n1 problem.\n"
