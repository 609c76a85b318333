// The claims of an explanation: whether they hold, what each is worth to the reconstructor, and how sure one may be of it.
const LINGER = 150; // milliseconds over a claim before its worth is asked for
const UNSURE = 0.5; // a confidence below this is marked

// What the claims of an explanation are worth to the reconstructor; asked for once a claim has the pointer, or the focus.
function weigh(pair, row) {
  if (state.saved || state.ablations[pair][row]) return;
  demand(`ablate ${pair} ${row}`, { do: "ablate", row, pair }, ({ ablations }) => {
    state.ablations[pair][row] = ablations;
  }, () => drawPanels({ ablations: true, row }));
}

// Asks once something has stayed where it is; the pointer and the focus each have one, and do not disturb each other.
function lingering(pair, row) {
  let timer = 0;
  const leave = () => clearTimeout(timer);
  return { enter: () => { leave(); timer = setTimeout(() => weigh(pair, row), LINGER); }, leave };
}

function worth(pair, row, index) {
  const found = state.ablations[pair][row]?.[index], more = (value) => (value < 0 ? "" : "+");
  if (!found) return standing.get(`ablate ${pair} ${row}`)?.sentence ?? "";
  const parts = [["FVE ", found.fve, 2, ""], ["error ", found.mse, 0, " %"]].filter(([, value]) => Number.isFinite(value));
  return `without it: ${parts.map(([name, value, digits, unit]) => `${name}${more(value)}${figure(value, digits)}${unit}`).join(", ")}`;
}

// How sure one may be of the claims at the chosen token. Another token that is chosen gives the question up.
const sureKey = (pair, row) => `confidence ${pair} ${row}`;
let doubting = new AbortController(), doubted = -1; // what can be given up, and the row that it is about

const inWords = ({ text, confidence }) => `${confidence < UNSURE ? "doubtful, " : ""}confidence ${figure(confidence)}: ${text}`;

function askSure(pair, row, signal) {
  return demand(sureKey(pair, row), { do: "confidence", row, pair }, ({ confidence }) => {
    state.confidence[pair][row] = confidence;
    drawColour(row);
    drawSure();
    if (row === state.row) byId("spoken").textContent = confidence.map(inWords).join("; ");
  }, () => drawPanels({ confidence: true, row }), signal);
}

const canAsk = (pair, row) =>
  state.pairs[pair].confidence && !state.saved && state.answers[pair][row]?.explanation && !state.confidence[pair][row];

function doubt(row, pairs = [...state.pairs.keys()]) {
  if (doubting.signal.aborted) doubting = new AbortController();
  doubted = row;
  pairs.filter((pair) => canAsk(pair, row)).forEach((pair) => askSure(pair, row, doubting.signal));
}

// The mean confidence of an explanation's claims; NaN where it is not known.
function meanConfidence(pair, row) {
  const of = state.confidence[pair][row] ?? [];
  return of.reduce((sum, { confidence }) => sum + confidence, 0) / of.length;
}

// The same of every token of the text, one after another, for the pair whose values colour the strip.
let doubtingAll = null; // what can be given up

async function doubtAll() {
  if (doubtingAll) return void doubtingAll.abort();
  const { document, pair } = state, mine = (doubtingAll = new AbortController());
  for (let row = 0; row < document.tokens.length && !mine.signal.aborted && state.document === document; row++)
    if (!state.confidence[pair][row]) await askSure(pair, row, mine.signal);
  doubtingAll = null;
  drawSure();
}

// Of how many tokens it is known, where it colours the strip; and the button that asks for the others.
function drawSure() {
  const known = Object.keys(state.confidence[state.pair]).length, all = state.document.tokens.length;
  byId("sure").hidden = state.colour !== "confidence";
  byId("sure-known").textContent = `known: ${count(known)} of ${count(all)} tokens`;
  byId("sure-all").hidden = Boolean(state.saved) || !state.pairs[state.pair].confidence || known === all;
  byId("sure-all").textContent = doubtingAll ? "Stop" : "Ask for all tokens";
}

// What a claim's line says of its confidence. A doubtful one is marked in words.
function sureness(pair, found) {
  if (!found) return null;
  const why = state.pairs[pair].confidence?.fitted ? "more likely false than true" : "fewer than half of the samples say so";
  return element("span", { class: "sure meta" }, element("span", {}, `confidence ${figure(found.confidence)}`),
    found.confidence < UNSURE ? element("span", { class: "badge doubt", title: why }, "doubtful", element("span", { class: "unseen" }, `: ${why}`)) : null);
}

function claimLine(claim, pair, row, index) {
  const { kind, value, true: holds, sure } = claim;
  const [mark, css, said] = { true: ["✓", "yes", "true"], false: ["✗", "no", "false"], null: ["·", "", "not checked"] }[holds];
  const line = { tabindex: 0, "data-key": `claim ${pair} ${index}` };
  if (index < state.answers[pair][row].claims.length) { // one that can be taken out
    const pointer = lingering(pair, row), focus = lingering(pair, row);
    Object.assign(line, { title: state.ablations[pair][row]?.[index].text, mouseenter: pointer.enter, mouseleave: pointer.leave,
      focus: focus.enter, blur: focus.leave });
  }
  return element("li", line, element("span", { class: css, role: "img", "aria-label": said, title: said }, mark),
    element("span", { class: "kind" }, kind),
    element("span", {}, value, sureness(pair, sure), element("span", { class: "worth meta" }, worth(pair, row, index))));
}

// The claims that are checked against the text, then others that only have a confidence, such as sentences.
function claimsOf(pair, row) {
  const { claims } = state.answers[pair][row], sure = state.confidence[pair][row] ?? [];
  const same = (claim) => sure.find(({ kind, text }) => kind === claim.kind && text === claim.value);
  const others = sure.filter((one) => !claims.some((claim) => same(claim) === one));
  return [...claims.map((claim) => ({ ...claim, sure: same(claim) })),
    ...others.map((one) => ({ kind: one.kind, value: one.text, true: null, sure: one }))];
}

// The list of claims, and the button that asks how sure one may be of them.
function claimList(pair, row) {
  const lines = claimsOf(pair, row).map((claim, i) => claimLine(claim, pair, row, i)), about = state.pairs[pair].confidence;
  const key = sureKey(pair, row), known = state.confidence[pair][row];
  return [
    lines.length ? element("ul", { class: "claims", "aria-label": "Claims" }, ...lines) : null,
    known && about ? element("p", { class: "meta" }, known.length ? about.about : "It makes no claims.") : null,
    canAsk(pair, row) ? element("p", { class: "buttons" }, element("button", { type: "button", class: "doubts", "data-key": key,
      title: about.about, click: () => doubt(row, [pair]) }, `How sure? Ask ${count(about.samples)} samples`),
      standingLine(key)) : null,
  ];
}
