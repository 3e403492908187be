"""langchain-openai: what it makes of chat, stream, tools and embeddings, as JSON. Argument: the server's URL."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

server = {"base_url": f"{sys.argv[1]}/v1", "api_key": "k", "max_retries": 0}


def weather() -> str:
    """The weather."""
    return "fair"


chat = ChatOpenAI(model="scripted", max_tokens=8, **server)
tools = ChatOpenAI(model="tools", **server).bind_tools([weather])
# the other way of embedding cuts texts by a tokenizer that it downloads
embeddings = OpenAIEmbeddings(model="scripted", check_embedding_ctx_length=False, **server)
said = chat.invoke("What is the weather?")
print(
    json.dumps(
        {
            "chat": [said.content, said.usage_metadata],
            "stream": [chunk.content for chunk in chat.stream("What is the weather?")],
            "usage": [chunk.usage_metadata for chunk in chat.stream("What is the weather?", stream_usage=True)],
            "tools": tools.invoke("What is the weather?").tool_calls,
            "embeddings": embeddings.embed_documents(["a"]),
        }
    )
)
