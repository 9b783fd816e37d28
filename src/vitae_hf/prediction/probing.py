# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How well simple classifiers do on embeddings: k nearest neighbours and logistic regression, cross-validated."""

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from pyarrow import parquet
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from ..evaluation.metrics import confusion_matrix
from ..evaluation.scores import class_figures
from ..failures import about
from ..messages import listed
from .embeddings import read_blocks


FOLDS, INNER_FOLDS = 5, 3
"""Pictures are predicted by a classifier that four fifths of the others made, whose k or C thirds of these chose."""
NEIGHBOURS = (1, 3, 5, 10, 20)
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)


class LabelledEmbeddings(NamedTuple):
    """The rows of a folder that have both, and how many have not.

    Attributes:
        embeddings (`np.ndarray` of shape `(N, C)`), labels (`list[str]` of length N).
        unreadable (`int`): pictures without an embedding.
        unlabelled (`list[str]`): paths of embeddings without a label.
        unmatched (`list[str]`): paths with a label that the folder does not have.
    """

    embeddings: np.ndarray
    labels: list[str]
    unreadable: int
    unlabelled: list[str]
    unmatched: list[str]


def folder_label(path: str) -> str | None:
    """The name of the folder that a picture lies in; none for a picture that lies in a shard or in no folder."""
    folder = PurePath(path).parent
    return None if folder.suffix in (".parquet", ".tar") else folder.name or None


def read_labels(file: str | Path) -> dict[str, str]:
    """Label by path, from a CSV or parquet file with these two columns. Rows without a label are left out.

    Raises:
        ValueError: the file is neither, lacks a column, or gives a path two labels.
        OSError: it cannot be read.
    """
    with about(str(file)):
        rows = _read_rows(Path(file))
    labels: dict[str, str] = {}
    for path, label in rows:
        if labels.setdefault(path, label) != label:
            raise ValueError(f"{file} gives {path} two labels, {labels[path]!r} and {label!r}")
    return labels


def _read_rows(file: Path) -> list[tuple[str, str]]:
    rows: list[dict[str, Any]]
    if file.suffix.lower() == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            try:
                _check_columns(file, table.fieldnames or [])
                rows = list(table)
            except csv.Error as error:  # which is no ValueError
                raise ValueError(f"{file} cannot be read behind line {table.line_num}: {error}") from error
    elif file.suffix.lower() == ".parquet":
        _check_columns(file, parquet.read_schema(file).names)
        rows = parquet.read_table(file, columns=["path", "label"]).to_pylist()
    else:
        raise ValueError(f"--labels takes a .csv or .parquet file, or the word folders; got {file}")
    return [(row["path"], str(row["label"])) for row in rows if row["label"] not in (None, "")]


def _check_columns(file: str | Path, columns: Iterable[str]) -> None:
    if not {"path", "label"} <= set(columns):
        raise ValueError(f"{file} must have the columns path and label; it has {listed(columns)}")


def join_labels(folder: str | Path, labels: dict[str, str] | None) -> LabelledEmbeddings:
    """The embeddings of a folder and their labels, in memory.

    Args:
        labels: by path; default: [`folder_label`].

    Raises:
        ValueError: see [`read_blocks`], or no picture has both.
    """
    embeddings, found, unlabelled, seen, unreadable = [], [], [], set(), 0
    for block in read_blocks(folder):
        paths = block.paths.to_pylist()
        own = [folder_label(path) if labels is None else labels.get(path) for path in paths]
        has_label = np.array([label is not None for label in own], bool)
        embeddings.append(block.embeddings[has_label])
        found += [label for label in own if label is not None]
        unlabelled += [path for path, label in zip(paths, own) if label is None]
        seen.update(paths)
        unreadable += block.left_out
    unmatched = sorted(set(labels or ()) - seen)
    if not found:
        example = f": it has paths such as {unlabelled[0]}" if unlabelled else ""
        other = f", the labels such as {unmatched[0]}" if unmatched else ""
        raise ValueError(f"no picture of {folder} has an embedding and a label{example}{other}")
    return LabelledEmbeddings(np.concatenate(embeddings), found, unreadable, unlabelled, unmatched)


def check_classes(labels: list[str]) -> None:
    """Raise an error unless every class has enough pictures for every fold to have one.

    Raises:
        ValueError: there is one class, or classes have too few pictures; the message names them.
    """
    counts = Counter(labels)
    if len(counts) == 1:
        raise ValueError(f"all {len(labels)} pictures have the label {labels[0]!r}: a probe takes two classes or more")
    if few := [f"{name!r} ({count})" for name, count in sorted(counts.items()) if count < FOLDS]:
        raise ValueError(
            f"each class must have at least {FOLDS} pictures, one for each fold; fewer have {listed(few)}: take these"
            " classes out of the labels, or find more pictures"
        )


def probe(embeddings: np.ndarray, labels: list[str], seed: int = 0) -> dict[str, Any]:
    """Cross-validate both classifiers.

    k and C are chosen by a cross-validation within the pictures that a fold trains on, so that the accuracy is that of
    pictures which had no say in the choice. The folds have equal shares of every class.

    Args:
        embeddings: `(N, C)`.
        labels: of length N.
        seed: of the folds.

    Returns:
        For each classifier its accuracy in percent, the standard deviation over folds, those of the folds, and what
        each fold chose. Then the figures of the better one: its name as `best`, and what a picture of confusions draws.

    Raises:
        ValueError: see [`check_classes`].
    """
    check_classes(labels)
    names, classes = np.unique(labels, return_inverse=True)
    smallest = len(labels) * (FOLDS - 1) * (INNER_FOLDS - 1) // (FOLDS * INNER_FOLDS)
    knn = KNeighborsClassifier(metric="cosine")
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grids = {
        "nearest_neighbours": (knn, "n_neighbors", [k for k in NEIGHBOURS if k <= max(smallest, 1)]),
        "logistic_regression": (regression, "logisticregression__C", INVERSE_PENALTIES),
    }
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    figures, predictions = {}, {}
    with tqdm(total=FOLDS * len(grids), desc="probes", unit=" folds") as progress:
        for name, (classifier, setting, values) in grids.items():
            inner = StratifiedKFold(INNER_FOLDS, shuffle=True, random_state=seed)
            search = GridSearchCV(classifier, {setting: values}, cv=inner)
            figures[name], predictions[name] = _cross_validate(search, embeddings, classes, folds, progress)
    best = max(figures, key=lambda name: figures[name]["accuracy_percent"])
    matrix = confusion_matrix(classes, predictions[best], len(names))
    top1 = float(100 * np.mean(predictions[best] == classes))
    return {
        **figures,
        "best": best,
        "images": len(labels),
        "top1_percent": top1,
        **class_figures(matrix, names.tolist()),
    }


def _cross_validate(
    search: GridSearchCV, embeddings: np.ndarray, classes: np.ndarray, folds: StratifiedKFold, progress: tqdm
) -> tuple[dict[str, Any], np.ndarray]:
    predictions, accuracies, chosen = np.empty_like(classes), [], []
    for train, test in folds.split(embeddings, classes):
        search.fit(embeddings[train], classes[train])
        predictions[test] = search.predict(embeddings[test])
        accuracies.append(float(100 * np.mean(predictions[test] == classes[test])))
        chosen += search.best_params_.values()
        progress.update()
    figures = {
        "accuracy_percent": float(np.mean(accuracies)),
        "std_percent": float(np.std(accuracies)),
        "folds_percent": accuracies,
        "chosen": chosen,
    }
    return figures, predictions
