"""Tiny real models, tokenizers and complete recipes."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

WORDS = ("a", "b", "c", "d", "<eos>")


# The same examples every time, so that failures can be repeated. Limits of time would depend on the load.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """Restore the handlers of signals: a run that was stopped ignores further ones, for its process to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Files that share an expensive fixture run in one process, by the name of their group.
TOGETHER = {"test_grid_endings.py": "grid", "test_grid_runs.py": "grid"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file in one process, as they share fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return TOGETHER.get(file.rsplit("/", 1)[-1], file)

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Take all imported modules out of garbage collection: runs collect explicitly, up to 0.5 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


_MODEL_FILES: dict[tuple[object, ...], dict[str, bytes]] = {}


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    vocab: int = 37,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = True,
    spread: float = 0.3,
    eos: int = 2,
    model_type: str = "qwen3",
) -> Path:
    """Write a random model, weights and config only, into `folder`. Models with the same options are made once."""
    key = (seed, vocab, hidden, layers, tied, spread, eos, model_type)
    if key in _MODEL_FILES:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in _MODEL_FILES[key].items():
            (folder / name).write_bytes(content)
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=spread,
        eos_token_id=eos,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    _MODEL_FILES[key] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return folder


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write_model` into a new temporary folder."""

    def make(name: str, **options: object) -> Path:
        return write_model(tmp_path_factory.mktemp(name), **options)  # type: ignore[arg-type]

    return make


def write_word_tokenizer(folder: Path, template: str) -> None:
    """A tokenizer of five words, ids 0 to 4; the last one ends a response."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


SHORT = "{{ messages[0].content }}"
LONGER = "a b c d a b c {{ messages[0].content }}"  # seven tokens more than SHORT


@pytest.fixture(scope="session")
def write_job_in() -> Callable[..., Path]:
    """Function that writes a complete job over a five-token vocabulary into a folder; returns its recipe.

    Student `base`; teachers `one` (padded to 8 rows, template seven tokens longer) and `two` (untied head).
    The models are StableLM: its LayerNorm computes in float64 where the weights are, unlike the RMSNorms of
    transformers, so that exactness can be seen. Domain `left` is taught by both with weights 1 and 0.5, `right` by `two` with 0.7.
    """

    def write(folder: Path, recipe: Mapping[str, object] = {}, **student: object) -> Path:
        kind = {"model_type": "stablelm", "eos": 4}
        write_model(folder / "base", seed=1, vocab=6, **kind)
        write_model(folder / "one", seed=2, vocab=8, hidden=48, **kind)
        write_model(folder / "two", seed=3, vocab=5, tied=False, **kind)
        for name, template in (("base", SHORT), ("one", LONGER), ("two", SHORT)):
            write_word_tokenizer(folder / name, template)
        for name in ("one", "two"):
            card = {"card": 1, "name": name, "model": name}
            (folder / f"{name}.yaml").write_text(json.dumps(card))
        for name, prompts in (("left", ["a b", "c"]), ("right", ["d d a", "b"])):
            rows = [{"prompt": p, "answer": "c", "response": "c d"} for p in prompts]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        document = {
            "recipe": 1,
            "name": "job",
            "seed": 3,
            "threads": 1,
            "student": {"model": "base", **student},
            "teachers": {
                "one": {"card": "one.yaml", "dtype": student.get("dtype", "float32")},
                "two": {"card": "two.yaml", "dtype": student.get("dtype", "float32")},
            },
            "prompts": [
                {"source": "left.jsonl", "domain": "left", "teachers": {"one": 1.0, "two": 0.5}},
                {"source": "right.jsonl", "domain": "right", "teachers": {"two": 0.7}},
            ],
            "rollout": {"max_new_tokens": 6},
            "phases": [{"name": "merge", "updates": 2, "loss": "reverse_kl", "prompts_per_round": 4}],
            "optimizer": {"lr": 0.01},
            "output": "run",
            **recipe,
        }
        path = folder / "job.yaml"
        path.write_text(json.dumps(document, indent=1))  # JSON is YAML
        return path

    return write


@pytest.fixture
def write_job(tmp_path: Path, write_job_in: Callable[..., Path]) -> Callable[..., Path]:
    """`write_job_in` the test's own folder."""

    def write(recipe: Mapping[str, object] = {}, **student: object) -> Path:
        return write_job_in(tmp_path, recipe, **student)

    return write
