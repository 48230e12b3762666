"""From a seed to the data of the five domains: rows, the corpus of the search, and their token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeopd.environment.calculator import calculator
from mergeopd.environment.protocol import Tools
from mergeopd.environment.search import search
from tiny_experts.agent.tasks import AgentExample, splits
from tiny_experts.agent.tokens import SPECIALS, TEMPLATE, WORDS, Tool, call_text, encode, prompt_text
from tiny_experts.build import Material
from tiny_experts.settings import Settings
from tiny_experts.tokens import pretrained, train_tokenizer

CORPUS = "corpus_search.jsonl"
NUM_RESULTS = 2
EASY = "easy"


def material(folder: Path, settings: Settings, seed: int) -> Material:
    """Write `data/` with rows and the corpus; return what models are trained on.

    The tools' replies are those of mergeopd's environments.
    """
    examples = {domain: splits(domain, settings.rows, seed) for domain in settings.domains}
    for by_split in examples.values():
        by_split[EASY] = [row for row in by_split["train"] if row.is_easy]
    data = folder / "data"
    data.mkdir()
    documents = [row.document for split in settings.rows for row in examples["search"][split]]
    (data / CORPUS).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    environments = {"tools": calculator(), "search": search(data / CORPUS, "text", NUM_RESULTS)}

    turns: dict[tuple[str, str], list[list[str]]] = {}
    for domain, by_split in examples.items():
        for split, rows in by_split.items():
            turns[domain, split] = [_turns(row, environments.get(domain)) for row in rows]
            if split == EASY:
                continue
            lines = map(_row, rows, turns[domain, split], [environments.get(domain)] * len(rows))
            (data / f"{split}_{domain}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def prompts(domain: str, split: str) -> list[str]:
        schema = _tool(environments.get(domain))
        return [prompt_text(row.prompt, schema) for row in examples[domain][split]]

    texts = (
        text
        for domain in examples
        for prompt, own in zip(prompts(domain, "train"), turns[domain, "train"], strict=True)
        for text in (prompt, *own)
    )
    tokenizer = train_tokenizer(texts, settings.num_tokens, SPECIALS, WORDS)
    return Material(
        tokenizer,
        lambda split, system: {
            domain: encode(tokenizer, prompts(domain, split), turns[domain, split]) for domain in examples
        },
        lambda system: pretrained(tokenizer, template=TEMPLATE),
        base_split=EASY,
    )


def _tool(environment: Tools | None) -> Tool | None:
    return None if environment is None else next(iter(environment.schemas.values()))


def _turns(row: AgentExample, environment: Tools | None) -> list[str]:
    """Return the texts of the correct response: turns, with the tool's reply between them."""
    if environment is None or row.arguments is None:
        return [row.response]
    ((name, run),) = environment.functions.items()
    return [call_text(name, row.arguments), run(**row.arguments), row.response]


def _row(row: AgentExample, turns: Sequence[str], environment: Tools | None) -> Mapping[str, Any]:
    """Return a row of a prompt file. Its `response` is a trajectory where a tool is called."""
    response: Any = row.response
    if environment is not None:
        ((name, _),) = environment.functions.items()
        call = {"type": "function", "function": {"name": name, "arguments": row.arguments}}
        response = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": name, "content": turns[1]},
            {"role": "assistant", "content": row.response},
        ]
    return {"prompt": row.prompt, **row.columns, "response": response}
