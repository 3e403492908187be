"""Bodies that are small for their sender and costly for whoever parses them, and honest ones of the same length."""

from __future__ import annotations

import json
from collections.abc import Callable

PIXEL = b"data:image/png;base64,AAAA"
TEXT = b"The quick brown fox jumps over the lazy dog. "


def _messages(item: bytes) -> Callable[[int], bytes]:
    return lambda size: b'{"messages":[%b]}' % b",".join([item] * (size // (len(item) + 1)))


def _parts(part: bytes) -> Callable[[int], bytes]:
    return lambda size: b'{"messages":[{"content":[%b]}]}' % b",".join([part] * (size // (len(part) + 1)))


def _prompt(inside: bytes) -> Callable[[int], bytes]:
    return lambda size: b'{"prompt":"%b"}' % (inside * (size // len(inside)))


def _members(size: int) -> bytes:
    return b"{%b}" % b",".join(b'"%07d":%d' % (n, n % 10) for n in range(size // 12))


def _deep(size: int) -> bytes:
    """Nests of 900 lists, side by side."""
    nest = b"[" * 900 + b"]" * 900
    return b'{"messages":[%b]}' % b",".join([nest] * (size // (len(nest) + 1)))


SHAPES: dict[str, Callable[[int], bytes]] = {
    "one long text": _prompt(TEXT),
    "Chinese text": _prompt("敏捷的棕色狐狸跳过了懒狗。".encode()),
    "Cyrillic text": _prompt("Съешь ещё этих мягких булок. ".encode()),
    "code with escapes": _prompt(json.dumps('if x == "a\\n":\n\treturn f("b")\n')[1:-1].encode()),
    "chat of short messages": _messages(b'{"role":"user","content":"%b"}' % TEXT),
    "one image": lambda size: (
        b'{"messages":[{"content":[{"type":"image_url","image_url":{"url":"%b"}}]}]}' % (PIXEL + b"ABCD" * (size // 4))
    ),
    "token ids": lambda size: b'{"prompt":[%b]}' % b",".join(b"%d" % (n * 7919 % 128_000) for n in range(size // 7)),
    "empty objects": _messages(b"{}"),
    "empty lists": _messages(b"[]"),
    "empty texts": _messages(b'""'),
    "deep nests": _deep,
    "digits": lambda size: b'{"prompt":[%b]}' % b",".join([b"1"] * (size // 2)),
    "long keys": _messages(b'{"%b":1}' % (b"k" * 1000)),
    "one key of all": lambda size: b'{"messages":[{"%b":1}]}' % (b"k" * size),
    "many members": _members,
    "one member again and again": lambda size: b"{%b}" % b",".join([b'"messages":[]'] * (size // 14)),
    "one key again and again": lambda size: b'{"messages":[{%b}]}' % b",".join([b'"text":""'] * (size // 10)),
    "unknown keys": lambda size: b'{"messages":[{%b}]}' % b",".join(b'"%06d":1' % n for n in range(size // 11)),
    "escapes": _prompt(b"\\n"),
    "escaped characters": _prompt(b"\\u00e9"),
    "surrogate pairs": _prompt(b"\\ud83d\\ude00"),
    "escaped keys": _messages(b'{"\\u0074ype":"\\u0074ext"}'),
    "tiny images": _parts(b'{"type":"image_url","image_url":"%b"}' % PIXEL),
    "tiny links": _parts(b'{"type":"image_url","image_url":{"url":"http://a/"}}'),
    "tiny sounds": _parts(b'{"type":"input_audio","input_audio":{"data":"AAAA","format":"wav"}}'),
    "tiny images of Ollama": lambda size: b'{"messages":[{"images":[%b]}]}' % b",".join([b'"AAAA"'] * (size // 7)),
    "tiny images of SGLang": lambda size: b'{"text":"a","image_data":[%b]}' % b",".join([b'"AAAA"'] * (size // 7)),
    "tiny images of Anthropic": _parts(b'{"type":"image","source":{"type":"base64","data":"AAAA"}}'),
    "lists of token ids": lambda size: b'{"prompt":[%b]}' % b",".join([b"[1,2]"] * (size // 6)),
    "vectors": lambda size: b'{"input_embeds":[%b]}' % b",".join([b"[0.5,0.25]"] * (size // 11)),
    "tools": lambda size: b'{"tools":[%b]}' % b",".join([b'{"a":[1.5,"\\n"]}'] * (size // 17)),
    "images that are none": _messages(b'{"type":"image","x":{"data":{"data":"a"}}}'),
    "nested in binary": lambda size: (
        b'{"messages":[%b]}' % b",".join([b'{"data":{"x":"a","data":' * 200 + b"1" + b"}}" * 200] * (size // 5400 or 1))
    ),
    "blanks": lambda size: b'{"model":"m",%b"prompt":"a"}' % (b" " * size),
    "a long number": lambda size: b'{"temperature":0.%b}' % (b"1" * size),
    "long options": lambda size: (
        b'{"stream":false,"stream_options":{%b},"sampling_params":{"a":"%b"}}'
        % (b",".join([b'"a":[]'] * (size // 14)), b"b" * (size // 2))
    ),
}
