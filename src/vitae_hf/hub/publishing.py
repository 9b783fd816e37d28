# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""From a folder to a Hub repository: check it, upload what belongs to the model, load the model back and compare."""

import json
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from transformers.dynamic_module_utils import get_relative_imports

from .. import configuration_vitae
from ..failures import first_line
from ..loading import example_pictures, load_trained
from ..messages import listed, printable
from ..model_folders import not_finite
from ..modeling_vitae import ViTAEForPreTraining
from .checksums import SUMS_NAME, header_problem, sha256, verify_checkpoint, write_sums


# The files of a folder that belong to a model, beside its code. Nothing else is uploaded: no checkpoints, optimizer
# state or logs, and not `training_args.bin`, which is a pickle.
BELONGS = [
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "LICENSE*",
    "*_results.json",
    "*.png",
    SUMS_NAME,
]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SAVE_AGAIN = (
    "load it with its class of vitae_hf, a head of the library with that of vitae_hf.heads_vitae, and save it again"
    " with save_pretrained"
)
PICKLED_WEIGHTS = ["*model*.bin", "*model*.pt", "*model*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack"]


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def code_files(folder: Path) -> list[str]:
    """Names of the code files that the folder's `auto_map`s ask for, and of those that these import."""
    names = []
    for path in (folder / "config.json", folder / "preprocessor_config.json"):
        for references in json.loads(path.read_text(encoding="utf-8")).get("auto_map", {}).values():
            for reference in references.values() if isinstance(references, dict) else [references]:
                names.append(reference.split("--")[-1].split(".")[0] + ".py")
    for name in names:  # the list grows while it is gone through
        if (folder / name).is_file():
            names += {f"{module}.py" for module in get_relative_imports(folder / name)} - set(names)
    return sorted(set(names))


@torch.no_grad()
def compute_outputs(source: str | Path, image: Any, **options: Any) -> torch.Tensor:
    """The logits for an image, or what a network without any gives, as users of `source` get them.

    Args:
        image: as the image processor takes it; `None`: the first of [`example_pictures`].
        options: for `from_pretrained`: `revision`, `cache_dir`, `token`.

    Returns:
        `(1, classes)`, `(1, hidden size)`, or, one row, all values of a backbone's maps, of an encoder's tokens, of a
        reconstruction, of a detector's boxes or classes, of the logits of all pixels, or of a map of depth.

    Raises:
        ValueError: the weights lack tensors of the network, or hold values that are not finite.
    """
    model, processor = load_trained(source, dtype="auto", headless=True, dense=True, **options)
    if names := not_finite(model):
        raise ValueError(f"not all values of {source} are finite: {listed(names)}")
    picture = example_pictures(processor)[0] if image is None else image
    picture = str(picture) if isinstance(picture, Path) else picture
    pixel_values = processor(picture, return_tensors="pt").pixel_values.to(model.dtype)
    if isinstance(model, ViTAEForPreTraining):
        return model.encode(pixel_values).flatten(1)
    outputs = model(pixel_values)
    if "feature_maps" in outputs:
        return torch.cat([feature_map.flatten(1) for feature_map in outputs.feature_maps], dim=1)
    for name in ("pred_boxes", "class_queries_logits", "reconstruction", "predicted_depth"):
        if name in outputs:
            return outputs[name].flatten(1)
    return outputs.logits.flatten(1) if "logits" in outputs else outputs.pooler_output


def find_files(folder: Path) -> list[Path]:
    """The files of a folder that are uploaded.

    A folder with averaged weights in `ema/` is refused. They are a model of their own, the one that the card and the
    results of the training are about; uploaded beside the others, they would be a second model that nobody can load.

    Raises:
        ValueError: a file is missing, weights are in a format that can run code, or there are averaged weights.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if (folder / "ema").is_dir():
        raise ValueError(
            f"{folder} holds averaged weights, which its card describes, in a folder of their own: publish"
            f" {folder / 'ema'}, or move that folder away to publish the others"
        )
    for name in ("config.json", "preprocessor_config.json", "README.md"):
        if not (folder / name).is_file():
            what = "a model card" if name == "README.md" else "save_pretrained writes it"
            raise ValueError(f"{folder} lacks {name} ({what})")
    present = sorted(path for path in folder.iterdir() if path.is_file())
    if pickled := [path.name for path in present if matches(path.name, PICKLED_WEIGHTS)]:
        raise ValueError(f"{folder} holds {pickled[0]}, a format that can run code: only safetensors are published")
    if not any(path.suffix == ".safetensors" for path in present):
        raise ValueError(f"{folder} holds no weights: no file ends in .safetensors")
    code = code_files(folder)
    return [path for path in present if matches(path.name, BELONGS) or path.name in code]


def check_code(folder: Path) -> None:
    """Compare the folder's code files with those of this package.

    Raises:
        ValueError: one is missing or different; the message names it.
    """
    code = code_files(folder)
    if not code:
        raise ValueError(f"{folder} names no code in its `auto_map`: {SAVE_AGAIN}")
    for name in code:
        ours, theirs = Path(configuration_vitae.__file__).with_name(name), folder / name
        if not ours.is_file() or not theirs.is_file() or ours.read_bytes() != theirs.read_bytes():
            problem = "differs from this package's" if theirs.is_file() else "is missing"
            raise ValueError(f"{theirs} {problem}: {SAVE_AGAIN}")


def check_folder(folder: Path, image: Any) -> tuple[list[Path], torch.Tensor]:
    """See that a folder can be published.

    Returns:
        The files to upload, and the outputs of the model for the image.

    Raises:
        ValueError: it cannot; the message names the file and says why.
    """
    files = find_files(folder)
    check_code(folder)
    try:
        ModelCard.load(folder / "README.md").data.to_yaml()
    except Exception as error:  # the parser of YAML raises errors of its own
        raise ValueError(f"{folder / 'README.md'} has no valid metadata ({first_line(error)})") from error
    for path in files:
        if path.suffix == ".safetensors" and (problem := header_problem(path)):
            raise ValueError(f"{path} is damaged ({problem})")
    outputs = compute_outputs(folder, image)
    if not outputs.isfinite().all():
        raise ValueError(f"{folder} gives logits that are not finite for {image}")
    return files, outputs


def upload(
    api: HfApi,
    files: list[Path],
    repo_id: str,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
) -> tuple[str, CommitInfo, bool]:
    """Make a repository hold these files, in one commit; in none if it holds them already.

    The same commit deletes weights that lie in the repository and are not among the files: they could be loaded in the
    place of the new ones.

    Returns:
        The repository's full name, the commit that has the files, and whether it is new.

    Raises:
        OSError, httpx.HTTPError or RuntimeError: the Hub failed. Either nothing was changed, or everything was and the
            answer was lost; it is always right to try again.
        ValueError: the repository is to be private, exists, and is public.
    """
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists already and is public; nothing was uploaded")
    if revision not in (None, constants.DEFAULT_REVISION):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=revision)
    names = {path.name for path in files}
    stale = [file.rfilename for file in before.siblings or [] if matches(file.rfilename, WEIGHTS)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [CommitOperationDelete(name) for name in stale if "/" not in name and name not in names]
    operations += [CommitOperationAdd(path.name, path) for path in files]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message="Upload a ViTAE model",
        revision=revision,
        create_pr=create_pr,
        parent_commit=before.sha,
    )
    return repo_id, commit, commit.oid != before.sha


def check_published(
    repo_id: str, commit: str, files: list[Path], image: Any, outputs: torch.Tensor, token: str | None = None
) -> None:
    """Download a commit by name into an empty cache, and compare its files, and the outputs of the model for the image.

    Raises:
        ValueError: something differs; the message names it.
        OSError or httpx.HTTPError: the download failed.
    """
    with tempfile.TemporaryDirectory() as cache:
        source = {"revision": commit, "cache_dir": cache, "token": token}
        report = verify_checkpoint(repo_id, **source)
        problems, downloaded = report["problems"], Path(report["folder"])
        for path in files:
            copy = downloaded / path.name
            if path.name not in problems and not (copy.is_file() and sha256(copy) == sha256(path)):
                problems[path.name] = ["not the file that was uploaded"]
        if problems:
            raise ValueError(
                f"uploaded, but what comes back from {repo_id} is damaged ({in_words(problems)}); run it again to see"
                " whether the Hub or the download was at fault"
            )
        again = compute_outputs(repo_id, image, **source)
    if not torch.equal(outputs, again):
        raise ValueError(f"uploaded, but {repo_id} gives other logits than the folder")


def list_files(files: list[Path], folder: Path) -> int:
    """Print names and sizes of what is uploaded, and names of what is not.

    Returns:
        The sum of the sizes, in bytes.
    """
    sizes = {path.name: path.stat().st_size for path in files}
    for name, size in sizes.items():
        print(f"{size:>15,}  {printable(name)}")
    print(f"{sum(sizes.values()):>15,}  bytes in {len(files)} files")
    if others := sorted(path.name for path in folder.iterdir() if path.name not in sizes):
        print("not uploaded:", ", ".join(map(printable, others)))
    return sum(sizes.values())


def publish(
    folder: Path,
    repo_id: str,
    image: Any = None,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> dict[str, Any]:
    """Check a folder, print what is uploaded, upload it, load it by name and compare.

    Args:
        folder: what `save_pretrained` wrote, with a model card; a `SHA256SUMS` is added to it.
        repo_id: organisation or user, and name.
        image: what the model is tried on, before and after, as its image processor takes it; default: a picture of the
            package, or noise for other numbers of channels.
        private: whether a new repository is private.
        create_pr: propose the files as a pull request.
        revision: branch, made if need be; default: `main`.
        dry_run: stop before anything is written or sent.
        token: default: the one that is logged in.

    Returns:
        A record of what was uploaded: repository, number and bytes of the files, the commit, whether it is new, and the
        pull request.

    Raises:
        ValueError, OSError, httpx.HTTPError, RuntimeError: as [`check_folder`], [`upload`] and [`check_published`] say.
    """
    files, outputs = check_folder(folder, image)
    record = {"repo_id": repo_id, "files": len(files), "uploaded": False}
    if dry_run:
        return {**record, "bytes": list_files(files, folder)}
    files = write_sums(folder, files)
    record |= {"files": len(files), "bytes": list_files(files, folder)}
    repo_id, commit, is_new = upload(HfApi(token=token), files, repo_id, private, create_pr, revision)
    check_published(repo_id, commit.oid, files, image, outputs, token)
    found = {"repo_id": repo_id, "uploaded": is_new, "hub_commit": commit.oid, "pull_request": commit.pr_url}
    return {**record, **found, "same_logits": True}


def in_words(problems: dict[str, list[str]]) -> str:
    """The `problems` of [`verify_checkpoint`] in one line."""
    return listed((f"{printable(name)}: {', '.join(found)}" for name, found in problems.items()), "; ")
