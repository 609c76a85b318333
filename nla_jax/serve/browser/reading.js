// Reading a text: its tokens, the chosen one at once, all others in the background; and the search in what came.
const PANELS = []; // each {title, draw(row) -> elements, shows(answer) -> whether an answer changes it}; see panels/
const SHOWN = 100; // hits of a search that are listed
let now = null, background = null; // what can be given up: the chosen token's request, and that of all others

async function read(content, row = 0) {
  now?.abort();
  background?.abort();
  doubting.abort();
  doubtingAll?.abort();
  notice("");
  const mine = (now = new AbortController());
  byId("reading").hidden = false;
  state.content = content;
  const came = await persist(() => ({ do: "read", ...content }), (found) => { state.document = found; }, mine.signal);
  if (now !== mine) return; // another text was read meanwhile
  byId("reading").hidden = true;
  if (!came) return;
  for (const name of Object.keys(COMPUTED)) state[name] = nothing();
  standing.clear();
  show(row);
  explainAll();
}

function show(row) {
  byId("view").hidden = false;
  drawStrip();
  search();
  drawProgress();
  choose(row);
}

function take(answer) {
  state.answers[answer.pair][answer.row] = answer;
  drawColour(answer.row);
  if (answer.row === state.row && answer.pair === 0) byId("spoken").textContent = answer.explanation || "no explanation";
  drawPanels(answer);
  soon(drawProgress);
  soon(search);
}

// Runs a function once for many calls in a row.
const soon = (() => {
  const waiting = new Set();
  return (work) => {
    if (waiting.has(work)) return;
    waiting.add(work);
    setTimeout(() => { waiting.delete(work); work(); }, 120);
  };
})();

const missing = () => state.document.tokens.map((_, row) => row).filter((row) => state.answers.some((of) => !of[row]));

function explainNow() {
  if (state.saved || state.answers.every((of) => of[state.row])) return;
  now?.abort();
  now = new AbortController();
  const row = state.row, lacks = () => state.answers.some((of) => !of[row]);
  persist(() => (lacks() ? { do: "explain", document: state.document.id, rows: [row] } : null), take, now.signal);
}

async function explainAll() {
  background?.abort();
  const mine = (background = new AbortController());
  drawProgress();
  const wanted = () => {
    const rows = missing();
    return rows.length ? { do: "explain", document: state.document.id, rows, patient: true } : null;
  };
  await persist(wanted, take, mine.signal);
  if (background === mine) background = null;
  drawProgress();
}

function drawProgress() {
  const all = state.document.tokens.length, done = all - missing().length;
  byId("progress").max = all;
  byId("progress").value = done;
  byId("counted").textContent = `${count(done)} of ${count(all)} tokens explained`;
  byId("pause").textContent = background ? "Pause" : "Continue";
  byId("pause").hidden = Boolean(state.saved) || done === all;
}

function drawPanels(answer = null) {
  PANELS.forEach((panel) => {
    if (answer && !panel.shows(answer)) return;
    panel.place ??= byId("panels").appendChild(element("section", { class: "panel", "aria-label": panel.title }));
    const inside = panel.draw(state.row);
    panel.place.hidden = !inside.length;
    refill(panel.place, inside);
  });
}

// Puts other elements into a place. What had the focus there keeps it, where it has a key.
function refill(place, inside) {
  const key = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  place.replaceChildren(...inside);
  if (key) [...place.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key)?.focus({ preventScroll: true });
}

function search() {
  const words = byId("words").value.trim().toLowerCase(), order = Number(byId("order").value), found = [];
  const wanted = words || order;
  if (wanted) state.answers.forEach((of, pair) => Object.values(of).forEach((answer) => {
    if (answer.explanation.toLowerCase().includes(words)) found.push({ pair, ...answer });
  }));
  found.sort((a, b) => (order * ((a.fve ?? a.cosine ?? -9) - (b.fve ?? b.cosine ?? -9))) || a.row - b.row || a.pair - b.pair);
  const rows = new Set(words ? found.map(({ row }) => row) : []);
  spans.forEach((span, row) => span.classList.toggle("hit", rows.has(row)));
  const listed = found.slice(0, SHOWN);
  byId("hits").textContent = wanted
    ? `${count(found.length)} found${found.length > SHOWN ? `, the first ${SHOWN} are listed` : ""}` : "";
  refill(byId("found"), listed.map(({ pair, row, explanation, fve }) => element("li", {},
    element("button", { type: "button", "data-key": `${pair} ${row}`, click: () => choose(row) },
      tokenName(row), element("span", { class: "number" }, figure(fve)),
      element("span", {}, `${named() ? `${state.pairs[pair].name}: ` : ""}${explanation || "(no explanation)"}`)))));
}

function startReading() {
  byId("words").addEventListener("input", search);
  byId("order").addEventListener("change", search);
  byId("pause").addEventListener("click", () => {
    if (!background) return void explainAll();
    background.abort();
    background = null;
    drawProgress();
  });
}
