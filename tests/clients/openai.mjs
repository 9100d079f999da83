// The client of OpenAI for Node.js: text, streams, tools, errors, cancelling.
import assert from 'node:assert/strict';
import test from 'node:test';
import OpenAI from 'openai';

const { BASE_URL, MODEL, KEY, TEXT, SCRIPTED_URL, SCRIPTED_MODEL } = process.env;
const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: KEY, maxRetries: 0 });
const ask = { model: MODEL, messages: [{ role: 'user', content: 'Speak of the sea.' }], max_tokens: 40, seed: 7 };

test('models', async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, [MODEL]);
});

test('the text is that of `sluice run`, streamed or not', async () => {
  const whole = await client.chat.completions.create(ask);
  assert.equal(whole.choices[0].message.content, TEXT);
  let text = '';
  for await (const event of await client.chat.completions.create({ ...ask, stream: true })) {
    text += event.choices[0]?.delta?.content ?? '';
  }
  assert.equal(text, TEXT);
  const completion = await client.chat.completions.stream({ ...ask }).finalChatCompletion();
  assert.equal(completion.choices[0].message.content, TEXT);
});

test('tools', async () => {
  const scripted = new OpenAI({ baseURL: `${SCRIPTED_URL}/v1`, apiKey: KEY, maxRetries: 0 });
  const said = [];
  const tool = (name) => ({
    type: 'function',
    function: {
      name,
      parameters: { type: 'object', properties: {} },
      parse: JSON.parse,
      function: (given) => {
        said.push([name, given]);
        return `ship ${said.length - 1}`;
      },
    },
  });
  const runner = scripted.chat.completions.runTools({
    model: SCRIPTED_MODEL,
    messages: [{ role: 'user', content: 'Two calls, please.' }],
    tools: [tool('look'), tool('wait')],
    max_tokens: 800,
    stream: true,
  });
  assert.equal(await runner.finalContent(), 'Both are done: <b>äöü</b> & 🌊.');
  assert.deepEqual(said, [
    ['look', { calm: true, colour: 'grey', ships: 10, note: 'ä </think> "x"' }],
    ['wait', {}],
  ]);
});

test('errors', async () => {
  const wrong = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: 'wrong', maxRetries: 0 });
  await assert.rejects(wrong.chat.completions.create(ask), OpenAI.AuthenticationError);
  await assert.rejects(client.models.retrieve('no-such-model'), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...ask, temperature: -1 }), OpenAI.BadRequestError);
});

test('a client that goes away frees its place', async () => {
  const stream = await client.chat.completions.create({ ...ask, max_tokens: 20000, stream: true });
  for await (const event of stream) {
    if (event.choices[0]?.delta?.content) break;
  }
  stream.controller.abort();
  const headers = { authorization: `Bearer ${KEY}` };
  const running = async () => {
    const status = await (await fetch(`${BASE_URL}/status`, { headers })).json();
    const { queued, reading, decoding } = status.models[0].status;
    return queued + reading + decoding;
  };
  const end = Date.now() + 2000;
  while ((await running()) > 0) {
    assert.ok(Date.now() < end, 'it still runs after two seconds');
    await new Promise((done) => setTimeout(done, 20));
  }
});
