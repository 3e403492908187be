"""The anthropic client: what it makes of a message, a stream and tools, as JSON. Argument: the server's URL."""

import json
import sys

from anthropic import Anthropic

client = Anthropic(base_url=sys.argv[1], api_key="k", max_retries=0)
messages = [{"role": "user", "content": "What is the weather?"}]
tools = [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}]

message = client.messages.create(model="scripted", max_tokens=8, messages=messages)
with client.messages.stream(model="scripted", max_tokens=8, messages=messages) as stream:
    texts = list(stream.text_stream)
    usage = stream.get_final_message().usage
with client.messages.stream(model="tools", max_tokens=8, messages=messages, tools=tools) as stream:
    called = stream.get_final_message()
print(
    json.dumps(
        {
            "chat": [message.content[0].text, message.usage.output_tokens],
            "stream": texts,
            "usage": [usage.input_tokens, usage.output_tokens],
            "tools": [block.model_dump() for block in called.content if block.type == "tool_use"],
        }
    )
)
