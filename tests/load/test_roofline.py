"""Coefficients without a measurement: from a model's config.json and the name of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.__main__ import run
from sidecar.errors import UsageError
from sidecar.events import RequestSize
from sidecar.launch.preflight import choose_coefficients
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.gpu_specs import GPUS, find_gpu
from sidecar.load.roofline import Config, attention_windows, parse_architecture, roofline, vision_flops
from sidecar.settings import Settings

from ..nvml_stub.build import build

H100 = "NVIDIA H100 80GB HBM3"
LLAMA: Config = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
MIXTRAL: Config = {
    **LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
QWEN3_30B: Config = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
    "use_sliding_window": False,
}
DEEPSEEK: Config = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize(
    ("config", "active", "kept"),
    [
        (LLAMA, 7.5e9, 2 * 8 * 128 * 32),  # of 8.03e9 without the input embedding
        (MIXTRAL, 12.75e9, 2 * 8 * 128 * 32),
        (QWEN3_30B, 3.03e9, 2 * 4 * 128 * 48),  # "30B-A3B"
        (DEEPSEEK, 36.6e9, 576 * 61),  # "37B activated"
    ],
)
def test_the_weights_of_known_models_are_counted(config: Config, active: float, kept: int) -> None:
    """Active weights are those of the model cards, within 2 %, and the size of the KV cache is exact."""
    model = parse_architecture(config)
    assert model.decode_weights == pytest.approx(active, rel=0.02)
    assert model.kv_values == kept


def test_the_documented_default_is_a_roofline() -> None:
    """A dense 8B model on an H100 gives the default's coefficients within 15 %."""
    found, default = roofline(LLAMA, H100), Coefficients()
    assert found.source == "roofline: llama of 7.5B active weights on H100"
    for name in cost_model.TERMS:
        assert getattr(found, name) == pytest.approx(getattr(default, name), rel=0.15), name


def test_more_and_better_gpus_cost_less() -> None:
    """Each term falls with the number and speed of GPUs; k and h, which are launches, do not."""
    one, two, slow = roofline(LLAMA, H100), roofline(LLAMA, H100, 2), roofline(LLAMA, "NVIDIA L4")
    for name in ("a", "b", "d", "f"):
        assert getattr(one, name) / 2 < getattr(two, name) < getattr(one, name) < getattr(slow, name), name
    assert (one.k, one.h) == (two.k, two.h)
    assert len({co.fingerprint for co in (one, two, slow, Coefficients())}) == 4


def test_a_mixture_reads_more_than_it_computes() -> None:
    """Decoding in a batch reads nearly every expert, prefill computes with the chosen ones only."""
    model = parse_architecture(MIXTRAL)
    assert model.read_weights == pytest.approx(46.6e9, rel=0.02)
    assert roofline(MIXTRAL, H100).d > 3 * 2 * model.decode_weights / (989e12 * 0.5) * 1000


@pytest.mark.parametrize(
    ("quantised", "gpu", "weights", "products"),
    [
        ({"quant_method": "fp8"}, H100, 0.5, 989 / 1979),
        ({"quant_method": "fp8"}, "NVIDIA A100-SXM4-80GB", 0.5, 1.0),  # which has no fp8
        ({"quant_method": "awq", "bits": 4}, H100, 4.5 / 16, 1.0),
        ({"quant_method": "mxfp4"}, H100, 4.5 / 16, 1.0),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}},
            },
            H100,
            0.5,
            989 / 1979,
        ),
    ],
)
def test_quantised_weights_are_read_and_multiplied_as_what_they_are(
    quantised: dict[str, Any], gpu: str, weights: float, products: float
) -> None:
    """Reads shrink with the bits of a weight; products are faster only if weights, inputs and GPU are 8 bit."""
    plain, narrow = roofline(LLAMA, gpu), roofline({**LLAMA, "quantization_config": quantised}, gpu)
    assert narrow.d == pytest.approx(plain.d * weights)
    assert narrow.a == pytest.approx(plain.a * products)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sliding_window": 4096, "num_hidden_layers": 32}, (32, 4096, 1.0)),  # Mistral 7B v0.1
        ({"sliding_window": None, "num_hidden_layers": 32}, (32, 0, 0)),
        ({"sliding_window": 32768, "use_sliding_window": False}, (32, 0, 0)),  # Qwen 2
        ({"sliding_window": 32768, "use_sliding_window": True, "max_window_layers": 28}, (32, 32768, 4 / 32)),
        ({"sliding_window": 1024, "sliding_window_pattern": 6}, (32, 1024, 27 / 32)),  # Gemma 3: each sixth sees all
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16}, (32, 128, 0.5)),
        ({"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}, (8, 0, 0)),  # Qwen 3 Next
        (
            {"attention_chunk_size": 8192, "layer_types": ["chunked_attention"] * 24 + ["full_attention"] * 8},
            (32, 8192, 0.75),
        ),
    ],
)
def test_sliding_windows_are_read_in_every_spelling(config: Config, expected: tuple[int, float, float]) -> None:
    """The layers with attention, the window, and the share of layers that have it."""
    assert attention_windows(config, 32) == pytest.approx(expected)


def test_a_vision_tower_costs_its_patches() -> None:
    """A tower of width 1280 and 32 blocks, four patches per token; an unknown one keeps the default prices."""
    tower = {"hidden_size": 1280, "depth": 32, "intermediate_size": 3420, "hidden_act": "silu", "spatial_merge_size": 2}
    per_token, per_pair = vision_flops({**LLAMA, "vision_config": tower})
    assert per_token == pytest.approx(2 * 4 * 0.63e9, rel=0.02)
    assert per_pair == 4 * 1280 * 32 * 4**2
    assert (roofline(LLAMA, H100).g, roofline(LLAMA, H100).q) == (Coefficients().g, Coefficients().q)
    assert vision_flops({**LLAMA, "vision_config": {"depth": 3}}) == (0, 0)


QWEN2_5 = {
    "hidden_size": 1280,
    "depth": 32,
    "patch_size": 14,
    "window_size": 112,
    "spatial_merge_size": 2,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
CLIP = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
    "model_type": "clip_vision_model",
}


@pytest.mark.parametrize(
    ("tower", "whole", "seen"),
    [
        (QWEN2_5, 4, 64),
        (CLIP, 0, 576),
        ({**CLIP, "model_type": "pixtral"}, 24, 0),  # its image_size is the maximum
        ({"hidden_size": 1280, "depth": 27, "image_size": 336, "patch_size": 14, "spatial_merge_size": 2}, 27, 0),
    ],
)
def test_attention_within_an_image_counts_where_it_grows(tower: dict[str, Any], whole: int, seen: int) -> None:
    """Layers that attend to the whole image cost the square of its tokens, others a constant per token."""
    config, patches = {"vision_config": tower}, tower.get("spatial_merge_size", 1) ** 2
    layers = tower.get("depth", tower.get("num_hidden_layers"))
    plain, _ = vision_flops(
        {"vision_config": {key: tower[key] for key in tower if key not in ("window_size", "image_size")}}
    )
    per_token, per_pair = vision_flops(config)
    width = tower["hidden_size"]
    assert per_pair == whole * 4 * width * patches**2
    assert per_token - plain == pytest.approx((layers - whole) * 4 * width * seen * patches)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        (H100, "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GB200", "GB200"),
        ("2xh100", None),
        ("Tesla K80", None),
        ("", None),
    ],
)
def test_nvmls_names_find_their_row(name: str, row: str | None) -> None:
    """The most specific row of the table matches; an unknown GPU has none."""
    found = find_gpu(name)
    assert (found and found.words) == row
    assert len({gpu.words for gpu in GPUS}) == len(GPUS)


def test_an_instance_of_a_gpu_has_its_share() -> None:
    """Under MIG, 3g is three sevenths."""
    whole, part = find_gpu("NVIDIA A100-SXM4-40GB"), find_gpu("NVIDIA A100-SXM4-40GB MIG 3g.20gb")
    assert whole
    assert part
    assert part.bandwidth == pytest.approx(whole.bandwidth * 3 / 7)


def test_what_is_unknown_is_said() -> None:
    """An unknown GPU counts as an H100, an unknown model as the default; `source` says so."""
    assert roofline(LLAMA, "Tesla K80").source == "roofline: llama of 7.5B active weights on assumed H100"
    lacking = roofline({"hidden_size": 4096}, H100)
    assert lacking.source == "default: the model's config.json has no num_hidden_layers"
    assert lacking.a == Coefficients().a


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(
    {*QWEN3_30B, *DEEPSEEK, "vision_config", "text_config", "layer_types", "quantization_config", "num_local_experts"}
)


@settings(max_examples=300)
@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4), gpu=st.sampled_from([H100, "x"]))
def test_no_config_breaks_the_start(changes: dict[str, Any], gpu: str) -> None:
    """Whatever a config.json contains, the coefficients price work above 0, and can be written and read back."""
    co = roofline({**LLAMA, **changes}, gpu)
    assert 0 < cost_model.gpu_ms(RequestSize(100, output=10), co) < float("inf")
    assert cost_model.from_json(cost_model.to_json(co)) == co


def test_the_command_takes_the_models_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--model and --gpu give a roofline, --coefficients has precedence, and an invalid GPU is a usage error."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = choose_coefficients(Settings(model=str(tmp_path), gpu="2xL40S"))
    assert found == roofline(LLAMA, "L40S", 2)
    kept = tmp_path / "co.json"
    kept.write_text(cost_model.to_json(Coefficients(a=7.0)))
    assert choose_coefficients(Settings(model=str(tmp_path), coefficients=str(kept))).a == 7.0
    assert choose_coefficients(Settings()) == Coefficients()
    (tmp_path / "config.json").write_text("[")
    assert choose_coefficients(Settings(model=str(tmp_path))).source.startswith(
        "default: config.json of --model cannot be read"
    )
    (tmp_path / "config.json").unlink()
    assert choose_coefficients(Settings(model=str(tmp_path))).source == "default: no config.json in --model"
    kept.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        choose_coefficients(Settings(coefficients=str(kept)))
    assert run(["run", "--gpu", "0x???"]) == 2
    assert "--gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("count 2", ["Stub GPU", "Stub GPU"]),
        ("mig 3", ["Stub GPU MIG 1g.10gb"]),
        ("hang nvmlInitWithFlags", []),
        ("nvmlInitWithFlags 999", []),
    ],
)
def test_the_name_comes_from_nvml(
    script: str, names: list[str], tmp_path: Path, requires: Callable[[str], Path]
) -> None:
    """Without --gpu a process asks the driver library, so that one that hangs or fails cannot block the start.

    A slice is named as the signal names it; otherwise it would get the roofline of the whole GPU.
    """
    library = build(requires("gcc"), tmp_path / "lib")
    (tmp_path / "script").write_text(script)
    code = "from sidecar.signals.gpu import names as gpu_names; print(gpu_names.read(3.0))"
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "NVML_STUB_SCRIPT": str(tmp_path / "script")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{names}\n", done
