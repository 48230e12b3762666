"""Models and recipes of whole runs on grids, the same runs in one process, and their comparison.

Does not import Megatron. `tests/dist/run_worker.py` runs the grids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_cases import write_dense

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.clock import Clock
from mergeopd.engine.run import claim, train

WORDS = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "<eos>")  # 11: two ranks get 6 and 5 of 12
EOS = len(WORDS) - 1
PLAIN = "{{ messages[0].content }}"
LONGER = "a b c d {{ messages[0].content }}"
# Folder: family, tied, rows of the head, template. The student's head has rows beyond the vocabulary.
MODELS = {
    "base": ("qwen3", True, 12, PLAIN),
    "one": ("qwen3", True, 13, LONGER),
    "two": ("qwen3", False, 11, PLAIN),
    "three": ("qwen3", True, 12, PLAIN),
}
PROMPTS = {
    "left": ("a b", "c", "d e f", "b b", "a c e g i"),
    "mid": ("e", "f g h i", "j a", "c d"),
    "right": ("d d a", "b", "g g", "h i j a b c"),
}
DOMAINS = tuple(PROMPTS)
ROUTES = {"left": {"one": 1.0, "two": 0.5}, "mid": {"three": 0.8}, "right": {"two": 0.7}}
EVALUATED = {"left": ("b a", "i", "j c"), "mid": ("h", "a f"), "right": ("f e d", "c c")}
# Correct for about half of the responses of every model.
VERIFIER = {"kind": "regex", "pattern": "^[a-e]"}
RELATIVE = 1e-5
# Relative to the distance that training moved the weights: AdamW turns gradients near rounding into full steps.
OF_THE_WAY = 1e-4

# Every path through the engine: sources of responses, kinds of teacher targets, scores before the update.
COLD_START = {
    "phases": [
        {
            "name": "cold",
            "text": "teacher",
            "updates": 2,
            "prompts_per_round": 8,
            "loss": {"forward_kl": 1.0, "nll": 0.1},
            "reduce": "sequence",
            "balance": {"tokens": {"left": 2.0, "mid": 1.0, "right": 1.0}},
        },
        {"name": "merge", "updates": 4, "prompts_per_round": 8, "loss": "reverse_kl"},
    ],
    "evaluation": {
        "prompts": [
            {"source": f"eval_{domain}.jsonl", "domain": domain, "verifier": VERIFIER} for domain in PROMPTS
        ],
        "interim": {"every": 3, "prompts": 2},
    },
    "checkpoint": {"every": 2, "keep": 2, "best": "left"},
}
MIXED = {
    "phases": [
        {
            "name": "mixed",
            "updates": 4,
            "updates_per_round": 2,
            "prompts_per_round": 6,
            "loss": {"reverse_kl": 0.7, "outcome": 0.5, "sampled_reverse_kl": 0.4},
            "correction": {"kind": "mask", "low": 0.85, "high": 1.2},
            "balance": {"tokens": "equal", "follow_gap": 1.0},
            "select": {"frontier": {"low": 0.0, "high": 0.8, "samples": 3}, "near_teacher": {"nats": 4.0}},
        }
    ],
    "rollout": {"max_new_tokens": 7, "samples_per_prompt": 2, "temperature": 1.1},
    "memory": {"hidden_states_gib": 0.0},
}
REDUCED = {
    "phases": [
        {
            "name": "top",
            "text": {"on_policy_fraction": 0.6, "otherwise": "dataset"},
            "updates": 2,
            "prompts_per_round": 7,
            "loss": {
                "jsd": {"weight": 1.0, "beta": 0.4},
                "temperature": 1.5,
                "support": {"top_k": 3, "of": "teacher", "rest": "tail"},
            },
        },
        {
            "name": "union",
            "updates": 1,
            "prompts_per_round": 7,
            "loss": {
                "reverse_kl": 1.0,
                "forward_kl": 0.5,
                "support": {"top_k": 2, "of": "union", "rest": "generalised"},
            },
        },
        {
            "name": "sampled",
            "updates": 2,
            "prompts_per_round": 7,
            "loss": {"sampled_reverse_kl": {"weight": 1.0, "discount": 0.9}},
            "correction": {"kind": "sequence_mask", "low": 0.5, "high": 2.0},
        },
    ]
}
SELVES = {
    "teachers": {"self": {"student": {"ema": 0.8}}, "two": "two.yaml", "old": {"student": {"every": 2}}},
    "prompts": [
        {"source": "left.jsonl", "domain": "left", "teachers": {"self": 0.5, "two": 1.0}},
        {"source": "mid.jsonl", "domain": "mid", "teachers": {"two": 1.0}},
        {"source": "right.jsonl", "domain": "right", "teachers": {"old": 0.5, "two": 0.5}},
    ],
    "phases": [{"name": "merge", "updates": 5, "prompts_per_round": 7, "loss": "reverse_kl"}],
}
# Nothing is sampled: the responses come from the prompt files.
RECORDED = {
    "phases": [
        {
            "name": "tokens",
            "text": "dataset",
            "updates": 10,
            "prompts_per_round": 9,
            "loss": {"reverse_kl": 1.0, "forward_kl": 0.3, "nll": 0.1},
            "balance": {"tokens": "equal", "follow_gap": 0.5},
        },
        {
            "name": "answers",
            "text": "dataset",
            "updates": 10,
            "updates_per_round": 2,
            "prompts_per_round": 10,
            "loss": {
                "jsd": {"weight": 1.0, "beta": 0.4},
                "support": {"top_k": 4, "of": "union", "rest": "tail"},
            },
            "reduce": "sequence",
        },
    ],
    "checkpoint": {"every": 20, "keep": 1},
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "cold start": COLD_START,
    "mixed": MIXED,
    "reduced": REDUCED,
    "selves": SELVES,
    "recorded": RECORDED,
}


def write_grid_job(folder: Path) -> Path:
    """Write models, cards, prompts and one recipe file for each of `RECIPES` into `folder`; return it."""
    for seed, (name, (family, tied, rows, template)) in enumerate(MODELS.items()):
        write_dense(folder / name, family, tied=tied, vocab=rows, eos=EOS, seed=seed, layers=2, spread=0.25)
        _write_tokenizer(folder / name, template)
        card = {"card": 1, "name": name, "model": name}
        (folder / f"{name}.yaml").write_text(json.dumps(card))
    for domain, prompts in PROMPTS.items():
        rows_of = [
            {"prompt": p, "response": f"{p[::-1]} {WORDS[i]}", "answer": p.split()[0]}
            for i, p in enumerate(prompts)
        ]
        (folder / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, rows_of)))
        held_out = [{"prompt": p} for p in EVALUATED[domain]]
        (folder / f"eval_{domain}.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    for name, recipe in RECIPES.items():
        write_recipe(folder, name, recipe)
    return folder


def write_recipe(folder: Path, name: str, recipe: Mapping[str, Any]) -> Path:
    """Write a recipe beside the job's models. Its runs set `output` to a folder in `runs`."""
    document = {
        "recipe": 1,
        "name": "grid",
        "seed": 5,
        "threads": 1,
        "student": {"model": "base", "micro_batch_tokens": 30},
        "teachers": {name: f"{name}.yaml" for name in ("one", "two", "three")},
        "prompts": [
            {"source": f"{domain}.jsonl", "domain": domain, "teachers": teachers, "verifier": VERIFIER}
            for domain, teachers in ROUTES.items()
        ],
        "rollout": {"max_new_tokens": 8},
        "optimizer": {
            "lr": 3e-3,
            "warmup_updates": 2,
            "schedule": "cosine",
            "eps": 1e-6,
            "weight_decay": 0.1,
        },
        "checkpoint": {"every": 2, "keep": 2},
        "text_cache": "texts",
        "output": "runs/unnamed",
        **recipe,
    }
    path = folder / f"{name}.recipe.yaml"
    path.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return path


def _write_tokenizer(folder: Path, template: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def run_alone(recipe: Path, *overrides: str, max_updates: int | None = None) -> None:
    """Run a recipe in this process, as `mergeopd run` does."""
    with ExitStack() as held:
        inputs = claim(recipe, overrides, (), SingleProcess(), held)
        assert inputs is not None
        train(inputs, Clock(), max_updates, SingleProcess())


def lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run without its timings."""
    return [{k: v for k, v in line.items() if k != "cost"} for line in lines(run / "metrics.jsonl")]


def samples(run: Path) -> list[dict[str, Any]]:
    """Read the sampled responses of a run."""
    return lines(run / "rollouts" / "samples.jsonl")


def gap(actual: Any, expected: Any, *, floor: float, path: str = "") -> tuple[float, str]:
    """Largest difference between two JSON values relative to the expected size, and its place.

    Sizes below `floor` count as `floor`. Raises AssertionError if values other than floats differ.
    """
    if isinstance(expected, dict):
        assert list(actual) == list(expected), path
        pairs = [(f"{path}.{key}", actual[key], expected[key]) for key in expected]
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        pairs = [(f"{path}[{i}]", *both) for i, both in enumerate(zip(actual, expected, strict=True))]
    elif isinstance(expected, float):
        assert isinstance(actual, float), (path, actual, expected)
        assert math.isfinite(actual), path
        return abs(actual - expected) / max(abs(expected), floor), path
    else:
        assert actual == expected, (path, actual, expected)
        return 0.0, path
    return max((gap(a, b, floor=floor, path=where) for where, a, b in pairs), default=(0.0, path))


def assert_same_figures(actual: Path, expected: Path) -> None:
    """Compare metrics and samples of two runs to 1e-5 of their size, or of 1 nat where they are smaller.

    The error of a difference of log-probabilities is float32's resolution of a logit, however small the
    difference. Losses and gradient norms are compared relative to themselves. Samples have six digits, so the
    last one may differ by one.
    """
    for read, tolerance in ((metrics, RELATIVE), (samples, RELATIVE + 1e-5)):
        difference, where = gap(read(actual), read(expected), floor=1.0)
        assert difference <= tolerance, (where, difference)
    for key in ("loss", "grad_norm"):
        for line, wanted in zip(metrics(actual), metrics(expected), strict=True):
            assert abs(line[key] - wanted[key]) <= RELATIVE * abs(wanted[key]), (key, line["update"])


def weights_gap(actual: Path, expected: Path, start: Path) -> float:
    """Distance between two exported students relative to their distance from `start`."""
    from safetensors.torch import load_file

    models = []
    for folder in (actual, expected, start):
        files = sorted(folder.glob("*.safetensors"))
        models.append({n: t.double() for file in files for n, t in load_file(file).items()})
    a, b, origin = models
    assert a.keys() == b.keys() == origin.keys()
    moved = math.sqrt(sum(float((b[n] - origin[n]).square().sum()) for n in b))
    apart = math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in b))
    return apart / moved
