// Sorts and filters the examples, and shows one document and one token at a time. What it needs stands in the page: the
// controls are hidden where scripts are off.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// The examples.
function startExamples(form) {
  const list = document.querySelector(".examples"), rows = [...list.children];
  const { order, fve, kind, search } = form.elements, said = form.querySelector("output");
  const number = (row, name) => name in row.dataset ? Number(row.dataset[name]) : -Infinity;
  const orders = {
    "": () => 0,
    best: (a, b) => number(b, "score") - number(a, "score"),
    worst: (a, b) => number(a, "score") - number(b, "score"),
    gain: (a, b) => number(b, "gain") - number(a, "gain"),
  };
  const draw = () => {
    const [low, high] = fve.value ? fve.value.split(" ").map(Number) : [-Infinity, Infinity];
    const words = search.value.toLowerCase();
    list.append(...[...rows].sort(orders[order.value]));
    for (const row of rows)
      row.hidden = !(number(row, "score") >= low && number(row, "score") < high
        && (!kind?.value || row.dataset.kinds.split("\n").includes(kind.value))
        && row.textContent.toLowerCase().includes(words));
    said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  form.addEventListener("input", draw);
  draw();
}

// The documents.
function startMaps(form) {
  const maps = all(".map"), { document: chosen, colour } = form.elements;
  for (const map of maps) map.dataset.alone = ""; // its name is the choice's
  const draw = () => {
    maps.forEach((map, i) => { map.hidden = String(i) !== chosen.value; });
    for (const token of all(".token")) paint(token, colour?.value);
  };
  form.addEventListener("input", draw);
  maps.forEach(startMap);
  draw();
}

function paint(token, colour) {
  const { rl, warm } = token.dataset, value = Number(colour === "gain" ? rl - warm : token.dataset[colour]);
  const depth = Number.isFinite(value) ? Math.min(1, Math.abs(value)) : 0;
  token.style.setProperty("--hue", `var(${value < 0 ? "--alert" : "--rl"})`);
  token.style.setProperty("--share", `${Math.round(60 * depth)}%`);
}

// One document: the token that the pointer is at is shown, else the chosen one.
function startMap(map) {
  const tokens = all(".token", map), readings = all(".reading", map), strip = map.querySelector(".strip");
  let chosen = 0;
  const show = (row) => readings.forEach((reading, i) => { reading.hidden = i !== row; });
  const choose = (row, focus) => {
    tokens[chosen].setAttribute("aria-selected", "false");
    tokens[chosen].tabIndex = -1;
    chosen = Math.max(0, Math.min(tokens.length - 1, row));
    tokens[chosen].setAttribute("aria-selected", "true");
    tokens[chosen].tabIndex = 0;
    if (focus) tokens[chosen].focus();
    show(chosen);
  };
  const rowAt = (event) => tokens.indexOf(event.target.closest(".token"));
  strip.addEventListener("pointerover", (event) => show(rowAt(event) < 0 ? chosen : rowAt(event)));
  strip.addEventListener("pointerleave", () => show(chosen));
  strip.addEventListener("click", (event) => { if (rowAt(event) >= 0) choose(rowAt(event), true); });
  strip.addEventListener("keydown", (event) => {
    const to = { ArrowRight: chosen + 1, ArrowDown: onOtherLine(tokens, chosen, 1), ArrowLeft: chosen - 1,
      ArrowUp: onOtherLine(tokens, chosen, -1), Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(to, true);
  });
  for (const token of tokens) token.removeAttribute("title"); // what it says stands beside the text
  choose(0, false);
}

// The token above or below: on the nearest other line that has one, the one that is nearest across.
function onOtherLine(tokens, row, direction) {
  const places = tokens.map((token) => token.getClientRects()[0]), from = places[row];
  const away = (place) => direction * (place.top - from.top), across = (place) => Math.abs(place.left - from.left);
  const others = places.filter((place) => away(place) > from.height / 2);
  const line = Math.min(...others.map(away));
  const [best] = others.filter((place) => away(place) < line + from.height / 2).sort((a, b) => across(a) - across(b));
  return best ? places.indexOf(best) : row;
}

for (const [name, start] of [[".controls", startExamples], [".maps", startMaps]]) {
  const form = document.querySelector(name);
  if (!form) continue;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  start(form);
}
