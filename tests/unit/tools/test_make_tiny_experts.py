"""The tiny experts: checkable tasks, disjoint prompts, ordinary folders, and a cache that is never wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from small_experts import DOMAINS, ROWS, TOOLS, load_script, small_settings  # puts TOOLS on the path
from tiny_experts import tasks
from tiny_experts.cache import cache_key, why_stale, written_aside
from tiny_experts.settings import Settings


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "experts"
    load_script().make(out, small_settings(), 3, 1, Console(quiet=True))
    return out


def read_rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def neighbourhood(row: str, times: int) -> str:
    """Rule 110 by its table of neighbourhoods: the ones that make a living cell."""
    rows, alive = [], {"xxo", "xox", "oxx", "oxo", "oox"}
    for _ in range(times):
        row = "".join("x" if (row[-1:] + row + row[:1])[i : i + 3] in alive else "o" for i in range(len(row)))
        rows.append(" ".join(row))
    return " , ".join(rows)


def pushed(moves: list[str]) -> str:
    """Each state of a stack as the moves that no later pop has removed."""
    states = []
    for end in range(1, len(moves) + 1):
        left = " ".join(moves[:end])
        while "pop" in left:
            left = re.sub(r"\S+ pop *", "", left, count=1)
        states.append(left.strip() or "none")
    return " / ".join(states)


def swapped(cups: list[str], moves: list[str]) -> str:
    states = []
    for move in moves:
        first, second = {"1": (0, 1), "2": (1, 2), "3": (2, 0)}[move]
        cups[first], cups[second] = cups[second], cups[first]
        states.append(" ".join(cups))
    return " / ".join(states)


def carried(pairs: list[str]) -> str:
    """Carries and digits of a sum, from the sums of all lower places as whole numbers."""
    lines = []
    for place in range(1, len(pairs) + 1):
        numbers = [int("".join(pair.split()[side] for pair in pairs[:place])[::-1]) for side in (0, 1)]
        sum_ = sum(numbers)
        lines.append(f"{sum_ // 10**place} {sum_ // 10 ** (place - 1) % 10}")
    return " , ".join(lines)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
SOLVE: dict[str, Callable[[list[str]], str]] = {
    "largest": lambda w: sorted(w)[-1],
    "sort": lambda w: " ".join(sorted(w)),
    "reverse": lambda w: " ".join(reversed(w)),
    "upper": lambda w: " ".join(letter.upper() for letter in w),
    "shift": lambda w: " ".join((LETTERS + LETTERS)[LETTERS.index(x) + int(w[0])] for x in w[1:]),
    "interleave": lambda w: " ".join(f"{w[i]} {w[i + 6]}" for i in range(5)),
    "dedupe": lambda w: " ".join(x for i, x in enumerate(w) if x not in w[:i]),
    "total": lambda w: " ".join(str(sum(map(int, w[: i + 1])) % 10) for i in range(8)),
    "walk": lambda w: " ".join(
        str((int(w[0]) + w[2:i].count("r") - w[2:i].count("l")) % 10) for i in range(3, 13)
    ),
    "cells": lambda w: neighbourhood("".join(w), 3),
    "add": lambda w: carried(" ".join(w).split(" , ")),
    "count": lambda w: " ".join(f"{x} {w[: i + 1].count(x)}" for i, x in enumerate(w)),
    "insert": lambda w: " / ".join(" ".join(sorted(w[: i + 1])) for i in range(5)),
    "swap": lambda w: swapped(w[:3], w[4:]),
    "stack": pushed,
}


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_answers_are_right(domain: str) -> None:
    """Each answer follows from its prompt, worked out here from the prompt's text alone."""
    for row in tasks.splits(domain, {"eval": 100}, 5)["eval"]:
        words = row.prompt.replace(",", "").split()
        if domain in SOLVE:
            spaced = row.prompt.split()
            assert row.answer == SOLVE[domain](spaced[1:])
            continue
        call = json.loads(row.answer)
        if domain == "order":
            assert call == dict(zip(("sweet", "dish", "drink"), (*words[1:3], words[4]), strict=True)) | {
                "table": int(words[-1])
            }
            continue
        used = {str(value) for key, value in call.items() if key != "tool"}
        assert len(used) == 4
        assert used <= set(words)
        if domain == "tool":
            assert call["tool"] == {"table": "book", "wake": "alarm"}.get(words[0], "ride")


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_splits_are_disjoint_and_whole(domain: str) -> None:
    """Every task has enough different prompts."""
    rows = Settings().rows
    splits = tasks.splits(domain, rows, 0)
    assert {name: len(examples) for name, examples in splits.items()} == dict(rows)
    assert rows["eval"] >= 256
    prompts = [example.prompt for examples in splits.values() for example in examples]
    assert len(set(prompts)) == len(prompts)


def test_evaluation_does_not_depend_on_the_size_of_later_splits() -> None:
    small = tasks.splits("sort", {"eval": 20, "train": 5}, 1)
    large = tasks.splits("sort", {"eval": 20, "train": 50}, 1)
    assert small["eval"] == large["eval"]
    assert tasks.splits("sort", {"eval": 20}, 2)["eval"] != small["eval"]


def test_written_prompts_are_disjoint(experts: Path) -> None:
    for domain in DOMAINS:
        files = {split: read_rows(experts / "data" / f"{split}_{domain}.jsonl") for split in ROWS}
        assert {split: len(rows) for split, rows in files.items()} == ROWS
        prompts = [row["prompt"] for rows in files.values() for row in rows]
        assert len(set(prompts)) == sum(ROWS.values())
        assert all(set(row) == {"prompt", "answer"} for rows in files.values() for row in rows)


def test_answer_lengths_differ_by_five_and_more() -> None:
    from tiny_experts.tokens import encode, train_tokenizer

    examples = {domain: tasks.splits(domain, {"eval": 256}, 0)["eval"] for domain in DOMAINS}
    texts = [text for rows in examples.values() for row in rows for text in (row.prompt, row.answer)]
    tokenizer = train_tokenizer(texts, 400)
    mean = {
        domain: sum(len(row.answer_ids) for row in encode(tokenizer, rows)) / len(rows)
        for domain, rows in examples.items()
    }
    assert mean["total"] == 9.0  # eight digits and the end token
    assert mean["cells"] >= 5 * mean["total"]


def test_encoding_is_what_the_chat_template_gives(experts: Path) -> None:
    from tiny_experts.tasks import Example
    from tiny_experts.tokens import encode
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    prompt = "total 3 1 6 2 1 7 4 8"
    lengths = {}
    for name in ("base", *DOMAINS):
        loaded = AutoTokenizer.from_pretrained(experts / name)
        message = [{"role": "user", "content": prompt}]
        ids = loaded.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        system = small_settings().expert_system.get(name, "")
        encoded = encode(
            Tokenizer.from_file(str(experts / name / "tokenizer.json")), [Example(prompt, "3 4 0")], system
        )
        assert encoded[0].prompt_ids == ids
        assert encoded[0].answer_ids[-1] == loaded.eos_token_id
        assert loaded.decode(encoded[0].answer_ids[:-1]) == "3 4 0"
        lengths[name] = len(ids)
    assert lengths["base"] == lengths["sort"] == lengths["tool"] == lengths["cells"] < lengths["total"]


def test_folders_are_ordinary_with_one_tokenizer_and_different_heads(experts: Path) -> None:
    from transformers import AutoModelForCausalLM

    vocabularies = {(experts / name / "tokenizer.json").read_bytes() for name in ("base", *DOMAINS)}
    assert len(vocabularies) == 1
    num_rows = {}
    for name in ("base", *DOMAINS):
        model = AutoModelForCausalLM.from_pretrained(experts / name)
        assert model.config.model_type == "qwen3"
        assert model.generation_config.eos_token_id == 1
        num_rows[name] = model.get_output_embeddings().weight.shape[0]
        assert model.config.vocab_size == num_rows[name] > small_settings().num_tokens
        assert not list((experts / name).glob("*.bin"))
    assert num_rows == {"base": 304, "total": 304, "sort": 304, "tool": 320, "cells": 304}


def test_padding_changes_no_logit_of_a_token() -> None:
    import torch
    from tiny_experts.train import new_model, pad_rows

    model = new_model(small_settings().size, 304, 0).eval()
    ids = torch.tensor([[5, 17, 250, 3]])
    with torch.no_grad():
        before, after = model(ids).logits, pad_rows(model, 320, 0)(ids).logits
    assert after.shape[-1] == 320
    torch.testing.assert_close(after[..., :304], before, rtol=0, atol=1e-6)
    assert after[..., 304:].abs().min() > 0


def test_accuracy_is_that_of_greedy_generation() -> None:
    """The one-pass accuracy equals what transformers' own generate writes, right and wrong ones mixed."""
    import torch
    from tiny_experts.tokens import Encoded
    from tiny_experts.train import accuracy, new_model

    model = new_model(small_settings().size, 304, 1).eval()
    prompts = [[2, 20 + number, 40 + number, 3] for number in range(8)]
    rows = []
    for number, prompt in enumerate(prompts):
        written = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=-1)
        answer = written[0, 4:].tolist()
        if number in (2, 5, 6):
            answer[number % 3] += 1
        rows.append(Encoded(prompt, answer))
    assert accuracy(model, rows, num_tokens=304) == 5 / 8


def test_same_seed_same_bytes_other_seed_other_weights(experts: Path, tmp_path: Path) -> None:
    """Also from several processes."""
    script = load_script()
    for seed in (3, 4):
        script.make(tmp_path / str(seed), small_settings(), seed, 2, Console(quiet=True))
    first, again, other = (
        json.loads((folder / "manifest.json").read_text())["files"]
        for folder in (experts, tmp_path / "3", tmp_path / "4")
    )
    assert first == again
    assert first["sort/model.safetensors"] != other["sort/model.safetensors"]


def test_a_domain_past_the_ceiling_gets_no_rows_until_it_has_fallen_below() -> None:
    """A stand-in learner: a domain with rows leaps from 0 to 0.9 at its second update, one without loses 0.3."""
    from tiny_experts.settings import BaseTraining
    from tiny_experts.train import train_base

    class Leaper:
        def __init__(self) -> None:
            self.model, self.batches, self.reached = {"state": 0}, [], {"leaps": 0.0, "kept": 0.0}

        def update(self, lr: float, batch: dict[str, int]) -> None:
            self.batches.append(dict(batch))
            self.model = {"state": len(self.batches)}
            self.reached["kept"] = 1.0
            leaped = len(self.batches) >= 2
            self.reached["leaps"] = (
                0.9 if "leaps" in batch and leaped else max(0.0, self.reached["leaps"] - 0.3)
            )

        def accuracy(self, domain: str) -> float:
            return self.reached[domain]

    learner = Leaper()
    training = BaseTraining(
        {"leaps": 8, "kept": 8}, {"leaps": 0.2, "kept": 0.9}, check_every=1, paused_share=0.25
    )
    best = train_base(learner, training, ["leaps"], lambda update, end: None)  # type: ignore[arg-type]
    assert learner.batches == [
        {"leaps": 8, "kept": 8},
        {"leaps": 8, "kept": 2},  # leaps to 0.9, above the ceiling of 0.45
        {"kept": 2},  # 0.6
        {"kept": 2},  # 0.3: enough, and below the ceiling
    ]
    assert best == {"state": 4}  # type: ignore[comparison-overlap]


def test_a_training_that_fails_in_its_process_is_an_error() -> None:
    from tiny_experts.parallel import run

    def fails(advance: Callable[[int, int], object]) -> dict[str, float]:
        advance(1, 2)
        raise OSError("disk full")

    seen: list[tuple[str, int, int]] = []
    with pytest.raises(RuntimeError, match="the training of bad ended without a result"):
        run({"bad": fails}, lambda name: lambda update, end: seen.append((name, update, end)), 2)
    assert seen == [("bad", 1, 2)]


def test_cache_notices_every_change(experts: Path, tmp_path: Path) -> None:
    settings, key = small_settings(), cache_key(small_settings(), 3)
    assert why_stale(experts, key) is None
    assert why_stale(experts, cache_key(settings, 4)) == "the seed, the settings or the tool changed"
    assert cache_key(replace(settings, num_rows=400), 3) != key
    assert why_stale(tmp_path / "none", key) == "there are none yet"

    copy = tmp_path / "copy"
    shutil.copytree(experts, copy)
    weights = copy / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert why_stale(copy, key) == "a file is missing or was changed"
    weights.unlink()
    assert why_stale(copy, key) == "a file is missing or was changed"
    (copy / "manifest.json").write_text("{")
    assert why_stale(copy, key) == "the manifest is missing or damaged"


def test_a_broken_off_run_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "experts"
    with written_aside(out, "first", {}) as folder:
        (folder / "data").write_text("old")

    def break_off() -> None:
        with written_aside(out, "second", {}) as folder:
            (folder / "data").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert (out / "data").read_text() == "old"
    assert why_stale(out, "first") is None
    with written_aside(out, "third", {}) as folder:
        assert not list(folder.iterdir())  # nothing of the broken-off run is taken over
        (folder / "data").write_text("new")
    assert why_stale(out, "third") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts"]


def test_a_folder_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with (
        pytest.raises(FileExistsError, match="holds files of yours"),
        written_aside(tmp_path / "mine", "", {}),
    ):
        pytest.fail("nothing may be written")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_second_run_loads_neither_torch_nor_transformers(experts: Path, tmp_path: Path) -> None:
    """The real script, in a fresh process, with a manifest that matches its own settings."""
    out = tmp_path / "experts"
    with written_aside(out, cache_key(Settings(), 0), {"accuracy": {"base": {"sort": 0.25}}}):
        pass
    code = (
        "import runpy, sys; sys.argv = ['make_tiny_experts.py', '--out', sys.argv[2]]; "
        f"runpy.run_path({str(TOOLS / 'make_tiny_experts.py')!r}, run_name='__main__'); "
        "print('heavy:', sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    script = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", script, "x", str(out)], capture_output=True, text=True, check=True
    )
    assert "already" in done.stdout
    assert "25.0%" in done.stdout
    assert "heavy: []" in done.stdout
