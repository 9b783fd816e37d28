# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Do the model cards of the authors' variants say what is known? Builds them from one source of figures.

    python scripts/build_model_cards.py          # writes model_cards/vitae-*.md
    python scripts/build_model_cards.py --check  # writes nothing; status 1 if a card there is another one

The package has the figures, in `hub/variants.py`, `hub/parity_cpu.json` and the recipes, and the text, in
`hub/templates/`.
"""

import argparse
from pathlib import Path

from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.hub.cards import remote_sensing_card, variant_card
from vitae_hf.hub.variants import REMOTE_SENSING, VARIANTS


REPOSITORY = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "model_cards", help="folder of the cards")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args(argv)
    built = {preset: variant_card(preset) for preset in VARIANTS}
    built |= {name: remote_sensing_card(name) for name in REMOTE_SENSING}
    cards = {arguments.output / f"{name}.md": str(card) for name, card in built.items()}
    stale = [path for path, card in cards.items() if not path.is_file() or path.read_text(encoding="utf-8") != card]
    if arguments.check and stale:
        parser.exit(1, f"error: not as built: {', '.join(map(str, stale))}; run this without --check\n")
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cards[path], encoding="utf-8")
    return {"output": str(arguments.output), "cards": len(cards), "changed": len(stale), **environment()}


if __name__ == "__main__":
    run_command(main)
