"""The openai client: what it makes of chat, stream, tools and embeddings, as JSON. Argument: the server's URL."""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="k", max_retries=0)
messages = [{"role": "user", "content": "What is the weather?"}]
tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]

chat = client.chat.completions.create(model="scripted", messages=messages, max_tokens=8)
plain = list(client.chat.completions.create(model="scripted", messages=messages, max_tokens=8, stream=True))
options = {"include_usage": True}
counted = list(
    client.chat.completions.create(
        model="scripted", messages=messages, max_tokens=8, stream=True, stream_options=options
    )
)
called = client.chat.completions.create(model="tools", messages=messages, tools=tools)
with client.chat.completions.stream(model="tools", messages=messages, tools=tools) as events:
    streamed = events.get_final_completion()
vectors = client.embeddings.create(model="scripted", input="a")
print(
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "chat": [chat.choices[0].message.content, chat.usage.model_dump()],
            "stream": [chunk.choices[0].delta.content for chunk in plain],
            "usage": [chunk.usage and chunk.usage.model_dump() for chunk in counted],
            "tools": [call.model_dump() for call in called.choices[0].message.tool_calls],
            "streamed tools": [call.function.arguments for call in streamed.choices[0].message.tool_calls],
            "embeddings": [item.embedding for item in vectors.data],
        }
    )
)
