"""One request to render -> vLLM's answer to it (0.32, entrypoints/scale_out/render), without a pixel.

Rules: a member of a request that is not known here raises NotRendered rather than being ignored. Where only the
prompt can be given exactly, `sampling_params` is left out: then the answer tells a router what it asks for, and cannot
be sent to /inference/v1/generate by mistake. Tensors are never there; `mm_payload: "none"` is what asks for that.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.errors import NotRendered, PromptRejected
from sidecar.images import stored_image
from sidecar.kernels.grid import Geometry
from sidecar.render import chat_template, conversation, image_hash, model_files, placeholders, sampling
from sidecar.render.chat_template import ChatTemplate
from sidecar.render.protocol import CHAT, COMPLETIONS, RenderCall, RenderSettings

MAX_PIXELS: Final = 178_956_970  # VLLM_MAX_IMAGE_PIXELS
MAX_PROMPTS: Final = 1024
MAX_SALT_CHARS: Final = 128
SALT_FORBIDS: Final = frozenset("@/\\\0")
# Members without an effect on the answer, or read by name below.
_COMMON: Final = sampling.KNOWN | frozenset(
    [
        "model",
        "user",
        "request_id",
        "session_id",
        "priority",
        "cache_salt",
        "stream_options",
        "add_special_tokens",
        "mm_payload",
        "return_mm_kwargs",
        "include_reasoning",
        "parallel_tool_calls",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "metadata",
        "store",
    ]
)
KNOWN: Final = {
    CHAT: _COMMON
    | {"messages", "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs", "add_generation_prompt"},
    COMPLETIONS: _COMMON | {"prompt"},
}
# Constraints of the answer: the prompt is the same, the sampling parameters are not given.
CONSTRAINTS: Final = frozenset(
    [
        "response_format",
        "structured_outputs",
        "logit_bias",
        "allowed_token_ids",
        "prompt_logprobs",
        "thinking_token_budget",
        "stream_interval",
        "vllm_xargs",
    ]
)


@dataclass(frozen=True, slots=True)
class _Image:
    """What is known of an image from its header, and what the model's processor makes of it."""

    stored: stored_image.StoredImage
    geometry: Geometry
    hash: str


class Renderer:
    """Renders requests for one model. Its making takes up to some seconds. Raises StartError."""

    def __init__(self, settings: RenderSettings) -> None:
        folder = Path(settings.model)
        self._settings = settings
        self._model = model_files.load(folder)
        source = chat_template.read_source(folder, settings.chat_template)
        self._template = ChatTemplate(source, chat_template.special_tokens(folder)) if source else None
        self._new_digest: Callable[[], image_hash.Digest] | None = None
        if self._model.images is not None:
            self._new_digest = image_hash.hasher(settings.hash_algorithm)

    @property
    def no_images(self) -> str:
        """Why prompts with images are not rendered; "" if they are."""
        return self._model.no_images

    def render(self, call: RenderCall, body: bytes) -> bytes:
        """The answer to a request's body as JSON. Raises NotRendered or PromptRejected."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise PromptRejected("the body is not JSON") from None
        if not isinstance(request, dict):
            raise PromptRejected("the body must be a JSON object")
        request = {name: value for name, value in request.items() if value is not None}
        if unknown := request.keys() - KNOWN[call.api] - CONSTRAINTS:
            raise NotRendered(f"the request has {len(unknown)} members that are not rendered here")
        _check(request, call)
        answer = self._chat(request, call) if call.api == CHAT else self._completions(request, call)
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")

    # --- chat ---

    def _chat(self, request: dict[str, Any], call: RenderCall) -> dict[str, Any]:
        template = self._template
        if template is None:
            raise NotRendered("the model's files have no chat template; name one with --chat-template FILE")
        rules = self._model.images
        text = rules.text if rules is not None else ""
        made = conversation.read(request.get("messages"), takes_parts=template.takes_parts, image_text=text)
        tools = conversation.tools(request.get("tools"))
        if made.images and not _wants_no_tensors(request, call):
            raise NotRendered("tensors are not made here: send mm_payload: none")
        images = [self._image(image, call, f"image {index}") for index, image in enumerate(made.images)]
        prompt = template.render(
            made.messages,
            tools,
            _variables(request),
            add_generation_prompt=request.get("add_generation_prompt", True),
        )
        ids = self._model.encode(prompt, request.get("add_special_tokens", False))
        features = None
        if rules is not None and images:
            ids, places = placeholders.expand(ids, rules.token, [image.geometry.tokens for image in images])
            features = {
                "mm_hashes": {"image": [image.hash for image in images]},
                "mm_placeholders": {"image": [place._asdict() for place in places]},
                "kwargs_data": None,
                "mm_metadata": None,
            }
        is_free = tools is None or request.get("tool_choice") == "none"
        answer = self._answer(request, ids, f"chatcmpl-{_id(request, call)}", features, call, is_free)
        if call.layout:
            answer["images"] = [_layout(image) for image in images]
        return answer

    def _image(self, sent: conversation.SentImage, call: RenderCall, where: str) -> _Image:
        rules, digest = self._model.images, self._new_digest
        if rules is None or digest is None:
            raise NotRendered(self._model.no_images)
        try:
            stored = stored_image.read(sent.data)
        except stored_image.Unclear as e:
            raise NotRendered(f"{where}: {e}") from None
        if stored.height * stored.width > MAX_PIXELS:
            raise PromptRejected(f"{where}: it has more than {MAX_PIXELS} pixels")
        try:
            geometry = rules.spec.geometry(stored.height, stored.width)
        except ValueError as e:
            raise PromptRejected(f"{where}: {e}; the model does not accept such an image") from None
        name = sent.uuid
        if name is None:
            id = call.engine_model or self._settings.model
            name = image_hash.image_hash(digest, id, sent.data, is_rgb=stored.is_rgb)
        return _Image(stored, geometry, name)

    # --- completions ---

    def _completions(self, request: dict[str, Any], call: RenderCall) -> list[dict[str, Any]]:
        prompts = _prompts(request.get("prompt"))
        special = request.get("add_special_tokens", True)
        base = f"cmpl-{_id(request, call)}"
        answers = []
        for index, prompt in enumerate(prompts):
            ids = self._model.encode(prompt, special) if isinstance(prompt, str) else prompt
            id = base if len(prompts) == 1 else f"{base}-{index}"
            answers.append(self._answer(request, ids, id, None, call, True))
        return answers

    # --- both ---

    def _answer(
        self,
        request: Mapping[str, Any],
        ids: list[int],
        request_id: str,
        features: dict[str, Any] | None,
        call: RenderCall,
        is_free: bool,
    ) -> dict[str, Any]:
        most = call.max_model_len
        if not ids:
            raise PromptRejected("the prompt has no tokens")
        if most and len(ids) > most:
            raise PromptRejected(f"the prompt has {len(ids)} tokens and the model takes {most} (--max-model-len)")
        options = request.get("stream_options") if request.get("stream") else None
        if not isinstance(options, dict | None) or (options or {}).keys() - {"include_usage", "continuous_usage_stats"}:
            raise NotRendered("stream_options has members that are not known")
        answer = {
            "request_id": request_id,
            "token_ids": ids,
            "token_offsets": None,
            "features": features,
            "content_parts": None,
            "model": request.get("model"),
            "reasoning_ended": None if request.get("include_reasoning", True) or call.api == COMPLETIONS else True,
            "reasoning_parser_kwargs": None,
            "return_token_ids": None,
            "output_mode": "tokens",
            "stream": bool(request.get("stream")),
            "stream_options": options and {"include_usage": False, "continuous_usage_stats": False} | options,
            "cache_salt": request.get("cache_salt"),
            "priority": request.get("priority", 0),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
        }
        params = None
        if is_free and not CONSTRAINTS & request.keys():
            defaults = self._model.sampling
            params = sampling.sampling_params(request, defaults, len(ids), most, chat=call.api == CHAT)
        if params is not None:
            answer["sampling_params"] = params
        elif call.whole:
            raise NotRendered("the sampling parameters of this request are not rendered here")
        return answer


def _check(request: Mapping[str, Any], call: RenderCall) -> None:
    """What vLLM checks of members that are not rendered. Raises PromptRejected, or NotRendered for another model."""
    if call.names and request.get("model") is not None and request["model"] not in call.names:
        raise NotRendered("the request names another model or adapter than the engine's own")
    for name, (kind, accepts) in OTHER_MEMBERS.items():
        if name in request and (type(request[name]) is not kind or not accepts(request[name])):
            raise NotRendered(f"{name} has a value that is not rendered here")
    if request.get("stream_options") and not request.get("stream"):
        raise PromptRejected("stream_options: only with stream: true")
    if "tools" not in request and request.get("tool_choice", "none") != "none":
        raise PromptRejected("tool_choice: only with tools")
    salt = request.get("cache_salt")
    if salt is not None and not (
        isinstance(salt, str) and 0 < len(salt) <= MAX_SALT_CHARS and SALT_FORBIDS.isdisjoint(salt)
    ):
        raise PromptRejected(f"cache_salt: send text of at most {MAX_SALT_CHARS} characters without @, / and \\")


# Members that are copied or ignored, their types, and the values that vLLM takes.
OTHER_MEMBERS: Final[dict[str, tuple[type, Callable[[Any], bool]]]] = {
    **dict.fromkeys(("model", "user", "request_id", "session_id"), (str, lambda _: True)),
    **dict.fromkeys(
        (
            "add_special_tokens",
            "add_generation_prompt",
            "include_reasoning",
            "parallel_tool_calls",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "return_mm_kwargs",
            "stream",
        ),
        (bool, lambda _: True),
    ),
    "priority": (int, lambda value: -(1 << 63) <= value < 1 << 63),
    "mm_payload": (str, ("none", "tensors").__contains__),
    "reasoning_effort": (str, ("none", "minimal", "low", "medium", "high", "xhigh", "max").__contains__),
}


def _wants_no_tensors(request: Mapping[str, Any], call: RenderCall) -> bool:
    """Whether a request asks for an answer without tensors, vLLM's default; a router never wants them."""
    asked = request.get("mm_payload")
    if asked is None and "return_mm_kwargs" in request:  # the older name
        asked = "tensors" if request["return_mm_kwargs"] else "none"
    return asked == "none" or (asked is None and not call.whole)


def _variables(request: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a request gives its template; None and "auto" are none."""
    given = request.get("chat_template_kwargs", {})
    if not isinstance(given, dict):
        raise PromptRejected("chat_template_kwargs: send an object")
    chat_template.check_variables(given)
    variables = {name: value for name, value in given.items() if value is not None and value != "auto"}
    effort = request.get("reasoning_effort")
    if effort is not None:
        variables["reasoning_effort"] = effort
        if "enable_thinking" not in given:
            variables["enable_thinking"] = effort != "none"
    return variables


def _prompts(prompt: Any) -> list[str | list[int]]:
    """A completion request's prompts: texts, or lists of token ids."""
    one = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int)
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts:
        raise PromptRejected("prompt: send a text, or token ids, or a list of either")
    if len(prompts) > MAX_PROMPTS:
        raise PromptRejected(f"prompt: the limit is {MAX_PROMPTS} prompts")
    if not all(isinstance(p, str) for p in prompts) and not all(_is_ids(p) for p in prompts):
        raise NotRendered("prompt has other items than texts, or lists of token ids")
    return prompts


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(id) is int and id >= 0 for id in prompt)


def _id(request: Mapping[str, Any], call: RenderCall) -> str:
    own = request.get("request_id")
    return call.request_id or (own if isinstance(own, str) else "") or secrets.token_hex(16)


def _layout(image: _Image) -> dict[str, Any]:
    """An image as `/v1/preprocess` reports it in JSON, with its hash for the engine."""
    g = image.geometry
    height, width = g.size
    return {
        "format": image.stored.format,
        "height": height,
        "width": width,
        "grid_thw": [g.grid_t, g.grid_h, g.grid_w],
        "tokens": g.tokens,
        "mm_hash": image.hash,
    }
