"use strict";
// The form, and what happens when it is sent.

const MOST_TOKENS = 2048; // differences between two longer answers would take long to find
const SECONDS_BETWEEN_TRIES = 2;
const NAMES_OF_PARTS = { tokens: "tokens", answers: "answers", "ROUGE-L": "words" };
const NAMES = { full: "Full model", early_exit: "Early exit", self_speculative: "Self-speculative" };

const at = (id) => document.getElementById(id);
const kind = () => at("form").elements.kind.value;

let model = null; // as /page/model describes it
let exits = null;
let thresholds = null; // the server's, until the slider is moved
let running = null; // AbortController of the request that runs
let messages = []; // of the chat

// What the server has.

async function learn() {
  for (;;) {
    try {
      model = await (await request("page/model", { key: at("key").value })).json();
      break;
    } catch (error) {
      at("model").textContent = inWords(error);
      at("key-field").hidden &&= error.status !== 401;
      await tryAgain(error.status === 401);
    }
  }
  exits = new Exits(model.num_layers, model.exit_layers);
  const layers = model.exit_layers.length ? `exits after layers ${model.exit_layers.join(", ")}` : "no exits";
  at("model").textContent =
    `${model.name}: ${model.num_layers} layers, ${layers}, up to ${model.num_positions} tokens`;
  fill();
  at("fields").disabled = at("send").disabled = false;
  at("prompt").focus();
}

/** After a while, or when a key has been entered. */
function tryAgain(needsKey) {
  return new Promise((resolve) => {
    if (needsKey) {
      at("key").focus();
      at("key").addEventListener("change", resolve, { once: true });
    } else {
      setTimeout(resolve, 1000 * SECONDS_BETWEEN_TRIES);
    }
  });
}

/** What can be chosen, and the server's defaults. */
function fill() {
  const { defaults } = model;
  thresholds = defaults.exit_thresholds;
  at("threshold").value = thresholds[0];
  at("max-tokens").max = Math.min(model.num_positions, MOST_TOKENS);
  at("max-tokens").value = Math.min(at("max-tokens").value, Math.ceil(model.num_positions / 2));
  for (const layer of model.leaving_layers) {
    const box = element("input", { type: "checkbox", value: layer, checked: defaults.exit_layers.includes(layer) });
    at("exits").append(element("label", {}, [box, ` after layer ${layer}`]));
  }
  at("score").value = defaults.exit_score;
  for (const layer of model.drafting_layers) {
    at("draft").append(element("option", { value: layer, textContent: `the exit after layer ${layer}` }));
  }
  at("draft").append(element("option", { value: "ngram", textContent: "earlier text (n-grams)" }));
  if (model.drafting_layers.length) {
    at("draft").append(element("option", { value: "both", textContent: "an exit or earlier text, whichever promises more" }));
  }
  at("draft").value = defaults.draft_source === "exit" ? defaults.draft_exit : defaults.draft_source;
  for (const { level, of } of model.certified) {
    const words = `Certified: ${Number((100 * level).toFixed(4))}% of the ${NAMES_OF_PARTS[of]} are the full model's`;
    at("promise").append(element("option", { value: level, textContent: words }));
  }
  at("promise").value = defaults.certified ?? "";
  const hasExits = model.exit_layers.length > 0;
  const canLeave = model.leaving_layers.length > 0, canDraft = model.drafting_layers.length > 0;
  // Who opens the page wants to see exits at work, also where the server's own default is the full model.
  const shown = canLeave ? "early_exit" : canDraft ? "self_speculative" : "full";
  at("mode").value = defaults.mode === "full" ? shown : defaults.mode;
  at("mode").querySelector("[value=early_exit]").disabled = !canLeave; // drafts need no exit
  at("no-exits").hidden = hasExits;
  at("exits").hidden = !hasExits;
  at("form").elements.kind[1].disabled = !model.has_chat_template;
  at("no-chat").hidden = model.has_chat_template;
  at("legend").querySelector("ul").append(...exits.kinds.map((kind) => exits.entry(kind, kind.words)));
  showChoices();
}

/** The certified level that is chosen, if one is. */
function promise() {
  if (at("mode").value !== "early_exit") return undefined;
  return model.certified.find((one) => String(one.level) === at("promise").value);
}

/** What the form shows depends on what is chosen. */
function showChoices() {
  const mode = at("mode").value, isChat = kind() === "chat", certified = promise();
  at("exits").hidden = mode !== "early_exit";
  at("promise-field").hidden = mode !== "early_exit" || model.certified.length === 0;
  at("threshold-field").hidden = mode !== "early_exit" || certified !== undefined;
  at("score-field").hidden = at("threshold-field").hidden || !model.has_probes;
  at("max-tokens").disabled = at("temperature").disabled = certified !== undefined;
  at("promise-hint").hidden = certified === undefined;
  const boxes = [...at("exits").querySelectorAll("input")], hasExit = boxes.some((box) => box.checked);
  boxes[0]?.setCustomValidity(mode !== "early_exit" || hasExit ? "" : "Choose at least one exit.");
  at("draft-field").hidden = mode !== "self_speculative";
  at("compare").disabled = mode === "full";
  at("threshold-value").textContent = thresholds.map((value) => value.toFixed(2)).join(", ");
  at("prompt-label").textContent = isChat ? "Message" : "Prompt";
  at("send").textContent = isChat ? "Send" : "Generate";
  at("new-chat").hidden = !isChat;
  at("keys").textContent = isChat
    ? "Enter sends, Shift+Enter begins a line, Escape stops." : "Ctrl+Enter sends, Escape stops.";
}

// Requests.

/** The path and the body of a request in the OpenAI API. */
function openAiRequest(mode, content) {
  const body = {
    model: model.name, mode, max_tokens: at("max-tokens").valueAsNumber, temperature: at("temperature").valueAsNumber,
    seed: at("seed").valueAsNumber, stream: true, stream_options: { include_usage: true }, return_exit_details: true,
    ...content,
  };
  const certified = promise();
  if (certified) { // the full model's answer beside it as well
    Object.assign(body, { max_tokens: certified.max_tokens, temperature: 0, ignore_eos: certified.ignore_eos });
  }
  if (mode === "early_exit") {
    const boxes = [...at("exits").querySelectorAll("input:checked")];
    body.exit_thresholds = certified ? `certified:${certified.level}` : thresholds;
    body.exit_layers = boxes.map((box) => Number(box.value));
    if (!certified && model.has_probes) body.exit_score = at("score").value;
  }
  if (mode === "self_speculative") {
    const draft = at("draft").value, exit = Number(draft);
    Object.assign(body, exit ? { draft_source: "exit", draft_exit: exit } : { draft_source: draft });
  }
  return { path: content.messages ? "v1/chat/completions" : "v1/completions", body };
}

/** Stream an answer into its element. Returns it; what goes wrong is shown there. */
async function stream(title, mode, content, turn, signal) {
  const answer = new Answer(title, exits);
  turn.querySelector(".answers").append(answer.element);
  const { path, body } = openAiRequest(mode, content);
  try {
    let usage = null;
    for await (const event of events(path, { key: at("key").value, body, signal })) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        answer.add(choice.exit_details ?? []);
        answer.finishReason = choice.finish_reason ?? answer.finishReason;
      }
    }
    answer.finish(usage);
  } catch (error) {
    if (!signal.aborted && !(error instanceof RequestError)) throw error;
    answer.breakOff(signal.aborted ? "" : inWords(error));
    answer.error = signal.aborted ? null : error;
  }
  return answer;
}

/** The answer in the chosen mode and then, one after the other so that each has its own speed, the full model's. */
async function answerBoth(content, turn, signal) {
  const mode = at("mode").value, isCompared = at("compare").checked && mode !== "full";
  at("status").textContent = `${NAMES[mode]}: generating…`;
  const answer = await stream(NAMES[mode], mode, content, turn, signal);
  if (!isCompared || signal.aborted || answer.error) return answer;
  at("status").textContent = "Full model: generating…";
  const full = await stream(NAMES.full, "full", content, turn, signal);
  if (!signal.aborted && !full.error) turn.querySelector(".comparison").textContent = compared(answer, full);
  return answer;
}

async function send() {
  const prompt = at("prompt").value, isChat = kind() === "chat";
  const turn = at("turn-template").content.firstElementChild.cloneNode(true);
  if (isChat) {
    turn.querySelector(".question").textContent = prompt;
    turn.querySelector(".question").hidden = false;
    at("turns").append(turn);
    at("prompt").value = "";
  } else {
    at("turns").replaceChildren(turn);
  }
  turn.scrollIntoView({ block: "nearest" });
  const question = { role: "user", content: prompt };
  running = new AbortController();
  showRunning();
  const answer = await answerBoth(isChat ? { messages: [...messages, question] } : { prompt }, turn, running.signal);
  const wasStopped = running.signal.aborted;
  running = null;
  showRunning();
  at("status").textContent = answer.error ? inWords(answer.error) : wasStopped ? "Stopped." : `Done: ${reason(answer)}.`;
  if (answer.error?.status === 401) at("key-field").hidden = false;
  if (!isChat || !turn.isConnected) return;
  if (answer.error) at("prompt").value ||= prompt;
  else messages.push(question, { role: "assistant", content: answer.text });
}

function reason(answer) {
  return answer.finishReason === "length" ? "as many tokens as were asked for" : "the answer has ended";
}

/** Which buttons can be pressed. */
function showRunning() {
  const hadFocus = document.activeElement;
  at("send").disabled = running !== null;
  at("stop").disabled = running === null;
  at("new-chat").disabled = running !== null;
  // A button that can no longer be pressed has no focus; the keyboard must not lose its place.
  if (hadFocus === at("send") && running) at("stop").focus();
  else if (hadFocus === at("stop") && !running) at("send").focus();
}

function startAgain() {
  running?.abort();
  messages = [];
  at("turns").replaceChildren();
  at("status").textContent = "";
}

// Events.

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (model !== null && running === null) send();
});
at("form").addEventListener("change", (event) => {
  if (model === null) return;
  if (event.target.name === "kind") startAgain();
  showChoices();
});
at("form").addEventListener("invalid", (event) => {
  const closed = event.target.closest("details");
  if (closed) closed.open = true; // else nobody sees what is wrong
}, true);
at("threshold").addEventListener("input", () => {
  thresholds = [at("threshold").valueAsNumber];
  showChoices();
});
at("prompt").addEventListener("keydown", (event) => {
  const sends = kind() === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key !== "Enter" || !sends || event.isComposing) return;
  event.preventDefault();
  at("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("new-chat").addEventListener("click", () => {
  startAgain();
  at("prompt").focus();
});
at("show-numbers").addEventListener("change", (event) => {
  at("turns").classList.toggle("numbers", event.target.checked);
});

learn();
