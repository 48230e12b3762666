"""Parts of hand-made run folders, and the parsed page of a report."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from mergeopd.reporting.events import RolloutSampled, TeacherTrace

EVIL = "</script><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"


def update_line(update: int, phase: str = "merge") -> dict[str, Any]:
    return {
        "update": update,
        "phase": phase,
        "round": update,
        "lr": 1e-3 / update,
        "loss": 1 / 3 + update,
        "grad_norm": None if update == 2 else 0.1 * update,
        "clip_factor": 1.0,
        "num_tokens": 100 * update,
        "on_policy_fraction": 0.25 * (update % 3),
        "teachers": {
            "math": {
                "num_tokens": 7,
                "reverse_kl": 0.1 / update,
                "logprob_gap_student": -0.3,
                "entropy_T": 0.7,
            }
        },
        "domains": {
            domain: {
                "num_rollouts": 4,
                "num_tokens": 7,
                "mean_length": 2.5 + update,
                "token_share": share,
                "weight": 1.0,
                "loss_share": share,
                "nll": 0.1 + 0.2,
                "entropy_S": 1 / 7,
                "reward": None,
                "truncated_fraction": 0.0,
            }
            for domain, share in (("math", 1 / 3), ("code", 2 / 3))
        },
        "policy": {},
        "verifier_failures": {},
        "cost": {
            "seconds": {"rollout": 1.5, "update": 0.5},
            "tokens_per_s": 50.0 * update,
            "teacher_bytes_read": 0,
        },
    }


def sample(**changes: Any) -> RolloutSampled:
    values: dict[str, Any] = {
        "update": 1,
        "phase": "merge",
        "domain": "math",
        "key": "math:0",
        "prompt": "1 + 1?",
        "tokens": ("It", " is", "", "é", "<end>"),
        "logprob_S": (-0.5, -1.0, -1.5, -2.0, -0.1),
        "divergence": "reverse_kl",
        "teachers": {
            "math": TeacherTrace((0.0, 0.25, 1.0, 9.0, 5.0), (-0.1, -0.2, -0.3, -0.4, -9.0), masked=(4,))
        },
        "reward": 1.0,
        "origin": "student",
        "finish": "eos",
        **changes,
    }
    return RolloutSampled(**values)


PLAN = """mergeopd: 0.1.0
format: 1
started: '2026-01-02T03:04:05'
hash: abc
versions: {python: 3.11.9}
plan:
  name: two-experts
  student: {model: /models/base, dtype: float32}
  teachers:
    math: {name: math, model: /models/math, dtype: bfloat16}
  phases:
  - {name: merge, updates: 3, text: student, loss: {reverse_kl: 1.0, nll: 0.5, jsd: null, temperature: 1.0}}
  evaluation: {experts: {math: math}}
files: {}
"""


class Page(HTMLParser):
    """Elements with their attributes, and their texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]
