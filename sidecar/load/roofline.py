"""Pure: coefficients from a model's config.json and the name of its GPU, to start without a measurement.

A roofline: products run at COMPUTE_EFFICIENCY of the GPU's peak, memory reads at BANDWIDTH_EFFICIENCY of its bandwidth.

    a  2 FLOPs per weight that a token passes through (of a mixture of experts, only those of its experts)
    b  4 FLOPs per query head, head dimension and layer, for each preceding token
    d  reading the weights of a step, shared by DECODE_BATCH requests (of a mixture, the experts that a batch uses),
       or the FLOPs if they take longer
    f  the bytes of keys and values of one token
    g  2 FLOPs per weight of the vision tower, for each patch merged into a token, and attention within a tile or window
    w  the FLOPs of Whisper's large encoder for a second of audio
    q  4 FLOPs per dimension and layer of the tower, for each pair of patches that attend to each other across the image

k and h, launch and glue, are the defaults. Of each further GPU, PARALLEL_EFFICIENCY adds to the speed. `source` names
what is unknown: an unknown GPU counts as an H100, an unknown model as the default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sidecar.load.cost_model import AUDIO_FLOPS, TERMS, Coefficients
from sidecar.load.gpu_specs import GpuSpec, find_gpu

COMPUTE_EFFICIENCY: Final = 0.5  # what the benchmarks of vLLM and FlashAttention reach on long prompts
BANDWIDTH_EFFICIENCY: Final = 0.7
PARALLEL_EFFICIENCY: Final = 0.85  # of each further GPU, after all-reduce
DECODE_BATCH: Final = 32
FALLBACK_GPU: Final = "H100"
MAX_COEFFICIENT: Final = 1e9  # as for a coefficients file
UNEXPECTED_CONFIG: Final = "the model's config.json has unexpected values"
# Model types with two matrices in a feed-forward block, not three.
UNGATED_FAMILIES: Final = {
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom"),
    *("falcon", "mpt", "phi", "starcoder2", "gpt_bigcode", "nemotron"),
}
DTYPE_BYTES: Final = {"float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}

Config = Mapping[str, Any]


class UnknownModel(ValueError):
    """The config lacks a value that the roofline needs; the message names it."""


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """The parts of a language model that cost time. Weights are counts, not bytes."""

    kind: str
    prefill_weights: float  # that a prompt token passes through
    decode_weights: float  # that a generated token passes through, with the output matrix
    read_weights: float  # that a step of DECODE_BATCH requests reads
    attention_flops: float  # per pair of tokens, over all layers
    kv_values: float  # stored per token, over all layers
    window: float
    windowed: float


def roofline(config: Config, gpu: str = "", count: int = 1) -> Coefficients:
    """Coefficients of a model (its config.json) on `count` GPUs with the NVML name `gpu`. Never raises."""
    known = find_gpu(gpu)
    spec = known or find_gpu(FALLBACK_GPU)
    assert spec is not None
    default = Coefficients()
    try:
        model = parse_architecture(config)
        bytes_each, compute = weight_precision(config, spec)
        per_token, per_pair = vision_flops(config)
    except (UnknownModel, TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError) as error:
        why = str(error) if isinstance(error, UnknownModel) else UNEXPECTED_CONFIG
        return replace(default, source=f"default: {why}", gpu=gpu)
    share = 1 / (1 + PARALLEL_EFFICIENCY * (max(1, count) - 1))
    flops = compute * 1e12 * COMPUTE_EFFICIENCY / share / 1000  # per millisecond, as below
    plain = spec.bf16 * 1e12 * COMPUTE_EFFICIENCY / share / 1000
    read = spec.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY / share / 1000
    hardware = f"{f'{count} x ' if count > 1 else ''}{'' if known else 'assumed '}{spec.words}"
    source = f"roofline: {model.kind} of {model.decode_weights / 1e9:.2g}B active weights on {hardware}"
    co = replace(
        default,
        a=2 * model.prefill_weights / flops,
        b=model.attention_flops / plain,
        d=max(model.read_weights * bytes_each / read / DECODE_BATCH, 2 * model.decode_weights / flops),
        f=model.kv_values * kv_bytes(config) / read,
        g=per_token / plain if per_token else default.g,
        q=per_pair / plain if per_token else default.q,
        w=AUDIO_FLOPS / plain,
        window=model.window,
        windowed=model.windowed,
        batch=DECODE_BATCH,
        source=source,
        gpu=gpu,
    )
    numbers = [getattr(co, name) for name in (*TERMS, "window", "windowed")]
    if not all(0 <= number < MAX_COEFFICIENT for number in numbers):
        return replace(default, source=f"default: {UNEXPECTED_CONFIG}", gpu=gpu)
    text = repr((source, *numbers))
    return replace(co, fingerprint="roofline-" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest())


def parse_architecture(config: Config) -> ModelArchitecture:
    """Count the weights. Raises UnknownModel."""
    text = _text(config)
    hidden = _need(text, "hidden_size", "n_embd", "d_model", "dim")
    layers = int(_need(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    heads = _need(text, "num_attention_heads", "n_head", "n_heads")
    vocabulary = _need(text, "vocab_size", "padded_vocab_size")
    attention, per_pair, kept = _attention(text, hidden, heads)
    attending, window, windowed = attention_windows(text, layers)
    passed, chosen = _feed_forward(text, hidden, layers)
    head = vocabulary * hidden
    body, read = layers * attention + passed, layers * attention + chosen + head
    kind = str(text.get("model_type") or config.get("model_type") or "model")[:40]
    return ModelArchitecture(kind, body, body + head, read, per_pair * attending, kept * attending, window, windowed)


def _attention(text: Config, hidden: float, heads: float) -> tuple[float, float, float]:
    """Of one layer: weights, FLOPs per pair of tokens, values stored per token."""
    rank = _get(text, "kv_lora_rank")
    if rank:  # latent attention: queries meet compressed keys, decompressed for the prompt
        rope, nope = _need(text, "qk_rope_head_dim"), _need(text, "qk_nope_head_dim")
        value, query = _need(text, "v_head_dim"), _get(text, "q_lora_rank")
        q = query * (hidden + heads * (rope + nope)) if query else hidden * heads * (rope + nope)
        weights = q + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
        return weights, 2 * heads * (rope + nope + value), rank + rope
    each = _get(text, "head_dim") or hidden / heads
    shared = _get(text, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num") or heads
    if text.get("multi_query") is True and not _get(text, "num_kv_heads"):
        shared = 1
    weights = 2 * hidden * heads * each + 2 * hidden * shared * each
    return weights, 4 * heads * each, 2 * shared * each


def _feed_forward(text: Config, hidden: float, layers: int) -> tuple[float, float]:
    """Weights over all layers: those one token passes through, and those a batch of DECODE_BATCH uses."""
    matrices = 2 if text.get("model_type") in UNGATED_FAMILIES else 3
    inner = _get(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    experts = _get(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if not experts:
        return layers * matrices * hidden * inner, layers * matrices * hidden * inner
    chosen = _need(text, "num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk", "moe_k")
    each = matrices * hidden * (_get(text, "moe_intermediate_size", "expert_hidden_size") or inner)
    common = _get(text, "n_shared_experts", "moe_num_shared_experts") * each
    common += matrices * hidden * _get(text, "shared_expert_intermediate_size", "shared_intermediate_size")
    if text.get("model_type") in ("llama4_text", "llama4"):  # one expert of the same size is always used
        common, inner = common + each, _get(text, "intermediate_size_mlp") or inner
    dense = _dense_layers(text, layers)
    plain = dense * matrices * hidden * inner
    router = hidden * experts
    distinct = experts * (1 - (1 - min(1.0, chosen / experts)) ** DECODE_BATCH)  # if they are chosen evenly
    sparse = layers - dense
    return plain + sparse * (router + common + chosen * each), plain + sparse * (router + common + distinct * each)


def _dense_layers(text: Config, layers: int) -> int:
    """Layers without experts, in a mixture of experts."""
    if isinstance(text.get("mlp_only_layers"), list) and text["mlp_only_layers"]:
        return min(layers, len(text["mlp_only_layers"]))
    if isinstance(text.get("moe_layers"), list):
        return layers - min(layers, len(text["moe_layers"]))
    first = int(_get(text, "first_k_dense_replace"))
    step = int(_get(text, "interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq") or 1)
    return min(layers, first + (layers - first) - (layers - first) // max(1, step))


def attention_windows(text: Config, layers: int) -> tuple[int, float, float]:
    """(layers with attention, tokens of their sliding window, share of them that have one)."""
    window = _get(text, "sliding_window", "sliding_window_size", "attention_chunk_size")
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        attending = [kind for kind in kinds if "attention" in str(kind) and "linear" not in str(kind)]
        count = len(attending) or 1
        sliding = sum("sliding" in str(kind) or "chunked" in str(kind) for kind in attending)
    else:
        count, sliding = layers or 1, _sliding_layers(text, layers)
    return (count, float(window), sliding / count) if window and sliding else (count, 0.0, 0.0)


def _sliding_layers(text: Config, layers: int) -> int:
    """The number of layers with a sliding window, if they are not listed one by one."""
    if text.get("use_sliding_window") is False:
        return 0
    if text.get("use_sliding_window") is True:  # Qwen 2: the first ones have no window
        return max(0, layers - int(_get(text, "max_window_layers")))
    default = 2 if text.get("model_type") == "gemma2" else 1
    every = int(_get(text, "sliding_window_pattern", "_sliding_window_pattern")) or default
    return layers if every <= 1 else layers - layers // every


def weight_precision(config: Config, gpu: GpuSpec) -> tuple[float, float]:
    """(bytes of a weight, TFLOP/s of products with it)."""
    each = DTYPE_BYTES.get(_dtype(config), 2.0)
    quantised = config.get("quantization_config") or _text(config).get("quantization_config")
    if not isinstance(quantised, Mapping):
        return each, gpu.bf16 if each <= 2 else gpu.bf16 / 2
    bits, narrow = _bits(quantised)
    return bits / 8, gpu.fp8 if narrow and gpu.fp8 else gpu.bf16


def _bits(quantised: Config) -> tuple[float, bool]:
    """Bits of a weight with its scales, and whether products run in 8 bits."""
    method = str(quantised.get("quant_method") or quantised.get("quant_algo") or "").lower()
    algorithm = str(quantised.get("quant_algo") or "").lower()
    if method == "compressed-tensors" and isinstance(quantised.get("config_groups"), Mapping):
        group = next(iter(quantised["config_groups"].values()))
        bits = _get(group.get("weights") or {}, "num_bits") or 16.0
        inputs = _get(group.get("input_activations") or {}, "num_bits") or 16.0
        return bits + (0.5 if bits < 8 else 0.0), inputs <= 8
    if "fp8" in method or "fp8" in algorithm:
        return 8.0, True
    if "mxfp4" in method or "fp4" in algorithm:
        return 4.5, "nvfp4" in algorithm
    if method == "bitsandbytes":
        return (4.5 if quantised.get("load_in_4bit") else 8.0), False
    return (_get(quantised, "bits", "w_bit", "weight_bits") or 16.0) + 0.5, False


def kv_bytes(config: Config) -> float:
    """Bytes of one value in the KV cache: two, unless the checkpoint has scales for a narrower type."""
    quantised = config.get("quantization_config")
    known = quantised if isinstance(quantised, Mapping) else {}
    algorithm = str(known.get("kv_cache_quant_algo") or "").lower()
    narrow = isinstance(known.get("kv_cache_scheme"), Mapping) or "fp8" in algorithm
    return 1.0 if narrow else DTYPE_BYTES.get(_dtype(config), 2.0)


def vision_flops(config: Config) -> tuple[float, float]:
    """FLOPs of one encoder token, and of each pair of tokens of an image; zeros if unknown."""
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping):
        return 0.0, 0.0
    width = _get(tower, "embed_dim", "hidden_size", "width")  # Qwen2-VL's hidden_size is that of the language model
    depth = _get(tower, "depth", "num_hidden_layers", "layers")
    if not width or not depth:
        return 0.0, 0.0
    inner = _get(tower, "intermediate_size") or width * (_get(tower, "mlp_ratio") or 4.0)
    matrices = 3 if str(tower.get("hidden_act", "")).startswith("silu") else 2
    products = 2 * depth * (4 * width * width + matrices * width * inner)
    patches, (whole, seen) = patches_per_token(config, tower), patch_attention(config, tower, depth)
    attention = 4 * width  # of two patches, in one layer
    return (products + (depth - whole) * attention * seen) * patches, whole * attention * patches * patches


def patch_attention(config: Config, tower: Config, depth: float) -> tuple[float, float]:
    """(layers in which a patch attends to its whole image, patches it attends to in the others: its tile or window)."""
    patch, size, window = _get(tower, "patch_size"), _get(tower, "image_size"), _get(tower, "window_size")
    full = tower.get("fullatt_block_indexes")
    if isinstance(full, Sequence) and not isinstance(full, str):  # Qwen2.5-VL
        return min(depth, len(full)), (window / patch) ** 2 if patch else 0.0
    has_native_size = _get(tower, "spatial_merge_size") or _get(config, "spatial_merge_size")
    if has_native_size or not size or not patch or tower.get("model_type") == "pixtral":
        return depth, 0.0
    return 0.0, (size // patch) ** 2


def patches_per_token(config: Config, tower: Config) -> float:
    """Patches that are merged into one token."""
    side = _get(tower, "spatial_merge_size", "merge_kernel_size") or _get(config, "spatial_merge_size", "scale_factor")
    if side:
        return side * side
    ratio = _get(config, "downsample_ratio") or _get(tower, "pixel_shuffle_ratio")
    if ratio:
        return 1 / ratio**2
    tokens = _get(config, "mm_tokens_per_image")
    size, patch = _get(tower, "image_size"), _get(tower, "patch_size")
    return (size // patch) ** 2 / tokens if tokens and size and patch else 1.0


def _text(config: Config) -> Config:
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping) and inner:
            return _text(inner)
    return config


def _dtype(config: Config) -> str:
    named = (source.get(key) for source in (config, _text(config)) for key in ("dtype", "torch_dtype"))
    return str(next((name for name in named if name), "bfloat16")).removeprefix("torch.")


def _get(config: Config, *names: str) -> float:
    """The first of these values that is a positive number, or 0."""
    for name in names:
        value = config.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:  # one per layer: use their mean
            numbers = [v for v in value if isinstance(v, int | float)]
            value = sum(numbers) / len(numbers) if numbers else None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12:
            return float(value)
    return 0.0


def _need(config: Config, *names: str) -> float:
    value = _get(config, *names)
    if not value:
        raise UnknownModel(f"the model's config.json has no {names[0]}")
    return value
