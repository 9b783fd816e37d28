"""A run that is stopped anywhere and started again ends with one row for each picture, the same as undisturbed."""

import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from helpers import REPOSITORY, as_words, png
from predictions import MODEL, rows_of, run_predict, write_folder, write_parquet, write_tar
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from vitae_hf import ViTAEImageProcessor
from vitae_hf.failures import run_command
from vitae_hf.files import find_model
from vitae_hf.prediction import listing
from vitae_hf.prediction.dealing import part_name
from vitae_hf.prediction.listing import Listing
from vitae_hf.prediction.parts import place


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Pictures, a parquet file and tars; one tar fills its last part, so that only reading it on tells that it ends."""
    folder = write_folder(tmp_path_factory.mktemp("source"), range(37))
    write_parquet(folder / "x.parquet", range(33))
    write_tar(folder / "y.tar", range(25))
    write_tar(folder / "z.tar", range(20))
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, bytes]:
    """All parts of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run_predict(source, output=output, embeddings="float32")
    assert len(rows_of(output)) == 115
    return parts_of(output)


def parts_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def sentence(capsys, *words, **options) -> str:
    def main(argv):
        return run_predict(*words, **options)

    with pytest.raises(SystemExit, match="1"):
        run_command(main)
    return capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------- stopped


def predict_alone(source: Path, output: Path, variables: dict[str, str]) -> None:
    """What a process of its own does."""
    tqdm.set_lock(threading.RLock())  # else processes share one lock, and who is killed while holding it stops all
    multiprocessing.set_start_method("fork", force=True)  # of the process that reads, as by default
    os.environ.update(variables)
    torch.set_num_threads(1)
    run_predict(source, output=output, embeddings="float32", num_workers=1)


def start(source: Path, output: Path, **variables: str) -> multiprocessing.Process:
    """The command in a process of its own, forked from one that has imported torch, which takes longer than the run.

    That one has no threads; to fork this one would stop the children at locks that its threads hold.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitae_hf.commands.predict"])
    process = context.Process(target=predict_alone, args=(source, output, variables))
    process.start()
    return process


def kill_and_go_on(source: Path, output: Path, kills: int) -> int:
    """Kill runs at random moments, then let one finish. Returns how many of them left a part of the work behind."""
    moments, partial = random.Random(kills), 0
    for _ in range(kills):
        process, before = start(source, output), len(parts_of(output))
        more = moments.randint(0, 2)
        while process.is_alive() and len(parts_of(output)) < before + more:
            time.sleep(0.001)
        process.join(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        partial += 0 < len(parts_of(output)) < 13
    process = start(source, output)
    process.join()
    assert process.exitcode == 0
    return partial


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_after_random_kills_every_picture_has_the_row_of_an_undisturbed_run(source, undisturbed, tmp_path, kills):
    partial = kill_and_go_on(source, tmp_path / "out", kills)
    assert parts_of(tmp_path / "out") == undisturbed and partial


def test_whatever_parts_are_missing_are_made_again_and_no_others(source, undisturbed, tmp_path):
    run_predict(source, output=tmp_path / "out", embeddings="float32")
    kept = {}
    for path in sorted((tmp_path / "out").glob("part-*"))[::2]:
        kept[path] = path.stat().st_ino
    for path in set((tmp_path / "out").glob("part-*")) - set(kept):
        path.unlink()
    record = run_predict(source, output=tmp_path / "out", embeddings="float32")
    assert parts_of(tmp_path / "out") == undisturbed and 0 < record["pictures"] < 115
    remade = [path.name for path, inode in kept.items() if path.stat().st_ino != inode]
    assert all(
        name.startswith(("part-000005", "part-000006")) for name in remade
    )  # a tar is read on from its first gap


def test_a_tar_whose_last_part_is_there_is_not_read_again(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "x.tar", range(25))
    run_predict(tar, output=tmp_path / "out")
    monkeypatch.setattr(listing, "tar_samples", None)
    record = run_predict(tar, output=tmp_path / "out")
    assert (record["pictures"], record["done_before"]) == (0, 25)


@pytest.mark.parametrize("samples", [19, 20])
def test_a_damaged_tar_says_so_once_wherever_its_last_part_ends(tmp_path, samples):
    """With 19 samples the row that says it is the last of a full part."""
    tar = write_tar(tmp_path / "x.tar", range(40))
    tar.write_bytes(tar.read_bytes()[: samples * 2560 + 100])  # a sample has five blocks of 512 bytes
    for _ in range(2):
        run_predict(tar, output=tmp_path / "out")
    errors = [row["path"] for row in rows_of(tmp_path / "out") if row["error"]]
    assert len(rows_of(tmp_path / "out")) == samples + 1 and errors == [str(tar)]


def test_processes_share_the_parts_and_make_what_one_makes(source, undisturbed, tmp_path, monkeypatch):
    output, pictures = tmp_path / "out", []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        pictures.append(run_predict(source, output=output, embeddings="float32")["pictures"])
    assert min(pictures) > 20 and len(rows_of(output)) == sum(pictures) < 115
    assert not list(output.glob("part-000005-*"))  # the first tar is the third process's
    monkeypatch.setenv("WORLD_SIZE", "1")  # other processes than before go on
    monkeypatch.setenv("RANK", "0")
    run_predict(source, output=output, embeddings="float32")
    assert parts_of(output) == undisturbed


def test_two_processes_at_the_same_time_make_what_one_makes(source, undisturbed, tmp_path):
    both = [start(source, tmp_path / "out", RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") for rank in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and parts_of(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_torchrun_makes_what_one_process_makes(source, undisturbed, tmp_path):
    words = {"model": MODEL, "num_workers": 0, "dtype": "float32", "batch_size": 4, "rows_per_part": 10}
    words = as_words({**words, "output": tmp_path / "out", "embeddings": "float32"})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "vitae_hf", "predict", str(source), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["parts"] < 14 and parts_of(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_the_script_for_slurm_starts_a_process_for_each_gpu(source, undisturbed, tmp_path):
    """`srun` and `vitae` are stand-ins: the one starts two processes, of which the first fails once."""
    tasks = 'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & done; wait'
    fails = f'[[ $RANK = 0 && $(mkdir {tmp_path}/once 2>&1) = "" ]] && exit 1'
    for name, text in {"srun": tasks, "vitae": f'{fails}\nexec {sys.executable} -m vitae_hf "$@"'}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    words = {"model": MODEL, "num_workers": 0, "dtype": "float32", "batch_size": 4, "rows_per_part": 10}
    words = as_words({**words, "output": tmp_path / "out", "embeddings": "float32"})
    command = ["bash", str(REPOSITORY / "examples" / "distributed" / "predict_slurm.sbatch"), str(source), *words]
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert 0 < len(parts_of(tmp_path / "out")) < len(undisturbed)  # what the other process has made
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert parts_of(tmp_path / "out") == undisturbed


def test_a_full_disk_is_one_sentence_and_leaves_whole_parts(source, undisturbed, tmp_path, monkeypatch, capsys):
    sync, synced = os.fsync, []

    def fill_up(descriptor):
        synced.append(descriptor)
        assert len(parts_of(tmp_path / "out")) == max(0, len(synced) - 2)  # this part is not there before it is whole
        if len(synced) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    said = sentence(capsys, source, output=tmp_path / "out", embeddings="float32")
    assert said.startswith(f"error: {tmp_path / 'out'}/part-00000") and said.endswith("No space left on device")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"predict.json", *parts_of(tmp_path / "out")} and len(left) == 4
    monkeypatch.undo()
    run_predict(source, output=tmp_path / "out", embeddings="float32")
    assert parts_of(tmp_path / "out") == undisturbed


# ---------------------------------------------------------------------------------------------- another run


def test_another_run_in_the_same_folder_is_refused_by_what_has_changed(source, tmp_path, capsys):
    output = tmp_path / "out"
    run_predict(source / "00", output=output)
    before = parts_of(output)
    model = AutoModelForImageClassification.from_pretrained(find_model(MODEL))
    model.classifier.bias.data += 1
    model.save_pretrained(tmp_path / "model")
    ViTAEImageProcessor(size=64, crop_pct=1.0).save_pretrained(tmp_path / "model")
    for changed, said in (
        ({"model": tmp_path / "model"}, f"model was {MODEL} and is {tmp_path / 'model'}"),
        ({"image_size": 32}, "image_size was [64, 64] and is [32, 32]"),
        ({"crop_pct": 0.5}, "crop_pct was 1.0 and is 0.5"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        ({"top_k": 2}, "top_k was 5 and is 2"),
        ({"embeddings": "float16"}, "embeddings was None and is float16"),
        ({"format": "csv"}, "format was parquet and is csv"),
    ):
        assert said in sentence(capsys, source / "00", output=output, **changed)
    said = sentence(capsys, source / "01", output=output)
    assert f"sources was ['{source}/00'] and is ['{source}/01']" in said and said.endswith("by --overwrite")
    assert parts_of(output) == before
    run_predict(source / "01", "--overwrite", output=output, top_k=2)
    assert [row["path"] for row in rows_of(output)] == [f"{number:03}.png" for number in range(7, 14)]
    assert len(rows_of(output)[0]["labels"]) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 70}, "must be multiples of 16"),
        ({"model": "resizes"}, "pictures must come out in one size"),
    ],
)
def test_rows_are_only_overwritten_by_a_run_that_can_give_some(source, tmp_path, capsys, changed, message):
    run_predict(source / "00", output=tmp_path / "out")
    before = parts_of(tmp_path / "out")
    if "model" in changed:
        changed = {"model": tmp_path / "model"}
        AutoModelForImageClassification.from_pretrained(find_model(MODEL)).save_pretrained(tmp_path / "model")
        ViTAEImageProcessor(size=64, do_resize=False, do_center_crop=False).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        run_predict(source / "00", "--overwrite", output=tmp_path / "out", **changed)
    assert before and parts_of(tmp_path / "out") == before


def test_a_pattern_for_all_below_gives_each_picture_one_row_and_goes_on(tmp_path):
    folder = write_folder(tmp_path / "in", range(9))
    (folder / "notes.txt").write_text("no picture")
    for _ in range(2):
        run_predict(f"{folder}/**", output=folder / "out")
    found = rows_of(folder / "out")
    assert sorted(Path(row["path"]).name for row in found) == [f"{number:03}.png" for number in range(9)]
    assert all(row["error"] is None for row in found)


def test_a_source_in_another_is_refused(source, tmp_path, capsys):
    said = sentence(capsys, source, source / "00", output=tmp_path / "out")
    assert f"{source / '00'} lies in {source}: its pictures would have two rows" in said
    assert not (tmp_path / "out").exists()


def test_weights_that_changed_under_the_same_name_are_refused(source, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(find_model(MODEL))
    ViTAEImageProcessor(size=64, crop_pct=1.0).save_pretrained(tmp_path / "model")
    for number in range(2):
        model.save_pretrained(tmp_path / "model")
        if number:
            said = sentence(capsys, source / "00", output=tmp_path / "out", model=tmp_path / "model")
            assert "the weights of the model have changed" in said
        else:
            run_predict(source / "00", output=tmp_path / "out", model=tmp_path / "model")
        model.classifier.bias.data += 1


@pytest.mark.parametrize("change", ["other", "more", "fewer", "shard"])
def test_pictures_that_changed_are_refused(tmp_path, capsys, change):
    folder = write_folder(tmp_path / "in", range(14))
    write_parquet(folder / "x.parquet", range(12))
    run_predict(folder, output=tmp_path / "out")
    if change == "other":
        (folder / "00" / "003.png").rename(folder / "00" / "0035.png")
        expected = "part-000000-0000.parquet has 00/003.png, where there now is 00/0035.png"
    elif change == "more":
        write_folder(folder, range(14, 15))
        expected = "part-000001-0000.parquet has 4 pictures, where there now are 5"
    elif change == "fewer":
        (folder / "x.parquet").unlink()
        expected = "part-000002-0000.parquet has pictures that are no longer there"
    else:
        write_parquet(folder / "x.parquet", range(11))
        expected = "part-000002-0001.parquet has 2 pictures, where there now are 1"
    said = sentence(capsys, folder, output=tmp_path / "out")
    assert "the source has changed: " in said and expected in said


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    names = [part_name(unit, number) for unit, number in ((2, 9_999), (2, 10_000), (999_999, 0), (1_000_000, 0))]
    assert sorted(map(Path, names), key=place) == list(map(Path, names)) != sorted(map(Path, names))


def test_what_killed_runs_left_unfinished_is_deleted_once_nobody_can_be_writing_it(source, tmp_path):
    (tmp_path / "out").mkdir()
    for name, age in (("old", 4000), ("new", 10)):
        path = tmp_path / "out" / f".part-000000-0000.parquet.{name}.unfinished"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    run_predict(source / "00", output=tmp_path / "out")
    assert [path.suffixes[1] for path in (tmp_path / "out").glob(".*")] == [".new"]


def test_a_mistyped_source_leaves_nothing_behind_that_would_be_in_the_way(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    said = sentence(capsys, tmp_path / "empty", output=tmp_path / "out")
    assert said == f"error: {tmp_path / 'empty'} holds no pictures and no parquet or tar files"
    assert not (tmp_path / "out").exists()
    (tmp_path / "notes.jpg").write_text("no picture")
    said = sentence(capsys, tmp_path / "notes.jpg", output=tmp_path / "none")
    assert "none of 1 pictures can be read: cannot read " in said


# ------------------------------------------------------------------------------------------------------ memory


def test_a_listing_takes_no_more_names_than_it_needs(tmp_path, monkeypatch):
    write_folder(tmp_path, range(70))
    scanned, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scan(path))
    entries = iter(Listing([str(tmp_path)]))
    for _ in range(10):
        next(entries)
    assert len(scanned) == 3  # the folder, and two of the ten in it


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    peaks = []
    for rows in (10_000, 100_000):
        image = [{"bytes": png(number % 50), "path": None} for number in range(rows)]
        pyarrow.parquet.write_table(pa.table({"image": image}), tmp_path / f"{rows}.parquet", row_group_size=500)
        code = "import sys; from vitae_hf.commands import predict; predict.main(sys.argv[1:]);"
        code += "from vitae_hf.deployment.benchmarking import peak_memory; print(peak_memory('cpu'))"
        words = as_words({"model": MODEL, "output": tmp_path / str(rows), "num_workers": 1, "embeddings": "float16"})
        command = [sys.executable, "-c", code, str(tmp_path / f"{rows}.parquet"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
        assert len(list((tmp_path / str(rows)).glob("part-*"))) == -(-rows // 2048)
    print("peak MiB:", peaks)
    assert peaks[1] < peaks[0] + 20
