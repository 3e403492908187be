// The openai client of npm: what it makes of chat, stream, tools and embeddings, as JSON. Argument: the server's URL.
import { createRequire } from "node:module";

const OpenAI = createRequire(`${process.env.CLIENTS}/`)("openai");
const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "k", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather?" }];
const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object", properties: {} } } }];
const asked = { model: "scripted", messages, max_tokens: 8 };

async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

const chat = await client.chat.completions.create(asked);
const plain = await all(client.chat.completions.create({ ...asked, stream: true }));
const counted = await all(
  client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } }),
);
const called = await client.chat.completions.create({ model: "tools", messages, tools });
const streamed = await client.chat.completions.stream({ model: "tools", messages, tools }).finalChatCompletion();
const vectors = await client.embeddings.create({ model: "scripted", input: "a" });
console.log(
  JSON.stringify({
    models: (await all(client.models.list())).map((model) => model.id),
    chat: [chat.choices[0].message.content, chat.usage],
    stream: plain.map((chunk) => chunk.choices[0].delta.content),
    usage: counted.map((chunk) => chunk.usage),
    tools: called.choices[0].message.tool_calls,
    "streamed tools": streamed.choices[0].message.tool_calls.map((call) => call.function.arguments),
    embeddings: vectors.data.map((item) => item.embedding),
  }),
);
