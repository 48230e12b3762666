"""Check and run a recipe from Python, follow it, and read its results.

Usage: python examples/run_recipe.py recipes/quickstart.yaml [OUTPUT]
"""

import sys

import mergeopd
from mergeopd.reporting.events import Event, UpdateDone

recipe = sys.argv[1]
changes: dict[str, object] = {"phases[0].updates": 2}
if len(sys.argv) > 2:
    changes["output"] = sys.argv[2]

checked = mergeopd.check(recipe, set=changes)  # raises RecipeError with every mistake
print(f"{recipe}: {checked}")
for note in checked.notes:
    print("note:", note)


def show(event: Event) -> None:
    if isinstance(event, UpdateDone):
        print(f"update {event.update}: loss {event.loss:.4f}")


first = mergeopd.run(recipe, set=changes, updates=1, on_event=show)
print(f"{first.num_updates} of {first.planned_updates} updates; the next call resumes the run")
result = mergeopd.run(recipe, set=changes, on_event=show)

print("student:", result.export)
for domain, accuracies in result.accuracies.items():
    print(domain, {model: value for model, value in accuracies.items() if value is not None})
table = result.to_arrow()  # or result.to_pandas()
print(table.select(["update", "loss", "grad_norm"]).to_pydict())
