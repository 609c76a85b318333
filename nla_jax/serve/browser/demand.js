// Answers that a panel asks for one by one, each once. `standing` says, by what was asked, what is under way, or why there
// is no answer.
const standing = new Map();

async function demand(key, fields, take, redraw, signal) {
  if (standing.get(key)?.busy) return;
  const { document } = state, mine = () => state.document === document; // no other text was read meanwhile
  let left = true, line = null;
  const say = (sentence, busy) => { line = { sentence, busy }; standing.set(key, line); redraw(); };
  say("Computing …", true);
  const put = (answer) => {
    if (!mine()) return;
    if (answer.loading) return void say("Loading the whole subject, which is done once; this can take a while …", true);
    left = false;
    take(answer);
  };
  const refused = (sentence) => { if (mine()) say(sentence, false); };
  const wanted = () => left && mine() && { document: document.id, ...fields };
  const came = await persist(wanted, put, signal, refused);
  if (!mine()) return;
  if ((came || signal?.aborted) && standing.get(key) === line) standing.delete(key);
  redraw();
}

// What stands in a panel beside its button: what is under way, or why it is refused.
function standingLine(key) {
  const found = standing.get(key);
  return element("p", { class: found && !found.busy ? "refusal" : "meta", role: "status" }, found?.sentence ?? "");
}

// A table of what the subject says under several conditions. Each column is {title, of(row) -> content, number}.
function conditions(caption, columns, rows) {
  const head = columns.map(({ title, number }) => element("th", { scope: "col", class: number ? "number" : null }, title));
  const cell = ({ title, of, number }, row) => element("td", { "data-title": title, class: number ? "number" : null }, of(row));
  const body = rows.map((row) => element("tr", {}, element("th", { scope: "row" }, columns[0].of(row)),
    ...columns.slice(1).map((column) => cell(column, row))));
  return element("table", { class: "conditions" }, element("caption", { class: "unseen" }, caption),
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

const continuation = (text) => element("span", { class: "continued" }, text ? `…${text.replaceAll(/\n+/g, " ↵ ")}` : "(it ends here)");
const explained = (row) => Boolean(state.answers[state.pair][row]?.explanation);
const ofPair = (title) => (named() ? `${title}, ${state.pairs[state.pair].name}` : title);
