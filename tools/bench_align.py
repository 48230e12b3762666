"""Measure the speed of aligning responses over two tokenizers, also of TRL's GOLD aligner if installed.

    python tools/bench_align.py STUDENT TEACHER [--text FILE] [--answers 256] [--trl-python PYTHON] [--json]

STUDENT and TEACHER are tokenizer folders. Every response consists of the text's lines in another order,
truncated to `--tokens` tokens of the student. Results are millions of the student's tokens per second, from
medians of CPU seconds in one thread:

- `groups`: ends of tokens on both sides to groups (TRL: `_align_by_byte_offsets`, one response at a time)
- `without encoding`: ids of both sides to groups, with a verified round trip (TRL has no such step; its
  offsets result from encoding)
- `whole`: the student's ids to groups, including the teacher's encoding (TRL: `encode_with_byte_offsets` of
  both sides, since it aligns texts, and the walk)

TRL runs in a process of `--trl-python`, which needs only trl: pip install 'trl==1.16.*'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# Encode in one thread. Read when the tokenizers library is imported.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main() -> None:
    arguments = parse()
    if arguments.side is not None:
        print(json.dumps(run_trl(json.loads(arguments.side.read_text(encoding="utf-8")))))
        return
    texts, result = run_mergeopd(arguments)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.json")
        folders = [str(side / "tokenizer.json") for side in (arguments.student, arguments.teacher)]
        job.write_text(json.dumps({"texts": texts, "files": folders, "repeats": arguments.repeats}))
        result |= ask_trl(arguments.trl_python, job)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--text", type=Path, help="UTF-8; default: a short sample of languages and code")
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per response, of the student")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trl-python", default=sys.executable, help="the interpreter that has trl")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is None and not all(
        (side / "tokenizer.json").is_file() for side in (arguments.student, arguments.teacher)
    ):
        parser.error("STUDENT and TEACHER must be folders with a tokenizer.json")
    return arguments


def run_mergeopd(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Return the texts of the responses, and the time to align them."""
    import numpy as np
    import tokenizers

    from mergeopd.align.encoding import ByteTokenizer
    from mergeopd.align.groups import Ends, close_groups
    from mergeopd.align.responses import EndTokens, align
    from mergeopd.align.sides import Side
    from mergeopd.inspection.tokenizers import SAMPLE

    own, other = (
        ByteTokenizer.of(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), str(folder))
        for folder in (arguments.student, arguments.teacher)
    )
    content = SAMPLE if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    answers = write_answers(content, arguments, own)
    ends = EndTokens((), 0)
    readings = align(answers, own.tokens, other.tokens, other.encode, ends)
    texts = [
        b"".join(own.tokens.pieces[i] for i in ids)
        .decode(errors="ignore")
        .removeprefix(" " * own.tokens.strip)
        for ids in answers
    ]
    encoded = dict(zip(texts, other.encode(texts), strict=True))
    none = [False] * len(answers)
    sides = Side.of(answers, none, own.tokens), Side.of([encoded[t] for t in texts], none, other.tokens)
    places = [Ends(side.ends, side.rows) for side in sides]
    limits = np.diff(np.array(sides[0].byte_rows))
    works: dict[str, Callable[[], object]] = {
        "groups": lambda: close_groups(places[0], places[1], limits),
        "without_encoding": lambda: align(
            answers, own.tokens, other.tokens, lambda asked: [encoded[text] for text in asked], ends
        ),
        "whole": lambda: align(answers, own.tokens, other.tokens, other.encode, ends),
    }
    num_tokens = sum(map(len, answers))
    result: dict[str, Any] = {
        "num_answers": len(answers),
        "num_student_tokens": num_tokens,
        "num_teacher_tokens": sum(len(alignment.teacher_ids) for alignment in readings),
        "num_groups": sum(len(alignment.student_starts) for alignment in readings),
    }
    for name, seconds in timed(works, arguments.repeats).items():
        result[f"mergeopd_{name}"] = num_tokens / seconds / 1e6
    return texts, result


def write_answers(content: str, arguments: argparse.Namespace, own: Any) -> list[list[int]]:
    """Return responses of one length and different texts."""
    generator = random.Random(0)
    lines = content.splitlines(keepends=True)
    answers: list[list[int]] = []
    for _ in range(arguments.answers):
        generator.shuffle(lines)
        text = "".join(lines[:200])
        ids = list(own.encode([text])[0])
        answers.append((ids * (arguments.tokens // max(1, len(ids)) + 1))[: arguments.tokens])
    return answers


def timed(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return median CPU seconds of each, interleaved, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}


def ask_trl(python: str, job: Path) -> dict[str, Any]:
    """Return the time of TRL's aligner on the same texts, or why it was skipped."""
    command = [python, __file__, "--side", str(job), ".", "."]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"trl_skipped": f"{why}; pip install 'trl==1.16.*', or name its python with --trl-python"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's steps: offsets of both texts' tokens, then a walk over them."""
    import tokenizers
    from trl.experimental.gold.gold_trainer import (  # type: ignore[import-not-found, unused-ignore]
        ULDLoss,
        encode_with_byte_offsets,
    )

    backends = [tokenizers.Tokenizer.from_file(file) for file in job["files"]]
    texts = job["texts"]

    def offsets() -> list[list[Any]]:
        return [[o for _, o in encode_with_byte_offsets(backend, texts)] for backend in backends]

    def walk(pairs: list[list[Any]]) -> list[Any]:
        return [ULDLoss._align_by_byte_offsets(*pair) for pair in zip(*pairs, strict=True)]

    known = offsets()
    works: dict[str, Callable[[], object]] = {
        "groups": lambda: walk(known),
        "whole": lambda: walk(offsets()),
    }
    num_tokens = sum(map(len, known[0]))
    result: dict[str, Any] = {"trl_num_groups": sum(len(groups[0]) for groups in walk(known))}
    for name, seconds in timed(works, job["repeats"]).items():
        result[f"trl_{name}"] = num_tokens / seconds / 1e6
    return result


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{result['num_answers']} responses, {result['num_student_tokens']:,} tokens of the student, "
        f"{result['num_teacher_tokens']:,} of the teacher, {result['num_groups']:,} groups"
    )
    table = Table(title="million student tokens per second and core", title_justify="left")
    for column in ("", "mergeopd", "TRL", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("groups", "without_encoding", "whole"):
        ours, theirs = result[f"mergeopd_{name}"], result.get(f"trl_{name}")
        cells = ("-", "-") if theirs is None else (f"{theirs:.2f}", f"{ours / theirs:.1f}")
        table.add_row(name.replace("_", " "), f"{ours:.2f}", *cells)
    console.print(table)
    if "trl_skipped" in result:
        console.print(f"Without TRL: {result['trl_skipped']}")


if __name__ == "__main__":
    main()
