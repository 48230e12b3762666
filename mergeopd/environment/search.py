"""The tool `search`: BM25 over a local corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergeopd.environment.protocol import Tools, schema
from mergeopd.errors import EnvironmentFailed


def search(corpus: Path, text_field: str, num_results: int) -> Tools:
    """Index the documents of a JSON lines file.

    Raises EnvironmentFailed where the package is missing, or a line has no text.
    """
    try:
        import bm25s
    except ImportError as error:
        raise EnvironmentFailed(
            "the search needs the package bm25s: pip install 'mergeopd[search]'"
        ) from error

    documents = _documents(corpus, text_field)
    index = bm25s.BM25()
    tokens = bm25s.tokenize(documents, stopwords=None, show_progress=False)
    index.index(tokens, show_progress=False)
    num = min(num_results, len(documents))

    def run(query: str) -> str:
        words = bm25s.tokenize([query], stopwords=None, show_progress=False)
        best, scores = index.retrieve(words, k=num, show_progress=False)
        hits = [documents[i] for i, score in zip(best[0], scores[0], strict=True) if score > 0]
        return "\n\n".join(hits) or "nothing was found"

    parameters = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "words to search for"}},
        "required": ["query"],
    }
    return Tools({"search": schema("search", "Search documents by words.", parameters)}, {"search": run})


def _documents(corpus: Path, text_field: str) -> list[str]:
    documents = []
    try:
        lines = corpus.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentFailed(f"{corpus}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise EnvironmentFailed(f"{corpus}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            raise EnvironmentFailed(
                f"{corpus}:{number}: has no text in field {text_field!r}; name the field with `text_field`"
            )
        title = row.get("title")
        documents.append(f"{title}\n{row[text_field]}" if isinstance(title, str) else row[text_field])
    if not documents:
        raise EnvironmentFailed(f"{corpus}: has no documents")
    return documents
