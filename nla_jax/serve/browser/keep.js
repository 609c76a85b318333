// Keeping what was found: an address that restores the view, a file that opens offline, JSON.
function remember() {
  if (state.saved || !state.content) return;
  const fragment = new URLSearchParams();
  if (state.content.text !== undefined) fragment.set("text", state.content.text);
  else fragment.set("messages", JSON.stringify(state.content.messages));
  fragment.set("at", state.row);
  if (state.colour !== "fve") fragment.set("colour", state.colour);
  if (state.pair) fragment.set("pair", state.pair);
  history.replaceState(null, "", `#${fragment}`);
}

// What an address holds: {content, row}; null where it holds no text.
function remembered() {
  const fragment = new URLSearchParams(location.hash.slice(1)), colour = fragment.get("colour");
  const pair = Number(fragment.get("pair") ?? 0), row = Number(fragment.get("at") ?? 0);
  state.colour = Object.hasOwn(COLOURS, colour) ? colour : "fve";
  state.pair = Number.isInteger(pair) && pair in state.pairs ? pair : 0;
  let content = fragment.has("text") ? { text: fragment.get("text") } : null;
  try {
    if (fragment.has("messages")) content = { messages: JSON.parse(fragment.get("messages")) };
  } catch { content = null; }
  return content && { content, row: Number.isInteger(row) && row >= 0 ? row : 0 };
}

function everything() {
  const { pairs, content, document, row } = state, computed = Object.keys(COMPUTED).map((name) => [name, state[name]]);
  const saved = state.saved ?? new Date().toISOString().slice(0, 16).replace("T", " ");
  return { pairs, tokens: held.tokens, content, document, ...Object.fromEntries(computed), row, saved };
}

function savedPage() {
  const copy = PRISTINE.cloneNode(true);
  copy.querySelector("#data").textContent = JSON.stringify(everything()).replaceAll("<", "\\u003c");
  return `<!DOCTYPE html>\n${copy.outerHTML}\n`;
}

function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function startKeep() {
  byId("save").addEventListener("click", () => download("activations.html", "text/html", savedPage()));
  byId("json").addEventListener("click", () =>
    download("activations.json", "application/json", JSON.stringify(everything(), null, 1)));
  byId("link").hidden = Boolean(state.saved) || !navigator.clipboard;
  byId("link").addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href).then(() => { byId("kept").textContent = "The link is copied."; },
      () => { byId("kept").textContent = "The browser does not let the page copy; the address above is the link."; });
  });
}
