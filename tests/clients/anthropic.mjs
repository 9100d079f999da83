// The client of Anthropic for Node.js: text, streams, tools, errors.
import assert from 'node:assert/strict';
import test from 'node:test';
import Anthropic from '@anthropic-ai/sdk';

const { BASE_URL, MODEL, KEY, GREEDY, SCRIPTED_URL, SCRIPTED_MODEL } = process.env;
const client = new Anthropic({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0 });
const ask = {
  model: MODEL,
  messages: [{ role: 'user', content: 'Speak of the sea.' }],
  max_tokens: 40,
  temperature: 0,
};
const text = (message) => message.content.map((block) => block.text ?? '').join('');

test('the text is that of `sluice run`, streamed or not', async () => {
  assert.equal(text(await client.messages.create(ask)), GREEDY);
  assert.equal(text(await client.messages.stream(ask).finalMessage()), GREEDY);
});

test('tools', async () => {
  const scripted = new Anthropic({ baseURL: SCRIPTED_URL, apiKey: KEY, maxRetries: 0 });
  const tools = ['look', 'wait'].map((name) => ({ name, input_schema: { type: 'object', properties: {} } }));
  const messages = [{ role: 'user', content: 'Two calls, please.' }];
  const settings = { model: SCRIPTED_MODEL, max_tokens: 2000, tools, messages };
  const message = await scripted.messages.stream(settings).finalMessage();
  assert.equal(message.stop_reason, 'tool_use');
  const calls = message.content.filter((block) => block.type === 'tool_use');
  assert.deepEqual(
    calls.map((call) => [call.name, call.input]),
    [
      ['look', { calm: true, colour: 'grey', ships: 10, note: 'ä </think> "x"' }],
      ['wait', {}],
    ],
  );
  const results = calls.map((call, i) => ({ type: 'tool_result', tool_use_id: call.id, content: `ship ${i}` }));
  messages.push({ role: 'assistant', content: message.content }, { role: 'user', content: results });
  assert.equal(text(await scripted.messages.create(settings)), 'Both are done: <b>äöü</b> & 🌊.');
});

test('counting and errors', async () => {
  const { model, messages } = ask;
  assert.ok((await client.messages.countTokens({ model, messages })).input_tokens > 0);
  const wrong = new Anthropic({ baseURL: BASE_URL, apiKey: 'wrong', maxRetries: 0 });
  await assert.rejects(wrong.messages.create(ask), Anthropic.AuthenticationError);
  await assert.rejects(client.messages.create({ ...ask, max_tokens: 0 }), Anthropic.BadRequestError);
});
