"""Streamed shards: each row once, whatever the processes and workers; the same rows as in memory; resumed exactly."""

import io
import json
import multiprocessing
import tarfile
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import SHARD_SIZES, png, pyramid_config, write_parquet
from torch.utils.data import DataLoader

from vitae_hf import ViTAEForImageClassification
from vitae_hf.data.samples import ImageDataset, collate
from vitae_hf.data.shards import StreamedImageDataset, find_shards
from vitae_hf.data.sources import load_labelled_images
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.trainer import ViTAETrainer


def write_tars(folder, as_text: bool = False):
    index = 0
    for shard, size in enumerate(SHARD_SIZES):
        with tarfile.open(folder / f"train-{shard:04}.tar", "w") as archive:
            for _ in range(size):
                label = "abcde"[index % 5] if as_text else str(index % 5)
                for ending, content in (("PNG", png(index)), ("cls", f"{label}\n".encode())):
                    member = tarfile.TarInfo(f"{index:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                index += 1
            member = tarfile.TarInfo("README")  # without an ending it is no part of a sample
            member.size = 2
            archive.addfile(member, io.BytesIO(b"hi"))


@pytest.fixture(params=[write_parquet, write_tars], ids=["parquet", "tar"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    request.param(tmp_path / "data")
    return str(tmp_path / "data")


def grey(picture: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def loader(shards, workers=0, **options) -> DataLoader:
    dataset = StreamedImageDataset(shards, grey, **{"batch_size": 4, "shuffle_buffer": 6, **options})
    return DataLoader(dataset, dataset.batch_size, collate_fn=collate, num_workers=workers)


def rows(batches) -> list[int]:
    return [int(pixels[0, 0, 0]) // 5 for batch in batches for pixels in batch["pixel_values"]]


@pytest.mark.parametrize(
    "world_size, workers", [(1, 0), (1, 3), (2, 1), (4, 0), pytest.param(4, 3, marks=pytest.mark.slow)]
)
def test_each_row_is_seen_once_in_an_epoch_by_any_processes_and_workers(folder, world_size, workers):
    shards = find_shards(folder)
    assert shards.rows == SHARD_SIZES
    epochs = []
    for epoch in range(2):
        seen = []
        for rank in range(world_size):
            stream = loader(shards, workers, rank=rank, world_size=world_size)
            stream.dataset.set_epoch(epoch)
            batches = list(stream)
            assert len(batches) == len(stream) == -(-40 // world_size // 4)
            labels = [label for batch in batches for label in batch["labels"].tolist()]
            assert labels == [row % 5 for row in rows(batches)]
            seen += rows(batches)
        assert sorted(seen) == list(range(40)) and seen != list(range(40))
        epochs.append(seen[: 40 // world_size])
    assert epochs[0] != epochs[1]
    if world_size > 1:  # the shards come in another order, and not only the rows that wait together
        assert set(epochs[0]) != set(epochs[1])


def test_a_stream_holds_the_rows_of_the_data_set_in_memory(folder):
    in_memory = load_labelled_images(folder, names=list("abcde"))["train"]
    expected = ImageDataset(in_memory, grey)
    kept = loader(find_shards(folder), shuffle_buffer=0)
    assert rows(kept) == [int(sample["pixel_values"][0, 0, 0]) // 5 for sample in expected] == list(range(40))
    shuffled = loader(find_shards(folder))
    assert Counter(rows(shuffled)) == Counter(rows(kept))


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_labels_that_are_text_are_numbers_of_classes_in_a_stream_and_in_memory(tmp_path, monkeypatch, write):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "[a] b" / "Training"
    folder.mkdir(parents=True)
    write(folder, as_text=True)
    shards = find_shards(str(folder.parent))
    assert shards.classes == tuple("abcde")
    labels = [label for batch in loader(shards, shuffle_buffer=0) for label in batch["labels"].tolist()]
    in_memory = load_labelled_images(str(folder.parent))["train"]
    assert labels == in_memory["label"][:] == [row % 5 for row in range(40)]
    assert in_memory.features["label"].names == list("abcde")
    with pytest.raises(ValueError, match="has label 'c', which is none of the classes"):
        list(loader(find_shards(str(folder.parent), names=["a", "b"]), shuffle_buffer=0))


@pytest.mark.parametrize("drop_last, expected", [(True, 36), (False, 42)])
def test_what_does_not_divide_is_left_out_or_seen_again(tmp_path, drop_last, expected):
    """40 rows for 3 processes and batches of 4: three whole batches each, or 14 rows each with two of them again."""
    write_tars(tmp_path)
    shards = find_shards(str(tmp_path))
    streams = [loader(shards, 2, rank=rank, world_size=3, drop_last=drop_last) for rank in range(3)]
    per_rank = [[len(batch["labels"]) for batch in stream] for stream in streams]
    assert per_rank[0] == per_rank[1] == per_rank[2] and sum(map(sum, per_rank)) == expected
    seen = Counter(row for stream in streams for row in rows(stream))
    assert len(seen) == min(expected, 40) and max(seen.values()) == (1 if drop_last else 2)
    with pytest.raises(ValueError, match="40 rows do not fill one batch of 48"):
        loader(shards, batch_size=16, world_size=3, drop_last=True)


@pytest.mark.parametrize("workers", [0, 3])
def test_rows_that_a_resumed_run_has_done_are_neither_decoded_nor_seen(tmp_path, workers):
    write_parquet(tmp_path)
    whole = loader(find_shards(str(tmp_path)), workers)
    whole.dataset.set_epoch(5)
    expected = [batch["pixel_values"] for batch in whole]
    whole.dataset.batches_done = 4
    resumed = list(whole)
    assert all(batch["pixel_values"].numel() == 0 for batch in resumed[:4]) and len(resumed) == 10
    assert all(torch.equal(batch["pixel_values"], pixels) for batch, pixels in zip(resumed[4:], expected[4:]))


def test_bad_pictures_are_named_or_counted_and_the_batches_stay_whole(tmp_path):
    write_tars(tmp_path)
    content = bytearray((tmp_path / "train-0001.tar").read_bytes())
    for start in (content.find(b"\x89PNG"), content.find(b"\x89PNG", content.find(b"\x89PNG") + 9)):
        content[start : start + 4] = b"none"
    (tmp_path / "train-0001.tar").write_bytes(content)
    shards = find_shards(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot read .*train-0001.tar/00000\d.PNG"):
        list(loader(shards))
    skipping = loader(shards, on_bad_sample="skip")
    seen = rows(skipping)
    assert len(seen) == 40 and set(seen) == set(range(40)) - {7, 8} and skipping.dataset.skipped == 2
    first = (tmp_path / "train-0000.tar").read_bytes().replace(b"\x89PNG", b"none", 2)
    (tmp_path / "train-0000.tar").write_bytes(first)  # the good one after these stands for them too
    assert rows(loader(shards, on_bad_sample="skip", shuffle_buffer=0))[:10] == [2, 2, 2, 3, 4, 5, 6, 6, 6, 9]
    with pytest.raises(ValueError, match="has label 4, but there are 4 classes"):
        list(loader(shards, num_labels=4))


TIMM = {"filenames": ["train-0000.tar", "train-0001.tar"], "shard_lengths": [2, 3], "name": "train"}


@pytest.mark.parametrize(
    "name, content",
    [("sizes.json", {"train-0000.tar": 2, "train-0001.tar": 3}), ("_info.json", {"splits": {"train": TIMM}})],
)
def test_numbers_of_rows_may_be_written_beside_tars(tmp_path, name, content):
    write_tars(tmp_path)
    for number in (2, 3, 4):
        (tmp_path / f"train-000{number}.tar").unlink()
    assert find_shards(str(tmp_path)).rows == SHARD_SIZES[:2]
    (tmp_path / name).write_text(json.dumps(content))
    assert find_shards(str(tmp_path)).rows == (2, 3)
    (tmp_path / "train-0001.tar").rename(tmp_path / "train-0005.tar")
    with pytest.raises(ValueError, match=f"{name} has no number of rows for train-0005.tar"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("content", ["[1]", "{}", '{"splits": []}', '{"splits": {"train": {"shard_lengths": null}}}'])
def test_tars_beside_another_file_of_that_name_are_counted(tmp_path, content):
    write_tars(tmp_path)
    (tmp_path / "_info.json").write_text(content)
    assert find_shards(str(tmp_path)).rows == SHARD_SIZES


def test_what_cannot_be_streamed_is_said(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"streaming needs parquet or tar shards, got \['.png'\]"):
        find_shards(str(tmp_path))
    with pytest.raises(ValueError, match="no files for a split 'test'"):
        find_shards(str(tmp_path), split="test")
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars")
    with pytest.raises(ValueError, match="numbers without names: give the names by --class_names"):
        load_labelled_images(str(tmp_path / "tars"))


def test_the_trainer_resumes_a_stream_in_the_middle_of_an_epoch(tmp_path):
    write_parquet(tmp_path)
    seen, decoded = [], multiprocessing.Value("q")

    def counted(picture):
        with decoded.get_lock():
            decoded.value += 1
        return grey(picture)

    class Recording(ViTAETrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(inputs["names"])
            inputs = {**inputs, "pixel_values": inputs["pixel_values"] / 99}
            return super().training_step(model, inputs, num_items_in_batch)

    def run(workers=2, **resume):
        torch.manual_seed(0)
        arguments = ViTAETrainingArguments(
            tmp_path / "out",
            num_train_epochs=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            save_steps=7,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        stream = StreamedImageDataset(find_shards(str(tmp_path)), counted, 4, shuffle_buffer=6)
        model = ViTAEForImageClassification(pyramid_config())
        trainer = Recording(model, arguments, data_collator=collate, train_dataset=stream)
        trainer.train(**resume)
        return trainer

    whole = run()
    assert whole.state.global_step == 15 and len(seen) == 30
    for first in (0, 10, 20):
        assert sorted(name for batch in seen[first : first + 10] for name in batch) == sorted(
            f"{i}.png" for i in range(40)
        )
    expected = seen[14:]
    seen.clear()
    decoded.value = 0
    resumed = run(resume_from_checkpoint=tmp_path / "out" / "checkpoint-7")
    assert seen == expected and decoded.value == 16 * 4  # what had been seen was not decoded again
    assert torch.equal(resumed.model.classifier.weight, whole.model.classifier.weight)
    with pytest.raises(ValueError, match=r'"workers": 2.*resume it so, not with .*"workers": 1'):
        run(workers=1, resume_from_checkpoint=tmp_path / "out" / "checkpoint-7")
