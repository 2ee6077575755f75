// The page at /: chat, sessions with their documents, and citations. It loads nothing from elsewhere and keeps nothing
// but the API key, for as long as the tab is open. It does not know how answers are made.
"use strict";

const $ = (id) => document.getElementById(id);
let model = "";
let session = null; // name of the session that is asked; null: the model alone
let turns = []; // of a conversation without a session
let under_way = null; // AbortController of the answer that is being written

async function call(path, how = {}) {
  const headers = { ...how.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (how.json !== undefined) {
    headers["Content-Type"] = "application/json";
    how = { ...how, method: "POST", body: JSON.stringify(how.json) };
  }
  const answer = await fetch(path, { ...how, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) $("key-form").hidden = false;
  let told = `${answer.status} ${answer.statusText}`;
  try { told = (await answer.json()).error.message; } catch { /* no JSON: the status says it */ }
  throw new Error(told);
}

// Run something that may fail, and tell if it does.
async function doing(work) {
  $("notice").textContent = "";
  try { return await work(); } catch (error) {
    if (error.name !== "AbortError") $("notice").textContent = error.message;
  }
}

function element(tag, text = "", of = {}) {
  const made = Object.assign(document.createElement(tag), of);
  if (text) made.textContent = text;
  return made;
}

async function refresh() {
  const listed = await (await call("/v1/sessions")).json();
  const choice = (name, title) => {
    const button = element("button", title, { type: "button", onclick: () => doing(() => choose(name)) });
    button.setAttribute("aria-current", String(name === session));
    const item = element("li");
    item.append(button);
    return item;
  };
  $("sessions").replaceChildren(choice(null, "No session"), ...listed.data.map((each) => choice(each.id, each.id)));
  const chosen = listed.data.find((each) => each.id === session);
  $("documents").hidden = !chosen;
  $("document-list").replaceChildren(...(chosen ? chosen.documents : []).map((each) => {
    const item = element("li", each.name);
    item.append(element("span", `${each.tokens.toLocaleString()} tokens`));
    return item;
  }));
}

async function choose(name) {
  if (under_way) under_way.abort();
  session = name;
  turns = [];
  $("talk").replaceChildren();
  await refresh();
  $("question").focus();
}

function say(text, kind) {
  const article = element("article", "", { className: kind });
  const words = element("p", text);
  article.append(words);
  $("talk").append(article);
  article.scrollIntoView({ block: "end" });
  return [article, words];
}

// Yield the JSON of a stream's events; comments tell how far reading is.
async function* events(answer, progress) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith(": read")) progress(line.slice(2));
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function ask(question) {
  say(question, "asked");
  const [article, words] = say("", "waiting");
  under_way = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  let text = "";
  let whole = null;
  try {
    const path = session === null ? "/v1/chat/completions" : `/v1/sessions/${encodeURIComponent(session)}/ask`;
    const messages = [...turns, { role: "user", content: question }];
    const json = session === null ? { model, messages, stream: true } : { question, stream: true };
    const answer = await call(path, { json, signal: under_way.signal });
    for await (const event of events(answer, (told) => { if (!text) words.textContent = `${told} `; })) {
      if (event.object === "session.answer") whole = event;
      else text += event.delta ?? event.choices?.[0]?.delta?.content ?? "";
      if (text) words.textContent = text;
      article.scrollIntoView({ block: "end" });
    }
    if (!text) words.textContent = "(the model gave no answer)";
    turns.push({ role: "user", content: question }, { role: "assistant", content: text });
    if (whole) cite(article, whole);
    article.scrollIntoView({ block: "end" });
  } finally {
    article.classList.remove("waiting");
    if (!words.textContent) words.textContent = "(stopped)";
    under_way = null;
    $("send").hidden = false;
    $("stop").hidden = true;
  }
}

function cite(article, whole) {
  const usage = whole.usage;
  const cached = usage.prompt_tokens_details.cached_tokens;
  if (whole.citations.length) {
    const count = whole.citations.length;
    const details = element("details");
    details.append(element("summary", count === 1 ? "1 passage" : `${count} passages`));
    for (const each of whole.citations) {
      const quote = element("blockquote", each.text);
      quote.append(element("cite", `${each.doc}, characters ${each.start} to ${each.end}`));
      details.append(quote);
    }
    article.append(details);
  }
  article.append(element("small", `${usage.prompt_tokens.toLocaleString()} tokens, ${cached.toLocaleString()} of them cached`));
}

$("ask-form").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || under_way) return;
  $("question").value = "";
  doing(() => ask(question));
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask-form").requestSubmit();
  }
};
$("stop").onclick = () => under_way?.abort();
$("new-form").onsubmit = (event) => {
  event.preventDefault();
  doing(async () => {
    const name = $("new-name").value;
    await call("/v1/sessions", { json: { name } });
    $("new-name").value = "";
    await choose(name);
  });
};
$("files").onchange = () => doing(async () => {
  const body = new FormData();
  for (const file of $("files").files) body.append("files", file);
  const [article, words] = say("Reading the documents …", "waiting");
  try {
    await call(`/v1/sessions/${encodeURIComponent(session)}/files`, { method: "POST", body });
    words.textContent = "The documents are read.";
  } catch (error) {
    article.remove();
    throw error;
  } finally {
    article.classList.remove("waiting");
    $("files").value = "";
    await refresh();
  }
});
$("delete").onclick = () => doing(async () => {
  if (!confirm(`Delete the session ${session} and what it has read?`)) return;
  await call(`/v1/sessions/${encodeURIComponent(session)}`, { method: "DELETE" });
  await choose(null);
});
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
  doing(begin);
};

async function begin() {
  model = (await (await call("/v1/models")).json()).data[0].id;
  $("model").textContent = model;
  await refresh();
}
doing(begin);
