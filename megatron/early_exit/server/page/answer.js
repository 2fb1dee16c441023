"use strict";
// One answer: its tokens in the colours of their exits, where they came from, and what they cost.

function element(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** Kinds of tokens by the exit that they left through, in the order of depth; `draft` are those that were drafted and
 * that all layers accepted. */
class Exits {
  constructor(numLayers, layers) {
    this.numLayers = numLayers;
    this.kinds = [
      ...layers.map((layer, index) => ({
        name: String(layer), words: `after layer ${layer}`, depth: layers.length > 1 ? index / (layers.length - 1) : 0,
      })),
      { name: "draft", words: `drafted, accepted by all ${numLayers} layers` },
      { name: "final", words: `after all ${numLayers} layers` },
    ];
  }

  /** The kind of a token as the server describes it. */
  of(token) {
    const name = token.is_draft ? "draft" : token.is_final ? "final" : String(token.exit_layer);
    return this.kinds.find((kind) => kind.name === name);
  }

  /** An element in the colour of a kind. */
  coloured(kind, properties) {
    const made = element("span", properties);
    made.dataset.exit = kind.name;
    if (kind.depth !== undefined) made.style.setProperty("--depth", `${100 * kind.depth}%`);
    return made;
  }

  /** An entry of a legend. */
  entry(kind, words) {
    const swatch = this.coloured(kind, { className: "swatch", textContent: "a", ariaHidden: "true" });
    return element("li", {}, [swatch, words]);
  }
}

/** The answer to one request, as it grows. */
class Answer {
  constructor(title, exits) {
    this.exits = exits;
    this.tokens = [];
    this.element = document.getElementById("answer-template").content.firstElementChild.cloneNode(true);
    this.element.setAttribute("aria-label", title);
    this.part("h2").textContent = title;
    this.textElement.ariaLabel = `${title}: the answer. Left and right arrow keys go from token to token.`;
    this.textElement.ariaBusy = "true";
    this.started = performance.now();
    this.listen();
  }

  part(selector) { return this.element.querySelector(selector); }
  get textElement() { return this.part(".text"); }
  get text() { return this.tokens.map((token) => token.text).join(""); }
  get isWhole() { return this.finishReason !== undefined; }

  /** Tokens that have come; their text is inserted as text. */
  add(tokens) {
    if (tokens.length === 0) return;
    this.lastToken = performance.now();
    if (this.firstToken === undefined) {
      this.firstToken = this.lastToken;
      this.numFirst = tokens.length;
    }
    for (const token of tokens) {
      const span = this.exits.coloured(this.exits.of(token), { className: "token", textContent: token.text });
      const depth = token.is_final ? this.exits.numLayers : token.exit_layer;
      span.dataset.numbers = `${depth}${token.is_draft ? "d" : ""}·${(100 * token.confidence).toFixed(0)}`;
      this.textElement.append(span);
      this.tokens.push(token);
    }
    this.showFigures();
  }

  /** The end of the stream. usage: what the server says of the whole answer. */
  finish(usage) {
    this.usage = usage?.early_exit;
    this.end();
    this.showExits();
  }

  /** The end before the answer is complete; words: why, if that is an error. */
  breakOff(words = "") {
    this.part(".error").textContent = words;
    this.end();
    this.showExits();
  }

  end() {
    this.textElement.ariaBusy = "false";
    this.showFigures();
  }

  /** Tokens per second behind the first ones; null for too few. */
  get speed() {
    const seconds = (this.lastToken - this.firstToken) / 1000;
    return seconds > 0 ? (this.tokens.length - this.numFirst) / seconds : null;
  }

  showFigures() {
    const figures = [["Tokens", this.tokens.length]];
    if (this.tokens.length) figures.push(["First token", `${(this.firstToken - this.started).toFixed(0)} ms`]);
    if (this.speed !== null) figures.push(["Tokens per second", this.speed.toFixed(1)]);
    if (this.usage) {
      figures.push(["Layer runs saved", percent(this.usage.runs_saved)]);
      if (this.usage.drafted) figures.push(["Drafts accepted", `${this.usage.accepted} of ${this.usage.drafted}`]);
    }
    this.part(".figures").replaceChildren(...figures.map(([name, value]) => element("div", {}, [
      element("dt", { textContent: name }), element("dd", { textContent: value }),
    ])));
  }

  /** How many tokens left where. */
  showExits() {
    const entries = this.exits.kinds.flatMap((kind) => {
      const number = this.tokens.filter((token) => this.exits.of(token) === kind).length;
      const words = `${kind.words}: ${count(number, "token")} (${percent(number / this.tokens.length)})`;
      return number ? [this.exits.entry(kind, words)] : [];
    });
    this.part("ul.exits").replaceChildren(...entries);
  }

  /** Mark the tokens that another answer does not have in the same order. */
  mark(differs) {
    differs.forEach((is, index) => this.textElement.children[index].classList.toggle("differs", is));
  }

  /** Tokens tell about themselves where the pointer is, and where arrow keys go. */
  listen() {
    const show = (span) => {
      this.part(".token.current")?.classList.remove("current");
      span?.classList.add("current");
      this.part(".detail").textContent = span ? this.describe(span) : "";
    };
    const indexOf = (span) => [...this.textElement.children].indexOf(span);
    const tokenAt = (event) => event.target.closest(".token");
    this.textElement.addEventListener("pointerover", (event) => tokenAt(event) && show(tokenAt(event)));
    this.textElement.addEventListener("click", (event) => tokenAt(event) && show(tokenAt(event)));
    this.textElement.addEventListener("keydown", (event) => {
      const last = this.tokens.length - 1, current = indexOf(this.part(".token.current"));
      const next = { ArrowRight: Math.min(current + 1, last), ArrowLeft: Math.max(current - 1, 0), Home: 0, End: last };
      if (!(event.key in next) || last < 0) return;
      event.preventDefault();
      show(this.textElement.children[next[event.key]]);
    });
    this.describe = (span) => {
      const token = this.tokens[indexOf(span)];
      const differs = span.classList.contains("differs") ? ", differs from the other answer" : "";
      return `${JSON.stringify(token.text)}: ${this.exits.of(token).words}, confidence ${token.confidence.toFixed(3)}, `
        + `id ${token.token_id}${differs}`;
    };
  }
}

/** For each of two lists, which items are not in a longest common subsequence of them. */
function differences(first, second) {
  const table = Array.from({ length: first.length + 1 }, () => new Uint16Array(second.length + 1));
  for (let i = first.length - 1; i >= 0; i--) {
    for (let j = second.length - 1; j >= 0; j--) {
      table[i][j] = first[i] === second[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  const differs = [first.map(() => true), second.map(() => true)];
  let i = 0, j = 0;
  while (i < first.length && j < second.length) {
    if (first[i] === second[j]) differs[0][i++] = differs[1][j++] = false;
    else if (table[i + 1][j] >= table[i][j + 1]) i++;
    else j++;
  }
  return differs;
}

/** How an answer compares with the full model's, in words; both get their differences marked. */
function compared(answer, full) {
  const ids = [answer, full].map((one) => one.tokens.map((token) => token.token_id));
  const [differs, differsInFull] = differences(...ids);
  answer.mark(differs);
  full.mark(differsInFull);
  const numDiffering = differs.filter(Boolean).length;
  const parts = [];
  if (!numDiffering && !differsInFull.some(Boolean)) {
    parts.push("Both answers are the same, token for token.");
  } else {
    const firstDiffering = [differs, differsInFull].map((one) => one.indexOf(true)).filter((index) => index >= 0);
    parts.push(
      `${differs.length - numDiffering} of ${count(differs.length, "token")} are the full model's too; the first `
      + `difference is at token ${Math.min(...firstDiffering) + 1}.`,
    );
  }
  if (answer.speed && full.speed) parts.push(`${(answer.speed / full.speed).toFixed(2)} times the full model's speed.`);
  return parts.join(" ");
}
