"""The measurement for GPUs, in miniature on a CPU, and what becomes of it when it is interrupted."""

import json
import time

import gpu_parts
import measure_gpu
import pytest
from gpu_parts import MINIATURE
from helpers import LINES, drawn, last_line, run


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return folder, run("measure_gpu", "--miniature", "--output", folder / "gpu")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(miniature):
    folder, done = miniature
    record = last_line(done)
    assert list(record["parts"]) == list(measure_gpu.PARTS) and set(record["parts"].values()) == {"whole"}
    parts = json.loads((folder / "gpu.json").read_text())["parts"]
    failed = [row["error"] for part in parts.values() for row in part["rows"] if "error" in row]
    assert len(failed) == 1 and "FlashAttention2" in failed[0]  # which is not installed
    by_dtype = {row["dtype"]: row["max_over_std"] for row in parts["parity"]["rows"]}
    assert by_dtype["float32"] < 2e-5 < by_dtype["float16"] < by_dtype["bfloat16"]
    assert {row["kind"]: row["loss_minus_plain"] for row in parts["one_process"]["rows"]} == {"plain": 0, "DDP": 0}
    shares = [row["share"] for row in parts["kernels"]["rows"] if "share" in row]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)


@pytest.mark.slow
def test_table_and_pictures_show_the_figures(miniature):
    folder, _ = miniature
    text = (folder / "gpu.md").read_text()
    assert all(f"## {part.title}\n" in text for part in measure_gpu.PARTS.values())
    assert "| vitae-nano | checkpointed | 4 |" in text and "- vitae-nano, flash_attention_2" in text
    for name in ("speed", "kernels", "fashion_mnist"):
        assert LINES[0] in drawn(folder / f"gpu_{name}.png")[1]


def test_the_parts_planned_fit_into_nine_minutes(capsys):
    measure_gpu.main(["--list"])
    *parts, total = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in parts] == list(measure_gpu.PARTS)
    assert sum(int(line.split()[0]) for line in parts) == int(total.split()[0]) < 530


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Arguments for two parts: the first yields two rows, the second whatever the test makes it."""
    monkeypatch.setattr(gpu_parts, "parity", lambda plan: iter([{"network": "first"}, {"network": "second"}]))
    parts = ["--parts", "parity", "attention"]
    return ["--miniature", "--output", str(tmp_path / "gpu"), *parts], tmp_path / "gpu.json"


def test_what_was_measured_before_an_interruption_is_kept_and_not_measured_again(arguments, monkeypatch):
    argv, path = arguments

    def interrupted(plan):
        yield {"network": "third"}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_parts, "attention", interrupted)
    record = measure_gpu.main(argv)
    assert record["parts"] == {"parity": "whole", "attention": "interrupted"} and measure_gpu.status(record) == 130
    assert json.loads(path.read_text())["parts"]["attention"]["rows"] == [{"network": "third"}]
    monkeypatch.setattr(gpu_parts, "parity", interrupted)
    monkeypatch.setattr(gpu_parts, "attention", lambda plan: iter([{"network": "fourth"}]))
    record = measure_gpu.main([*argv, "--resume"])
    assert set(record["parts"].values()) == {"whole"} and measure_gpu.status(record) == 0
    assert [row["network"] for row in json.loads(path.read_text())["parts"]["parity"]["rows"]] == ["first", "second"]


def test_a_part_ends_when_its_time_is_up(tmp_path):
    def slow():
        yield {"network": "first"}
        try:
            time.sleep(60)
        except Exception:  # as measurements do, so that the other networks go on
            pytest.fail("an end that a measurement takes for the error of a network")

    report = measure_gpu.Report(tmp_path / "gpu", MINIATURE, resume=False)
    report.measure("parity", slow(), 0.2)
    assert report.record["parts"]["parity"]["ended"] == "OutOfTime: ended after 0 s"
    assert report.record["parts"]["parity"]["rows"] == [{"network": "first"}]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    {
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>": "elementwise",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>": "layout and copies",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>": "layout and copies",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matrix product",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT": "matrix product",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32": "convolution",
        "void at::native::conv_depthwise2d_grad_weight_kernel<float>": "convolution",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": "attention",
        "void at::native::batch_norm_transform_input_channels_last_kernel": "normalisation",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "void at::native::reduce_kernel<512, 1, at::native::MeanOps>": "reduction",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "something_new": "other",
    }.items(),
)
def test_kernels_are_of_the_kind_that_their_names_say(kernel, kind):
    assert gpu_parts.kind_of(kernel) == kind


def test_without_a_gpu_the_command_says_so():
    done = run("measure_gpu")
    assert done.returncode == 1 and "--miniature" in done.stderr and "Traceback" not in done.stderr
