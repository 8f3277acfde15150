"""The roofline of compiled programs: FLOPs, bytes, turns of loops, and what is assumed."""

import dataclasses

import pytest

from clipmoe_jax.core import sharding
from clipmoe_jax.dmu.phases import PlannedPhase
from clipmoe_jax.dmu.recipe import TRAIN_EVERYTHING
from clipmoe_jax.models.clip import VARIANTS, ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig
from clipmoe_jax.planning import mfu, roofline
from clipmoe_jax.planning.hlo import parse
from clipmoe_jax.planning.plan import step_flops
from clipmoe_jax.planning.targets import compile_step
from clipmoe_jax.train.phase import PhaseConfig

# A second for each: FLOPs of products, of those in loops, bytes, FLOPs of attention, and backward.
RATES = roofline.Rates(1e12, 1e11, 1e10, 1e9, 1e8, "made up")

# Lines of ViT-L/14's steps as JAX 0.11 compiles them for an H100, with fewer attributes.
PROGRAM = """\
HloModule jit_train_step, is_scheduled=true

%fused_slice (param_0.1: bf16[4,1024,4096], param_1.1: s32[]) -> bf16[1024,4096] {
  %param_0.1 = bf16[4,1024,4096]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %constant.1 = s32[] constant(0)
  %dynamic-slice.1 = bf16[1,1024,4096]{2,1,0} dynamic-slice(%param_0.1, %param_1.1, %constant.1, %constant.1), dynamic_slice_sizes={1,1024,4096}
  ROOT %bitcast.1 = bf16[1024,4096]{1,0} bitcast(%dynamic-slice.1)
}

%fused_update (param_0.2: bf16[53448,4096], param_1.2: bf16[2048,4096], param_2.2: s32[]) -> bf16[53448,4096] {
  %param_0.2 = bf16[53448,4096]{1,0} parameter(0)
  %param_2.2 = s32[] parameter(2)
  %param_1.2 = bf16[2048,4096]{1,0} parameter(1)
  %constant.2 = s32[] constant(0)
  ROOT %dynamic-update-slice.2 = bf16[53448,4096]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2, %constant.2)
}

%body (arg.1: (s32[], bf16[2048,1024], bf16[4,1024,4096], /*index=3*/bf16[53448,4096])) -> (s32[], bf16[2048,1024], bf16[4,1024,4096], /*index=3*/bf16[53448,4096]) {
  %arg.1 = (s32[], bf16[2048,1024]{1,0}, bf16[4,1024,4096]{2,1,0}, /*index=3*/bf16[53448,4096]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %rows.1 = bf16[2048,1024]{1,0} get-tuple-element(%arg.1), index=1
  %kernels.1 = bf16[4,1024,4096]{2,1,0} get-tuple-element(%arg.1), index=2
  %hidden.1 = bf16[53448,4096]{1,0} get-tuple-element(%arg.1), index=3
  %loop_slice_fusion = bf16[1024,4096]{1,0} fusion(%kernels.1, %i.1), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(train_step)/visual/resblocks_0/moe/while/body/dynamic_slice"}
  %cublas-lt-matmul.3 = (bf16[2048,4096]{1,0}, s8[33554432]{0}) custom-call(%rows.1, %loop_slice_fusion), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/visual/resblocks_0/moe/while/body/dot_general"}, backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %product.1 = bf16[2048,4096]{1,0} get-tuple-element(%cublas-lt-matmul.3), index=0
  %loop_update_fusion = bf16[53448,4096]{1,0} fusion(%hidden.1, %product.1, %i.1), kind=kLoop, calls=%fused_update
  ROOT %tuple.1 = (s32[], bf16[2048,1024]{1,0}, bf16[4,1024,4096]{2,1,0}, /*index=3*/bf16[53448,4096]{1,0}) tuple(%i.1, %rows.1, %kernels.1, %loop_update_fusion)
}

%condition (arg.2: (s32[], bf16[2048,1024], bf16[4,1024,4096], /*index=3*/bf16[53448,4096])) -> pred[] {
  %arg.2 = (s32[], bf16[2048,1024]{1,0}, bf16[4,1024,4096]{2,1,0}, /*index=3*/bf16[53448,4096]{1,0}) parameter(0)
  ROOT %constant.3 = pred[] constant(true)
}

ENTRY %main.1 (p.1: (s32[], bf16[2048,1024], bf16[4,1024,4096], /*index=3*/bf16[53448,4096]), q.1: bf16[100,258,16,64]) -> bf16[100,16,258,64] {
  %p.1 = (s32[], bf16[2048,1024]{1,0}, bf16[4,1024,4096]{2,1,0}, /*index=3*/bf16[53448,4096]{1,0}) parameter(0)
  %q.1 = bf16[100,258,16,64]{3,2,1,0} parameter(1)
  %while.1 = (s32[], bf16[2048,1024]{1,0}, bf16[4,1024,4096]{2,1,0}, /*index=3*/bf16[53448,4096]{1,0}) while(%p.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"29"},"known_init_step":{"init":"0","step":"1"}}
  %dot_product_attention_fwd.1 = (bf16[100,16,258,64]{3,1,2,0}, u8[0]{0}) custom-call(%q.1, %q.1, %q.1), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(train_step)/visual/resblocks_0/attn/dot_product_attention_fwd"}, backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["100", "16", "258", "258"], "tuple_shapes": []}, "mask_type": "CAUSAL"}}
  %attended.1 = bf16[100,16,258,64]{3,1,2,0} get-tuple-element(%dot_product_attention_fwd.1), index=0
  %dot_product_attention_bwd.1 = (bf16[100,16,258,64]{3,1,2,0}, u8[0]{0}) custom-call(%q.1, %q.1, %q.1, %attended.1), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["100", "16", "258", "258"]}}}
  ROOT %kernel.1 = bf16[100,16,258,64]{3,1,2,0} custom-call(%attended.1), custom_call_target="__gpu$xla.gpu.triton"
}
"""  # noqa: E501

# As JAX 0.10 compiles scores for a TPU v5p: examples and heads are a convolution's places.
OF_TPU = """\
ENTRY %main (q: bf16[100,248,12,64], k: bf16[100,248,12,64]) -> f32[100,12,248,248] {
  %q = bf16[100,12,248,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[100,12,248,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %copy-start.1 = (bf16[100,12,248,64]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[100,12,248,64]{3,2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%q)
  ROOT %convolution-base-dilated.404 = f32[100,12,248,248]{2,3,1,0:T(8,128)} convolution(%q, %k), window={size=100x12 stride=99x11 lhs_dilate=100x12}, dim_labels=01bf_01oi->01bf
}
"""  # noqa: E501

RAGGED = """\
ENTRY %main (x: bf16[4096,1024], w: bf16[4,1024,512], g: s32[5]) -> bf16[4096,512] {
  %x = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[4,1024,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %g = s32[5]{0:T(128)} parameter(2)
  ROOT %ragged-dot-none.1 = bf16[4096,512]{1,0:T(8,128)(2,1)} custom-call(%g, %x, %w), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[5]{0}, bf16[4096,1024]{1,0}, bf16[4,1024,512]{2,1,0}}, frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="128,1024,512"}
}
"""  # noqa: E501

TINY = ClipConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=64, patch_size=8, width=64, num_layers=2, head_width=32),
    text=TextConfig(vocab_size=512, context_length=32, width=64, num_layers=2, head_width=32),
)
SETTINGS = PhaseConfig(batch_size=4, learning_rate=1e-3, weight_decay=0.1)


def items():
    return {item.name: item for item in roofline.estimate(PROGRAM, RATES)}


def test_loop_takes_all_its_turns():
    product = items()["bf16[2048,4096] visual/resblocks_*/moe/while/body/dot_general"]
    assert product.launches == 29 and product.amount == 29 * 2 * 2048 * 1024 * 4096
    assert product.seconds == pytest.approx(product.amount / RATES.products_in_loops) and not product.assumed


def test_slices_and_updates_in_place_move_only_their_part():
    found = items()
    kernel, rows = 1024 * 4096 * 2, 2048 * 4096 * 2
    sliced = found["bf16[1024,4096] visual/resblocks_*/moe/while/body/dynamic_slice"]
    assert sliced.limit == "memory" and sliced.amount == 29 * (2 * kernel + 4)
    assert found["bf16[53448,4096] fusion"].amount == 29 * (2 * rows + 4)
    program = parse(PROGRAM)
    body = program.computations["body"]
    # Without the library's scratch memory.
    assert program.traffic(body["cublas-lt-matmul.3"], body) == 2048 * 1024 * 2 + kernel + rows


def test_attention_has_rates_of_its_own():
    found, products = items(), 4 * 100 * 16 * 258**2 * 64
    forward = found["bf16[100,16,258,64] visual/resblocks_*/attn/dot_product_attention_fwd"]
    assert forward.limit == "attention" and forward.seconds == pytest.approx(products / 1e9)
    backward = found["bf16[100,16,258,64] __cudnn$fmhaSoftmaxBackward"]
    assert backward.seconds == pytest.approx(2.5 * products / 1e8) and not backward.assumed


def test_kernel_that_nobody_measured_and_loop_of_unknown_length_are_assumed():
    kernel = items()["bf16[100,16,258,64] __gpu$xla.gpu.triton"]
    assert kernel.assumed and kernel.amount == 2 * 100 * 16 * 258 * 64 * 2
    unknown = roofline.estimate(PROGRAM.replace("known_trip_count", "other"), RATES)
    [product] = [item for item in unknown if item.limit == "product"]
    assert product.assumed and product.launches == 1


def test_tpu_counts_tiles_and_no_zeros_of_convolutions():
    program = parse(OF_TPU)
    main = program.computations["main"]
    scores = main["convolution-base-dilated.404"]
    assert program.flops(scores, main) == 2 * 100 * 12 * 248 * 248 * 64
    # A row of 64 fills half a tile; 248 columns fill two; what lies on the chip is free.
    assert program.traffic(scores, main) == 100 * 12 * 248 * (128 * 2 + 256 * 4)
    assert program.traffic(main["copy-start.1"], main) == 100 * 12 * 248 * 128 * 2  # onto the chip


def test_kernels_of_branches_and_calls_without_a_result_count():
    text = PROGRAM.replace(
        "while(%p.1), condition=%condition, body=%body", "conditional(%p.1), true_computation=%body"
    )
    text = text.replace("ROOT %kernel.1 = bf16[100,16,258,64]{3,1,2,0}", "ROOT %kernel.1 = ()")
    items = {item.name: item for item in roofline.estimate(text, RATES)}
    assert items["__gpu$xla.gpu.triton"].launches == items["bf16[53448,4096] fusion"].launches == 1


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")


def test_grouped_kernel_counts_as_the_products_it_replaces():
    """Four groups of 4,096 rows, as JAX 0.10 compiles `lax.ragged_dot` for a TPU v5p."""
    [rows] = roofline.estimate(RAGGED, RATES)
    assert rows.limit == "product" and rows.assumed and rows.amount == 2 * 4096 * 1024 * 512


@pytest.mark.parametrize("gradient", [False, True], ids=["product", "gradient of kernels"])
def test_kernels_for_hopper_count_as_products_that_were_measured(gradient):
    """As JAX 0.11 compiles `grouped_dot` for an H100: 402 tiles of rows by four matrices."""
    rows, hidden, kernels = "bf16[51456,1024]{1,0}", "bf16[51456,4096]{1,0}", "bf16[4,1024,4096]{2,1,0}"
    second, result = (hidden, kernels) if gradient else (kernels, hidden)
    text = f"""\
ENTRY %main (n: s32[1], t: s32[402], x: {rows[:16]}, w: {second[:18]}) -> {result[:18]} {{
  %n = s32[1]{{0}} parameter(0)
  %t = s32[402]{{0}} parameter(1)
  %x = {rows} parameter(2)
  %w = {second} parameter(3)
  ROOT %kernel.1 = {result} custom-call(%n, %t, %x, %w), custom_call_target="mosaic_gpu_v2"
}}
"""
    [kernel] = roofline.estimate(text, RATES)
    assert kernel.limit == "product" and not kernel.assumed
    assert kernel.amount == 2 * 51456 * 1024 * 4096


def test_products_of_a_compiled_step_are_those_of_the_model():
    """Forward, backward and attention of a step compiled for a CPU."""
    phase = PlannedPhase("it", TINY, ComputeConfig(), TRAIN_EVERYTHING, SETTINGS, 10)
    program = parse(compile_step("cpu", phase).as_text())
    kernels = list(roofline._kernels(program, program.entry))
    total = sum(turns * program.flops(kernel, of) for kernel, of, turns, _, _ in kernels)
    of_pair, _ = step_flops(sharding.make_abstract_mesh(1, 1, 1, num_devices=1), phase)
    assert total == pytest.approx(4 * of_pair, rel=0.02)


def estimate_of(architecture=TINY, **compute):
    phase = PlannedPhase("mcl_1", architecture, ComputeConfig(**compute), TRAIN_EVERYTHING, SETTINGS, 10)
    return roofline.Estimate(phase, "h100", roofline.estimate(PROGRAM, RATES), 989e12, 1.5)


def test_printed_estimate_says_time_mfu_launches_and_what_is_assumed():
    estimate = estimate_of()
    lines = roofline.format_estimate(estimate).splitlines()
    seconds = sum(item.seconds for item in estimate.items)
    assert lines[0].startswith(
        f"mcl_1 on one H100 80 GB, 4 pairs, remat none: predicted {1e3 * seconds:.1f} ms, "
    )
    assert lines[0].endswith(f"MFU {1 / seconds:.1%}, 90 launches")
    assert lines[1] == "rates: set before one was measured"
    assert lines[2].split()[2:] == ["product", "0.498", "TFLOP"]
    assert sum(float(line.split()[0]) for line in lines[2:5]) == pytest.approx(1e3 * seconds, rel=1e-3)
    assert "assumed" in lines[5] and lines[7].endswith(
        "attention: bf16[100,16,258,64] __cudnn$fmhaSoftmaxBackward"
    )
    assert len(lines) == 7 + 6  # kinds of kernels


def test_batch_that_does_not_split_and_sizes_without_a_name_are_refused():
    with pytest.raises(ValueError, match="batch size 4 cannot be split over 3 devices"):
        roofline.predict("h100", estimate_of().phase, 3)
    with pytest.raises(ValueError, match="--write: the table has steps of ViT-B/32, ViT-B/16"):
        roofline.table_row(estimate_of())


@pytest.fixture
def table(monkeypatch, tmp_path):
    path = tmp_path / "roofline.json"
    path.write_text("[]")
    monkeypatch.setattr(mfu, "TABLE", path)
    mfu.read_rows.cache_clear()
    yield path
    mfu.read_rows.cache_clear()


def test_written_rows_are_the_plans_mfu(table):
    large, dots = VARIANTS["ViT-L/14"], ComputeConfig(remat="dots")
    assert mfu.mfu_of("v5p", large, dots, 1.0, None) == (0.4, "assumed")
    row = dataclasses.replace(
        roofline.table_row(estimate_of(large, remat="dots")), accelerator="v5p", mfu=0.3
    )
    mfu.write_rows([dataclasses.replace(row, mfu=0.1), dataclasses.replace(row, remat="full", mfu=0.2)])
    mfu.write_rows([row])
    assert len(table.read_text().splitlines()) == 2 + 2
    share, source = mfu.mfu_of("v5p", large, dots, 1.8, None)
    assert share == pytest.approx(0.3 * 1.5 / 1.8) and source == "predicted"
    assert mfu.mfu_of("v5p", large, dots, 1.0, 0.5) == (0.5, "given")
    assert mfu.mfu_of("h100", large, dots, 1.0, None) == (0.377, "measured")
    assert mfu.mfu_of("h100", VARIANTS["ViT-L/14@336"], dots, 1.0, None) == (0.4, "assumed")
    longer = dataclasses.replace(large, text=dataclasses.replace(large.text, context_length=248))
    for other in (longer, VARIANTS["ViT-B/32"], dataclasses.replace(large, moe=MoeConfig(4, 2))):
        assert mfu.mfu_of("v5p", other, dots, 1.0, None) == (0.4, "assumed")


def test_table_is_near_what_was_measured():
    """Of the same steps, with XLA's Triton products, which the roofline's programs have not: within 15 %."""
    rows, lengths = mfu.read_rows(), set()
    for (accelerator, step, remat), measured in mfu.MEASURED.items():
        row = rows[accelerator, "ViT-L/14, 248 tokens", step, remat]
        assert row.mfu * row.computed == pytest.approx(measured, rel=0.15)
        lengths.add(row.pairs)
    assert lengths == {100}
