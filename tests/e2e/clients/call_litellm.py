"""litellm: what it makes of chat, stream, tools and embeddings, as JSON. Argument: the server's URL."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is downloaded

import litellm

server = {"api_base": f"{sys.argv[1]}/v1", "api_key": "k", "num_retries": 0}
messages = [{"role": "user", "content": "What is the weather?"}]
tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
asked = {"model": "openai/scripted", "messages": messages, "max_tokens": 8, **server}

chat = litellm.completion(**asked)
chunks = list(litellm.completion(**asked, stream=True))
counted = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
called = litellm.completion(model="openai/tools", messages=messages, tools=tools, **server)
vectors = litellm.embedding(model="openai/scripted", input=["a"], **server)
print(
    json.dumps(
        {
            "chat": [chat.choices[0].message.content, chat.usage.total_tokens],
            "stream": [chunk.choices[0].delta.content for chunk in chunks if chunk.choices],
            "usage": [chunk.usage.total_tokens for chunk in counted if getattr(chunk, "usage", None)],
            "tools": [call.function.arguments for call in called.choices[0].message.tool_calls],
            "embeddings": [item["embedding"] for item in vectors.data],
        }
    )
)
