"""Requests to render, as bodies by name: text, tools, one to eight images, odd images.

Images are made by Pillow, so that their bytes differ between its versions: a recorded answer has its own request.
"""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

CHAT, COMPLETIONS = "/v1/chat/completions/render", "/v1/completions/render"
ORIENTATION = 0x0112
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a <town>.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    },
    {"type": "function", "function": {"name": "time"}},
    {"function": {"name": "strict", "strict": True, "parameters": {}}, "type": "function"},
]


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """A gradient, which takes few bytes."""
    plain = Image.linear_gradient("L").resize((width, height))
    made = Image.merge("RGB", (plain, plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT), plain))
    return made if mode == "RGB" else made.convert(mode)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(how: int) -> bytes:
    """EXIF with an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = how
    return exif.tobytes()


def exif_after_the_pixels(how: int) -> bytes:
    """A PNG whose orientation comes after its pixels."""
    whole = encoded(picture(90, 40), "PNG", exif=turned(how))
    at = whole.index(b"eXIf") - 4
    chunk = whole[at : at + 12 + int.from_bytes(whole[at : at + 4], "big")]
    return whole.replace(chunk, b"")[:-12] + chunk + whole[-12:]


def odd_images() -> dict[str, bytes]:
    """Files by name: rotated by EXIF and XMP, with alpha, palettes, colour keys, grey, CMYK, 16 bits."""
    comment = PngInfo()
    comment.add_text("Comment", "nothing of importance")
    comment.add_itxt("XML:com.adobe.xmp", XMP)
    files = {f"turned-{how}": encoded(picture(120, 50), exif=turned(how)) for how in range(1, 9)}
    return files | {
        "broken-exif": encoded(picture(120, 50), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "xmp": encoded(picture(120, 50), xmp=XMP.encode()),
        "grey": encoded(picture(mode="L")),
        "cmyk": encoded(picture(mode="CMYK")),
        "progressive": encoded(picture(100, 30), progressive=True),
        "png": encoded(picture(70, 130), "PNG"),
        "png-alpha": encoded(picture(mode="RGBA"), "PNG"),
        "png-grey-alpha": encoded(picture(mode="LA"), "PNG"),
        "png-palette": encoded(picture(mode="P"), "PNG"),
        "png-palette-key": encoded(picture(mode="P"), "PNG", transparency=3),
        "png-key": encoded(picture(), "PNG", transparency=(1, 2, 3)),
        "png-one-bit": encoded(picture(mode="1"), "PNG"),
        "png-16-bit": encoded(picture(mode="I;16"), "PNG"),
        "png-turned": encoded(picture(90, 40), "PNG", exif=turned(8)),
        "png-turned-late": exif_after_the_pixels(6),
        "png-xmp": encoded(picture(90, 40), "PNG", pnginfo=comment),
        "webp": encoded(picture(50, 60), "WEBP"),
        "webp-lossless": encoded(picture(50, 60), "WEBP", lossless=True),
        "webp-alpha": encoded(picture(50, 60, "RGBA"), "WEBP"),
        "webp-lossless-alpha": encoded(see_through(50, 60), "WEBP", lossless=True),
        "webp-turned": encoded(picture(50, 90), "WEBP", exif=turned(5)),
        "webp-xmp": encoded(picture(50, 90), "WEBP", xmp=XMP.encode()),
        "tiny": encoded(picture(3, 2), "PNG"),
        "long": encoded(picture(1500, 20), "PNG"),
    }


def see_through(width: int, height: int) -> Image.Image:
    """An image with transparent parts."""
    made = picture(width, height, "RGBA")
    made.putalpha(Image.linear_gradient("L").resize((width, height)))
    return made


def image_part(data: bytes, **more: str) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/any;base64,{base64.b64encode(data).decode()}"},
        **more,
    }


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages), "mm_payload": "none", **more}


def call(arguments: str, id: str = "call-1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def assistant(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", **more}


def text_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Requests without images: name -> (path, body)."""
    hello = user("Describe a picture, please.")
    history = (
        {"role": "system", "content": "You are a sidecar."},
        hello,
        assistant(content="It is <b>green</b> & 'quiet'."),
        user("Über 漢字 🙂 naïve\n\n  spaces\tand a line"),
    )
    used = (hello, assistant(content=None, tool_calls=[call('{"town": "Köln", "days": [1, 2]}')]))
    result = {"role": "tool", "tool_call_id": "call-1", "content": "sunny"}
    chats = {
        "plain": chat(hello),
        "history": chat(*history),
        "empty": chat(user("")),
        "no-content": chat(user([])),
        "special-tokens-in-text": chat(user("a<|im_end|>b<|im_start|>system\n<|vision_start|>c")),
        "parts": chat(user([text_part("one"), text_part(""), text_part("two")])),
        "billing-line": chat({"role": "system", "content": "x-anthropic-billing-header: cch=1\nBe kind."}, hello),
        "billing-part": chat(
            {"role": "system", "content": [text_part("x-anthropic-billing-header: cch=1"), text_part("Be kind.")]},
            hello,
        ),
        "name": chat(hello | {"name": "Ada"}),
        "reasoning": chat(hello, assistant(content="4", reasoning="2 and 2"), user("why?")),
        "reasoning-content": chat(hello, assistant(content="4", reasoning_content="2 and 2"), user("why?")),
        "tools": chat(hello, tools=TOOLS, tool_choice="none"),
        "tool-call": chat(*used, result, tools=TOOLS, tool_choice="none"),
        "tool-call-not-json": chat(hello, assistant(content="", tool_calls=[call("{damaged")]), result),
        "tool-call-no-object": chat(
            hello, assistant(content="x", tool_calls=[call("[1]"), call("", "call-2")]), result
        ),
        "no-tool-calls": chat(hello, assistant(content="x", tool_calls=[]), hello),
        "tool-parts": chat(*used, result | {"content": [text_part("sunny"), text_part("and warm")]}),
        "tool-empty": chat(*used, result | {"content": []}),
        "no-generation-prompt": chat(hello, add_generation_prompt=False),
        "special-tokens": chat(hello, add_special_tokens=True),
        "thinking-off": chat(hello, chat_template_kwargs={"enable_thinking": False, "unused": [1]}),
        "thinking-auto": chat(hello, chat_template_kwargs={"enable_thinking": "auto", "reasoning_effort": None}),
        "effort": chat(hello, reasoning_effort="low"),
        "effort-none": chat(hello, reasoning_effort="none"),
        "effort-and-thinking": chat(hello, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}),
        "no-reasoning": chat(hello, include_reasoning=False),
        "sampled": chat(hello, temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, seed=7, max_tokens=99),
        "greedy": chat(hello, temperature=0, top_p=0.5, max_completion_tokens=5, seed=-1),
        "cold": chat(hello, temperature=0.001),
        "penalties": chat(hello, presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=1.2),
        "stops": chat(hello, stop=["END", "."], stop_token_ids=[3, 4, 3], bad_words=["no"], max_tokens=16),
        "one-stop": chat(hello, stop="##", include_stop_str_in_output=True, ignore_eos=True, min_tokens=3),
        "short-stop": chat(hello, stop="#"),
        "several": chat(hello, n=3, logprobs=True, top_logprobs=4, skip_special_tokens=False),
        "logprobs-alone": chat(hello, logprobs=True, spaces_between_special_tokens=False),
        "streamed": chat(hello, stream=True, stream_options={"include_usage": True}),
        "salted": chat(hello, cache_salt="salt", priority=3, user="someone", request_id="mine"),
        "too-many-tokens": chat(hello, max_tokens=4000),
    }
    completions = {
        "completion": {"prompt": "Once upon a time <|im_end|>"},
        "completions": {"prompt": ["one", "and two", "", "three"][:2], "max_tokens": 3},
        "completion-ids": {"prompt": [5, 6, 7], "logprobs": 2, "temperature": 0.0},
        "completions-ids": {"prompt": [[5], [6, 7]], "add_special_tokens": False},
        "completion-defaults": {"prompt": "x", "max_tokens": None, "stop": "y", "n": 2, "stream": True},
    }
    return {name: (CHAT, body) for name, body in chats.items()} | {
        name: (COMPLETIONS, {"model": "tiny", **body}) for name, body in completions.items()
    }


def image_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Requests with images: name -> (path, body)."""
    photo = encoded(picture(320, 240))
    several = [image_part(encoded(picture(60 + 40 * n, 200 - 20 * n))) for n in range(8)]
    chats = {f"images-{n}": chat(user([*several[:n], text_part("What are these?")])) for n in (1, 2, 3, 8)}
    chats |= {f"odd-{name}": chat(user([text_part("?"), image_part(data)])) for name, data in odd_images().items()}
    chats |= {
        "image-last": chat(user([text_part("a"), image_part(photo), text_part("b"), several[0]])),
        "image-alone": chat(user([image_part(photo)])),
        "images-in-turns": chat(
            user([image_part(photo)]), assistant(content="a dog"), user([text_part("and?"), several[3]]), stream=True
        ),
        "image-twice": chat(user([image_part(photo), image_part(photo)])),
        "named-image": chat(user([image_part(photo, uuid="my own name"), several[2]])),
        "720p": chat(user([image_part(encoded(picture(1280, 720))), text_part("a")])),
        "image-and-tools": chat(user([image_part(photo)]), tools=TOOLS, tool_choice="none"),
        "image-no-payload": chat(user([image_part(photo)]), return_mm_kwargs=False) | {"mm_payload": None},
    }
    return {name: (CHAT, {k: v for k, v in body.items() if v is not None}) for name, body in chats.items()}
