# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How many hours does pretraining by each recipe take? Builds the table of docs/pretraining-cost.md.

    python scripts/build_pretraining_cost.py          # writes the table
    python scripts/build_pretraining_cost.py --check  # writes nothing; status 1 if the page has another one

Epochs are the recipes'. Images per second are of results/gpu.json, which `make gpu` writes on a machine with a GPU: of
each network the fastest way in which it was trained. Until then the table says "not measured".
"""

import argparse
import json
from pathlib import Path

import yaml

from vitae_hf import PRESETS
from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import RECIPES, write_text


REPOSITORY = Path(__file__).parents[1]
BEGIN, END = "<!-- built by scripts/build_pretraining_cost.py -->", "<!-- end of what is built -->"
IMAGES = 1_281_167
"""Training images of ImageNet-1k."""
GPUS = 8
HEADER = ["recipe", "epochs", "million images", "images/s of a GPU", "hours of a GPU", f"hours of {GPUS} GPUs"]


def recipes() -> dict[str, dict]:
    """The recipes that train a classifier from scratch. Those of B, L and H name no preset: they fine-tune."""
    paths = {name: RECIPES / f"{name}.yaml" for name in PRESETS}
    found = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    return {name: recipe for name, recipe in found.items() if "preset" in recipe}


def fastest_rows(measured: dict) -> dict[str, dict]:
    """By network, the row of training with the most images per second; rows without such a figure do not count."""
    parts = [measured.get("parts", {}).get(name, {}) for name in ("training", "training_compiled")]
    rows = [row for part in parts for row in part.get("rows", []) if row.get("images_per_s")]
    return {row["network"]: row for row in sorted(rows, key=lambda row: row["images_per_s"])}


def line(name: str, recipe: dict, row: dict | None) -> list[str]:
    """The cells of a recipe."""
    images = recipe["num_train_epochs"] * IMAGES
    cells = [f"`{name}`", str(recipe["num_train_epochs"]), f"{images / 1e6:.0f}"]
    if row is None:
        return cells + ["not measured"] * 3
    hours = images / row["images_per_s"] / 3600
    how = " (compiled)" if row["compiled"] else ""
    return [*cells, f"{row['images_per_s']:,.0f}{how}", f"{hours:,.0f}", f"{hours / GPUS:,.1f}"]


def table(measured: dict) -> str:
    """The table, and where its speeds were measured."""
    rows = fastest_rows(measured)
    cells = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1)]
    cells += [line(name, recipe, rows.get(recipe["preset"])) for name, recipe in recipes().items()]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    source = ", ".join(str(measured[name]) for name in ("device", "torch", "date", "commit") if measured.get(name))
    return "\n".join([*lines, "", f"Speeds: {source or 'not measured yet'}."])


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=REPOSITORY / "results" / "gpu.json")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "pretraining-cost.md")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args(argv)
    measured = json.loads(arguments.measured.read_text(encoding="utf-8")) if arguments.measured.exists() else {}
    page = arguments.page.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise ValueError(f"{arguments.page} has no lines {BEGIN!r} and {END!r}, between which the table goes")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    built = f"{before}{BEGIN}\n{table(measured)}\n{END}{after}"
    if arguments.check and built != page:
        parser.exit(1, f"error: {arguments.page} is not as built; run this without --check\n")
    if built != page:
        write_text(built, arguments.page)
    networks = sorted(fastest_rows(measured))
    return {"page": str(arguments.page), "changed": built != page, "measured": networks, **environment()}


if __name__ == "__main__":
    run_command(main)
