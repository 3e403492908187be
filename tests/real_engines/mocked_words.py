"""A folder that Dynamo's mocker takes for a model: a tokenizer and a configuration, no weights.

    PYTHON mocked_words.py words DIR

The mocker makes up ids from 1000 to 1999. Each of them decodes to the same word, so that its streams show text as they
come, and equal requests have equal answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

WORDS = 2048
END = "<|im_end|>"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}assistant:"


def main(kind: str, folder: str) -> None:
    """Write the folder; `kind` is "words", the only one."""
    assert kind == "words", kind
    directory = Path(folder)
    directory.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [END, *letters, *(f"Ġword{n}" for n in range(WORDS - len(letters) - 1))]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("word[0-9]+"), "word"), decoders.ByteLevel()])
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "chat_template": TEMPLATE,
            "model_max_length": 8192,
        },
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": WORDS,
            "eos_token_id": 0,
            "max_position_embeddings": 8192,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    }
    for name, content in settings.items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
