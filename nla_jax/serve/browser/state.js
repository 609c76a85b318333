// What the page holds. Everything else draws it, or asks the server for more of it.
//
// `held`, the content of #data: pairs; tokens, the longest text; and of a saved page content, document, row, saved (when) and
// what was COMPUTED. A saved page is this file with these inside, and asks no server.
const PRISTINE = document.documentElement.cloneNode(true); // before anything is drawn: what "Save page" writes
const held = JSON.parse(document.getElementById("data").textContent);
const COMPUTED = { // of each pair, by row
  answers: "explanation, cut, claims, cosine, fve",
  alternatives: "seed and alternatives",
  confidence: "of each claim: kind, text, and how sure one may be of it, from 0 to 1",
  ablations: "of each claim: text without it, and by how much fve and mse (in %) change then",
  nearest: "the nearest training activations, and among how many",
  patched: "what the subject says with each of some vectors in place of the activation",
  steered: "edit, and by strength what the subject says along each direction",
};
const SILENT = held.pairs.every(({ silent }) => silent); // activations alone, which nobody explains
const nothing = () => held.pairs.map(() => ({}));
const state = {
  pairs: held.pairs, // name, subject, place, limit; fve (is it known?), chat (does the subject read one?), nearest, silent;
  // confidence: samples, about (what it is, in words) and whether it was fitted; null where nobody asks
  content: held.content ?? null, // {text} or {messages}
  document: held.document ?? null, // id; tokens, roles, and for each pair norms and sinks, by row
  ...Object.fromEntries(Object.keys(COMPUTED).map((name) => [name, held[name] ?? nothing()])),
  row: held.row ?? 0, // the chosen token
  colour: SILENT ? "norm" : "fve",
  pair: 0, // whose values colour the strip
  saved: held.saved ?? null,
};

const byId = (id) => document.getElementById(id);

// An element with attributes and children. Strings become text, never HTML.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const count = (number) => number.toLocaleString("en");
const figure = (value, digits = 2) =>
  typeof value === "number" && Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–";
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));
const tokenName = (row) => element("span", { class: "token-name" }, visible(state.document.tokens[row]) || "∅");
const named = () => state.pairs.length > 1; // whether a text must say whose it is

function notice(sentence) {
  byId("notice").textContent = sentence;
  byId("notice").hidden = !sentence;
}
