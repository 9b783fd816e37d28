# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How much do a model's features know of classes that it was not trained for?

    vitae predict pictures --model vitae-nano-fashion --embeddings float16 --output outputs/features
    vitae probe outputs/features --labels folders
    vitae probe outputs/features --labels labels.csv       # with the columns path and label; .parquet works too

Fits k nearest neighbours (by the cosine) and logistic regression (on standardised features) to the embeddings, and
predicts each picture by a classifier that has not seen it: five folds with equal shares of every class. k and the
penalty are chosen within the training pictures of each fold. `path` in the file is as in the parts that `vitae predict`
wrote; pictures without a label are left out and counted. Writes `probe.json` and `probe_confusion.png`, the confusions
of the better classifier.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import sklearn

from ..environment import environment
from ..evaluation.scores import as_json, draw_confusion
from ..files import write_text
from ..messages import listed
from ..prediction.embeddings import read_record
from ..prediction.probing import LabelledEmbeddings, join_labels, probe, read_labels
from . import command_parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae probe", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `vitae predict --embeddings` wrote")
    parser.add_argument(
        "--labels", required=True, help="a .csv or .parquet file with path and label, or the word folders"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the folds; default: 0")
    parser.add_argument("--output", type=Path, help="folder to write; default: DIR")
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        arguments.output = arguments.folder
    return arguments


def warn(data: LabelledEmbeddings) -> None:
    """Say which pictures and which labels are left out."""
    for paths, what in (
        (data.unlabelled, "pictures have no label"),
        (data.unmatched, "labels are of paths without an embedding"),
    ):
        if paths:
            print(f"warning: {len(paths)} {what} and are left out: {listed(paths)}", file=sys.stderr)
    if data.unreadable:
        print(f"warning: {data.unreadable} pictures could not be read and are left out", file=sys.stderr)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    model = read_record(arguments.folder).get("model")
    data = join_labels(arguments.folder, None if arguments.labels == "folders" else read_labels(arguments.labels))
    warn(data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures = probe(data.embeddings, data.labels, arguments.seed)
    circumstances = {
        "folder": str(arguments.folder),
        "labels": arguments.labels,
        "model": model,
        "features": data.embeddings.shape[1],
        "unreadable": data.unreadable,
        "unlabelled": len(data.unlabelled),
        "unmatched": len(data.unmatched),
        "seed": arguments.seed,
        "scikit-learn": sklearn.__version__,
        **environment(),
    }
    write_text(as_json({**circumstances, **figures}), arguments.output / "probe.json")
    draw_confusion(figures).savefig(arguments.output / "probe_confusion.png", dpi=150)
    shown = {
        f"{name}_{figure}": round(figures[name][figure], 2)
        for name in ("nearest_neighbours", "logistic_regression")
        for figure in ("accuracy_percent", "std_percent")
    }
    counts = {"images": figures["images"], "classes": len(figures["per_class"])}
    return {"output": str(arguments.output), **counts, **shown, **circumstances}
