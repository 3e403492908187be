"""The members of a request that are read: where engines look for a prompt, and the options that matter here."""

from __future__ import annotations

from typing import Final

# Keys that engines read prompts from. Everything below them counts as prompt text, token ids, or media.
PROMPT_KEYS: Final = (
    *("messages", "prompt", "input", "inputs", "text", "system", "instructions", "tools", "suffix", "content"),
    *("input_ids", "token_ids", "prompt_token_ids", "query", "queries", "documents", "text_1", "text_2", "items"),
    *("input_prefix", "input_suffix", "input_extra"),  # llama.cpp's
    *("texts", "message", "chat_history", "preamble"),  # Cohere's
    *("state", "questions", "data_1", "data_2", "instances"),  # of decisions, vLLM's scores, Vertex's
    *("context", "template", "chat_template_kwargs"),  # Ollama's, vLLM's
    *("text_input", "sentences"),  # Triton's, TEI's
)
# Of these, what may be an object that holds the list of prompts, and its lists.
LIST_HOLDERS: Final = ("documents", "text_2", "data_2", "items", "inputs")  # vLLM's, and the last one is TEI's
HELD_LISTS: Final = ("content", "sentences")
# What engines print into a prompt as JSON.
PRINTED_PROMPT_KEYS: Final = ("tools", "state", "questions")
# Limits of one choice's output tokens, by precedence; nested ones are TGI's, SGLang's and Ollama's.
OUTPUT_KEYS: Final = (
    *("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens"),
    *("n_predict", "num_predict"),  # llama.cpp's, Ollama's
)
LEAST_OUTPUT_KEYS: Final = ("min_tokens", "min_new_tokens")  # of one answer
CHOICE_KEYS: Final = ("n", "best_of", "n_cmpl")  # answers to one prompt; the last one is llama.cpp's
OUTPUT_HOLDERS: Final = ("parameters", "sampling_params", "options")
# Members that make a request wait for something of its own, while later ones are served: a grammar that is compiled, KV
# blocks or weights that are fetched, a slot. Those of holders are TGI's and SGLang's.
# vLLM: entrypoints/openai/chat_completion/protocol.py (earlier versions: `guided_*`); SGLang:
# srt/entrypoints/openai/protocol.py.
GRAMMARS: Final = (
    *("response_format", "structured_outputs", "structural_tag", "json_schema", "regex", "ebnf", "grammar"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"),
    *("output_format", "guided_decoding"),  # Anthropic's, TensorRT-LLM's
)
TRANSFERS: Final = (
    *("kv_transfer_params", "ec_transfer_params", "bootstrap_room", "bootstrap_host", "disaggregated_params"),
    *("lora_path", "lora_request", "lora", "adapter_id"),  # SGLang's, TensorRT-LLM's, llama.cpp's, TGI's
    *("routed_dp_rank", "data_parallel_rank"),
)
FORMAT_HOLDERS: Final = ("text", "output_config")  # the responses API's, Anthropic's
# Members that configure vLLM's own image processing: the images are then left to the engine.
PROCESSING_OPTIONS: Final = ("mm_processor_kwargs", "media_io_kwargs")
# Objects whose members are read even if they are long.
HOLDERS: Final = (*OUTPUT_HOLDERS, *FORMAT_HOLDERS, "reasoning", "stream_options")
# All that is parsed, by precedence.
OPTION_KEYS: Final = (
    *(
        "model",
        "stream",
        "stream_options",
        *CHOICE_KEYS,
        "priority",
        *OUTPUT_KEYS,
        *OUTPUT_HOLDERS,
        *LEAST_OUTPUT_KEYS,
        "ignore_eos",
    ),
    *("tool_choice", "function_call", "id_slot", "reasoning_effort", "reasoning", "include_reasoning"),
    *("stream_reasoning", *PROCESSING_OPTIONS, *GRAMMARS, *TRANSFERS, *FORMAT_HOLDERS),
    *("format", "effort", "include_usage"),  # of holders
    *("size", "num_inference_steps"),  # of pictures: OpenAI's, vLLM-Omni's and SGLang's
)
# Members of which only the content matters: media next to the prompt (Ollama's, Cohere's, SGLang's).
HELD_KEYS: Final = (
    *("functions", "images", "image_data", "audio_data", "video_data", "audio", "videos"),
    *("input_embeds", "prompt_embeds"),  # SGLang's, vLLM's
)

IMAGE_TYPES: Final = ("image_url", "input_image", "image", "image_pil", "image_embeds")
AUDIO_TYPES: Final = ("input_audio", "audio_url", "audio")
VIDEO_TYPES: Final = ("video_url", "input_video", "video")
# Of a part, or the name of its only member if it has no type.
MEDIA_TYPES: Final = frozenset((*IMAGE_TYPES, *AUDIO_TYPES, *VIDEO_TYPES))
TEXT_KEYS: Final = ("text", "content")  # read by engines regardless of the part's type
IMAGES_KEYS: Final = ("images", "multimodal_data")  # lists in a message (Ollama's) or a prompt (llama.cpp's)
PRINTED_KEYS: Final = frozenset(("tools", "tool", "arguments"))  # JSON that engines print into the prompt
BINARY_KEYS: Final = frozenset(("data", "file_data"))  # base64 in every API: documents, files, embeddings
SEALED_KEYS: Final = frozenset(("signature", "encrypted_content"))  # of thoughts that a client sends back: no prompt
