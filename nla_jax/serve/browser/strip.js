// The text as a strip of tokens: colours, choice, keys.
let spans = []; // of each row
const COLOURS = { // of a row: a hue and a share from 0 to 1; and what the scale says
  fve: {
    name: "FVE", scale: ["−1", "1"], ramp: "fve",
    of: (row) => signed(state.answers[state.pair][row]?.fve, "--rl", "--alert"),
  },
  confidence: {
    name: "mean confidence of claims", scale: ["0", "1"], ramp: "fve",
    of: (row) => signed(2 * meanConfidence(state.pair, row) - 1, "--rl", "--alert"),
  },
  gain: {
    name: "FVE, last pair minus first", scale: ["−1", "1"], ramp: "fve",
    of: (row) => signed(state.answers.at(-1)[row]?.fve - state.answers[0][row]?.fve, "--rl", "--alert"),
  },
  norm: {
    name: "norm", scale: ["¼", "4 times the usual"], ramp: "norm",
    of: (row) => signed(Math.log2(state.document.norms[state.pair][row]) / 2, "--warm", "--control"),
  },
  none: { name: "nothing", scale: null, of: () => ["transparent", 0] },
};
const signed = (value, more, less) =>
  Number.isFinite(value) ? [`var(${value < 0 ? less : more})`, Math.min(1, Math.abs(value))] : ["transparent", 0];

function drawStrip() {
  const { tokens, roles, sinks } = state.document;
  spans = tokens.map((token, row) => {
    const sink = sinks.some((of) => of[row]);
    const span = element("span", { class: sink ? "token sink" : "token", role: "option", tabindex: -1, "data-row": row });
    const parts = token.split("\n");
    parts.forEach((part, i) => span.append(...(i ? [element("span", { class: "sign" }, "↵"), "\n"] : []), part));
    return span;
  });
  const strip = byId("strip");
  strip.replaceChildren();
  tokens.forEach((_, row) => {
    if (roles[row] && (!row || roles[row] !== roles[row - 1]))
      strip.append(element("span", { class: "role", role: "presentation" }, roles[row]));
    strip.append(spans[row]);
  });
  drawColours();
}

function drawColour(row) {
  const [hue, share] = COLOURS[state.colour].of(row);
  spans[row].style.setProperty("--hue", hue);
  spans[row].style.setProperty("--share", `${Math.round(60 * share)}%`);
  const answer = state.answers[state.pair][row];
  const fve = Number.isFinite(answer?.fve) ? `, FVE ${figure(answer.fve)}` : "";
  const sink = state.document.sinks[state.pair][row] ? ", attention sink" : "", sure = meanConfidence(state.pair, row);
  const mean = Number.isFinite(sure) ? `, ${sure < UNSURE ? "doubtful, " : ""}mean confidence ${figure(sure)}` : "";
  spans[row].classList.toggle("unsure", state.colour === "confidence" && sure < UNSURE);
  spans[row].setAttribute("aria-label", `${visible(state.document.tokens[row])}${fve}${mean}${sink}`);
  if (answer) spans[row].title = answer.explanation;
}

function drawColours() {
  spans.forEach((_, row) => drawColour(row));
  const { scale, ramp } = COLOURS[state.colour];
  byId("scale").replaceChildren();
  if (scale) byId("scale").append(scale[0], element("span", { class: `ramp ${ramp}` }), scale[1]);
  drawSure();
}

function choose(row, focus = false) {
  spans[state.row]?.setAttribute("aria-selected", "false");
  if (spans[state.row]) spans[state.row].tabIndex = -1;
  state.row = Math.max(0, Math.min(spans.length - 1, row));
  const span = spans[state.row];
  span.setAttribute("aria-selected", "true");
  span.tabIndex = 0;
  if (focus) span.focus({ preventScroll: true });
  const strip = byId("strip"), top = span.offsetTop, bottom = top + span.offsetHeight;
  if (top < strip.scrollTop) strip.scrollTop = top - 12; // the strip alone: the page stays where it is
  else if (bottom > strip.scrollTop + strip.clientHeight) strip.scrollTop = bottom - strip.clientHeight + 12;
  drawPanels();
  remember();
  explainNow();
}

// The token above or below: on the nearest other line, the one that is nearest across.
function onOtherLine(direction) {
  const from = spans[state.row].getBoundingClientRect();
  let line = null, best = state.row, least = Infinity;
  for (let row = state.row + direction; row >= 0 && row < spans.length; row += direction) {
    const at = spans[row].getClientRects()[0];
    if (!at || Math.abs(at.top - from.top) < from.height / 2 && line === null) continue;
    line ??= at.top;
    if (Math.abs(at.top - line) > at.height / 2) break;
    if (Math.abs(at.left - from.left) < least) [least, best] = [Math.abs(at.left - from.left), row];
  }
  return best;
}

function startStrip() {
  byId("strip").addEventListener("click", (event) => {
    const span = event.target.closest(".token");
    if (span) choose(Number(span.dataset.row), true);
  });
  byId("strip").addEventListener("keydown", (event) => {
    const to = {
      ArrowRight: () => state.row + 1, ArrowLeft: () => state.row - 1, Home: () => 0, End: () => spans.length - 1,
      ArrowDown: () => onOtherLine(1), ArrowUp: () => onOtherLine(-1),
    }[event.key];
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key.toLowerCase() === "c") doubt(state.row);
    if (!to) return;
    event.preventDefault();
    choose(to(), true);
  });
  byId("sure-all").addEventListener("click", doubtAll);
  if (!state.saved && state.pairs.some(({ confidence }) => confidence)) byId("keys").append(" C asks how sure its claims are.");
  const sure = state.saved ? state.confidence.some((of) => Object.keys(of).length) : state.pairs.some((pair) => pair.confidence);
  const shown = { gain: named(), fve: !SILENT, confidence: sure };
  for (const [value, { name }] of Object.entries(COLOURS))
    if (shown[value] ?? true) byId("colour").append(element("option", { value }, name));
  byId("colour").value = state.colour;
  state.pairs.forEach(({ name }, i) => byId("pair").append(element("option", { value: i }, name)));
  byId("of").hidden = !named();
  byId("colour").addEventListener("change", () => { state.colour = byId("colour").value; drawColours(); remember(); });
  byId("pair").addEventListener("change", () => {
    state.pair = Number(byId("pair").value);
    drawColours();
    drawPanels();
    remember();
  });
}
