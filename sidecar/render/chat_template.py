"""A model's chat template: where it comes from, which form of content it takes, and the prompt that it makes.

Rules, from transformers 5 (utils/chat_template_utils.py) and vLLM 0.32 (renderers/hf.py): a sandboxed Jinja
environment that trims blocks, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls and
`generation` blocks. A template that goes through a message's content piece by piece gets pieces ("parts"); any other
gets one text.

The template is the model's or the operator's, never a request's. Its run time is bounded by the process that runs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sidecar.errors import NotRendered, PromptRejected, StartError

MAX_TEMPLATE_BYTES: Final = 1 << 20
JINJA_FILE: Final = "chat_template.jinja"
# Names that transformers passes itself, or that are the tokenizer's own: a request may not set them.
RESERVED: Final = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "chat_template",
        "conversation",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "continue_final_message",
        "add_generation_prompt",
    ]
)
SPECIAL_TOKENS: Final = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Attributes of tokenizers that some templates read and that files do not tell for certain.
UNKNOWN_NAMES: Final = frozenset(("additional_special_tokens", "extra_special_tokens"))


class GenerationBlock(Extension):
    """`{% generation %}`: marks what the model wrote, for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012  jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

    def _whole(self, caller: Any) -> Any:
        return caller()


class ChatTemplate:
    """A compiled template. Raises StartError for one that cannot be compiled or reads what is not known here."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except TemplateError as e:
            raise StartError(f"the chat template cannot be compiled: {type(e).__name__}") from None
        names = meta.find_undeclared_variables(tree)
        if unknown := sorted(names & UNKNOWN_NAMES):
            raise StartError(f"the chat template reads {unknown[0]}, which the model's files do not tell for certain")
        self.takes_parts = takes_parts(tree)
        self.knows_developer = "'developer'" in source or '"developer"' in source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The prompt's text. Raises PromptRejected, with the template's own words if it rejects the messages."""
        values: dict[str, Any] = {**self._special_tokens, **variables}
        values |= {"messages": messages, "tools": tools, "documents": None}
        try:
            return self._template.render(values, add_generation_prompt=add_generation_prompt)
        except TemplateError as e:
            raise PromptRejected(str(e)[:MAX_REASON_CHARS]) from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as e:
            raise PromptRejected(f"the chat template failed on these messages ({type(e).__name__})") from None


MAX_REASON_CHARS: Final = 300


def read_source(folder: Path, given: str) -> str:
    """The text of a model's chat template: a file that is given, or the one that its files agree on; "" without one.

    Raises StartError where files disagree or name several: which one an engine takes then depends on its version.
    """
    if given:
        return _read(Path(given))
    found = {}
    if (folder / JINJA_FILE).is_file():
        found[JINJA_FILE] = _read(folder / JINJA_FILE)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (value := read_json(folder / name).get("chat_template")) is not None:
            found[name] = value
    if (folder / "additional_chat_templates").is_dir() or not all(isinstance(value, str) for value in found.values()):
        raise StartError("the model has several chat templates; name the engine's with --chat-template FILE")
    if len(set(found.values())) > 1:
        files = " and ".join(found)
        raise StartError(f"{files} have different chat templates; name the engine's with --chat-template FILE")
    return str(next(iter(found.values()), ""))


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokenizer's named special tokens, which templates may print."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json(folder / name)
        for key in SPECIAL_TOKENS:
            value = config.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_variables(given: Mapping[str, Any]) -> None:
    """Raise NotRendered for template variables of a request that are not its own to set."""
    if taken := RESERVED & given.keys():
        raise NotRendered(f"chat_template_kwargs sets {min(taken)}")


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if len(data) > MAX_TEMPLATE_BYTES:
            raise StartError(f"{path.name} is longer than 1 MiB")
        return data.decode()
    except (OSError, UnicodeDecodeError):
        raise StartError(f"{path.name} cannot be read as UTF-8 text") from None


# --- which form of content a template takes ---


def takes_parts(tree: nodes.Template) -> bool:
    """True if a template goes through the content of a message piece by piece, as far as its text shows.

    vLLM's rule: a loop over `x.content` of an `x` that goes through the messages, over a parameter of a macro that is
    called with it, or over a variable named `content`.
    """
    lists = set(_aliases(tree, "messages"))
    messages = {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and any(_leads_to(loop.iter, name) for name in lists)
    }

    def is_content(node: nodes.Node) -> bool:
        return any(_leads_to(node, name, "content") for name in messages)

    within_macros: set[int] = set()
    for macro in tree.find_all(nodes.Macro):
        given = _parameters_given(tree, macro, is_content)
        for loop in macro.find_all(nodes.For):
            within_macros.add(id(loop))
            if isinstance(loop.iter, nodes.Name) and loop.iter.name in given:
                return True
    return any(
        is_content(loop.iter)
        or (isinstance(loop.iter, nodes.Name) and loop.iter.name == "content" and id(loop) not in within_macros)
        for loop in tree.find_all(nodes.For)
    )


def _parameters_given(tree: nodes.Template, macro: nodes.Macro, is_content: Any) -> set[str]:
    """The parameters of a macro that some call gives a message's content."""
    names = [argument.name for argument in macro.args]
    given = set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given |= {name for name, value in zip(names, call.args, strict=False) if is_content(value)}
            given |= {word.key for word in call.kwargs if isinstance(word, nodes.Keyword) and is_content(word.value)}
    return given & set(names)


def _aliases(tree: nodes.Template, name: str) -> Iterator[str]:
    """A variable, and those that it, or a piece of it, is assigned to."""
    seen, waiting = {name}, [name]
    while waiting:
        current = waiting.pop(0)
        yield current
        for assignment in tree.find_all(nodes.Assign):
            target = assignment.target
            if isinstance(target, nodes.Name) and target.name not in seen and _leads_to(assignment.node, current):
                seen.add(target.name)
                waiting.append(target.name)


def _leads_to(node: nodes.Node | None, name: str, key: str = "") -> bool:
    """True for the variable itself, or its member `key`, also through filters, tests and slices."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if key and isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == key and _leads_to_name(node.node, name)
    if key:
        return isinstance(node, nodes.Getattr) and node.attr == key and _leads_to_name(node.node, name)
    return _leads_to_name(node, name)


def _leads_to_name(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


# --- what templates may call ---


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
