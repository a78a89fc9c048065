"""benchmarks/kernels.py: every kernel in its category, and what ran in a step adds up."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels import CATEGORIES, Recording, category, covered, kernel_times, load, record, slowest

COPIED = "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const"
CAST = "at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}"
ADDED = "at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>"
MEAN = "at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned int, float, 4, 4>"
ADAM = "at::native::TensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>"
KERNELS = {
    "matrix products": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_64x4_nn_align8>(...::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>(...)",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage3_cudnn",
        "triton_tem_fused_addmm_t_3",
        "aten::addmm",
        "aten::_scaled_mm",
    ],
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_cga1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 8>(cudnn::fusion::...)",
        "void pytorch_flash::flash_fwd_splitkv_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, cutlass::half_t>>",
        "fmha_cutlassB_bf16_aligned_128x64_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<...>::Params)",
        "triton_tem_fused_flex_attention_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "optimizer": [
        f"void at::native::(anonymous namespace)::multi_tensor_apply_kernel<{ADAM}>(...)",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>, "
        "at::native::(anonymous namespace)::LpNormFunctor<float, (at::native::NormType)1, float, 1, 1, 0>>(...)",
        "aten::_fused_adamw_",
    ],
    "copies": [
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
        f"void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<{COPIED}>>(int, ...)",
        f"void at::native::vectorized_elementwise_kernel<8, {CAST}, std::array<char*, 2ul>>(int, ...)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<at::native::OpaqueType<2u>, 4>",
        "aten::copy_",
    ],
    "reductions": [
        "triton_red_fused__to_copy_mul_sum_3",
        "triton_per_fused__fused_rms_norm__scaled_dot_product_cudnn_attention_mm_0",
        f"void at::native::reduce_kernel<512, 1, {MEAN}>({MEAN})",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>(...)",
        "aten::native_layer_norm",
        "aten::argmax",
    ],
    "elementwise": [
        f"void at::native::vectorized_elementwise_kernel<4, {ADDED}>(int, {ADDED})",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_cat_clone_mul_2",
        "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<index_copy_kernel_impl>>(...)",
        "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4, normal_kernel>",
        "aten::normal_",
        "aten::silu_backward",
    ],
    "other": ["ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "aten::empty", "MmBackward0"],
}


@pytest.mark.parametrize(("expected", "name"), [(each, name) for each, names in KERNELS.items() for name in names])
def test_a_kernel_is_of_one_category(expected: str, name: str) -> None:
    assert category(name) == expected and expected in CATEGORIES


def test_what_overlaps_is_covered_once() -> None:
    assert covered([]) == 0
    assert covered([(4, 6), (0, 3), (1, 2), (2, 4), (8, 9)]) == 7


def test_times_are_of_one_step() -> None:
    ran = [("nvjet_a", 3.0), ("nvjet_b", 1.0), ("nvjet_a", 3.0), ("nvjet_b", 1.0), ("Memset (Device)", 0.5)]
    times = Recording(ran, steps=2, idle=1.5).times()
    assert times == dict.fromkeys(CATEGORIES, 0.0) | {
        "matrix products": 4.0, "copies": 0.25, "launches": 2.5, "idle": 1.5,
    }  # fmt: skip
    assert Recording(ran, steps=2, idle=None).slowest(2) == [("nvjet_a", 3.0, 1.0), ("nvjet_b", 1.0, 1.0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is asked for kernels, not for operators")
def test_a_step_on_the_cpu() -> None:
    weight = torch.randn(768, 768, requires_grad=True)
    query = torch.randn(1, 2, 64, 32)

    def run() -> None:
        F.scaled_dot_product_attention(query, query, query)
        F.relu(torch.randn(768, 768) @ weight).sum().backward()

    times = kernel_times(run)
    assert "idle" not in times and times["launches"] > 5
    parts = {name: times[name] for name in CATEGORIES}
    assert parts["attention"] > 0 and parts["elementwise"] > 0 and parts["reductions"] > 0
    assert parts["matrix products"] > 0.5 * sum(parts.values())
    [(name, ms, count)] = slowest(run, count=1)
    assert (name, count) == ("aten::mm", 2) and ms > 0


@pytest.mark.gpu
def test_a_step_on_a_gpu() -> None:
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    query = torch.randn(1, 30, 4224, 128, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([weight], foreach=True)

    def run() -> None:
        F.scaled_dot_product_attention(query, query, query)
        (weight @ weight).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    recording = record(run)
    times = recording.times()
    assert min(times[name] for name in CATEGORIES if name != "other") > 0, recording.slowest()
    assert times["other"] < 0.05 * sum(times[name] for name in CATEGORIES), recording.slowest()
    assert times["idle"] >= 0 and 10 < times["launches"] < 100


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("690.50, 700.00, 1650, 1980", {"watts": 690.5, "watts_limit": 700.0, "mhz": 1650.0, "mhz_limit": 1980.0}),
        ("[N/A], 700.00, 1650, 1980", None),
    ],
)
def test_a_card_tells_its_load_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: dict[str, float] | None
) -> None:
    """An nvidia-smi that goes on until it is told to stop; it is, also where a step fails."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nwhile sleep 0.05; do echo '{line}'; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    card = {"is_available": lambda: True, "current_device": lambda: 0, "synchronize": lambda: None}
    card["get_device_properties"] = lambda place: SimpleNamespace(uuid="x")
    for name, function in card.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr("benchmarks.kernels.LOAD_SECONDS", 0.5)
    assert load(lambda: time.sleep(0.1), 100.0) == expected

    def fail() -> None:
        time.sleep(0.2)
        raise RuntimeError("a step")

    with pytest.raises(RuntimeError, match="a step"):
        load(fail, 100.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
