"""Measure recipes/methods/forgetting_repair.yaml: facts and the old skill, stage by stage.

    python tools/repair_bench.py EXPERTS OUT [--seeds 0 1 2] [--set KEY=VALUE ...]

EXPERTS is a folder with `quickstart-SEED` folders of tools/make_tiny_experts.py, as tools/merge_bench.py makes them.
The students after the first phases are those of runs whose later phases have a learning rate of 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergeopd import api

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "recipes/methods/data/facts.jsonl"
STAGES = {"learn": 1, "repair": 2, "end": 6}
"""Number of phases by stage."""


@torch.no_grad()
def facts_known(folder: Path) -> float:
    """Percentage of the documents whose last three words follow, greedily, from the others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    right = 0
    rows = [json.loads(line)["text"] for line in FACTS.read_text().splitlines()]
    for text in rows:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        written = model.generate(torch.tensor([ids[:-3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        right += written[0].tolist() == ids
    return 100 * right / len(rows)


def student_of(project: Path, seed: int, name: str, *settings: str) -> tuple[float, float, float]:
    """Run the recipe; return the facts known, and the skill's accuracy of the student and of the base."""
    out = project / "runs" / name
    recipe = project / "recipes/methods/forgetting_repair.yaml"
    result = api.run(recipe, set=[f"seed={seed}", "threads=1", f"output={out}", *settings])
    accuracy = result.accuracies["reverse"]
    assert result.export is not None
    skill, base = accuracy["merged"], accuracy["base"]
    assert skill is not None
    assert base is not None
    return facts_known(result.export), 100 * skill, 100 * base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        project = (options.out / str(seed)).resolve()
        shutil.rmtree(project, ignore_errors=True)
        shutil.copytree(ROOT / "recipes", project / "recipes")
        experts = (options.experts / f"quickstart-{seed}").resolve()
        (project / "experts").symlink_to(experts)
        rows = {}
        for stage, phases in STAGES.items():
            off = [f"phases.{i}.{key}" for i in range(phases, 6) for key in ("updates=1", "lr_scale=0.0")]
            known, skill, base = student_of(project, seed, stage, *off, *options.settings)
            rows |= {"start": (facts_known(experts / "base"), base), stage: (known, skill)}
        for stage, (known, skill) in rows.items():
            print(f"seed {seed}  {stage:6}  facts {known:5.1f} %  skill {skill:5.1f} %", flush=True)


if __name__ == "__main__":
    main()
