// The training activations nearest to the chosen token's reconstruction, where the server has the run that trained the pair.
const SETTLED = 250; // milliseconds that a token stays chosen before these are looked for
let looking = null; // what can be given up

function lookFor(row) {
  const pair = state.pair, mine = (looking = new AbortController());
  setTimeout(() => {
    if (mine.signal.aborted || row !== state.row) return;
    demand(`nearest ${pair} ${row}`, { do: "nearest", row, pair }, ({ nearest, among }) => {
      state.nearest[pair][row] = { nearest, among };
    }, () => drawPanels({ nearest: true, row }), mine.signal);
  }, SETTLED);
}

function nearLine({ cosine, text, token, position, document, role }) {
  const before = text.endsWith(token) ? text.slice(0, text.length - token.length) : text;
  const place = `${document}, position ${count(position)}${role ? `, ${role}` : ""}`;
  return element("li", {}, element("span", { class: "number" }, figure(cosine)), element("span", {}, `… ${before}`,
    text.endsWith(token) ? element("span", { class: "token-name" }, visible(token) || "∅") : "", element("br"),
    element("span", { class: "meta" }, place)));
}

PANELS.push({
  title: "Nearest training activations",
  shows: (answer) => answer.row === state.row && (answer.nearest || answer.pair === state.pair && "explanation" in answer),
  draw(row) {
    if (!state.pairs[state.pair].nearest || !explained(row)) return [];
    const found = state.nearest[state.pair][row], key = `nearest ${state.pair} ${row}`;
    if (!found && state.saved) return [];
    if (!found && !standing.has(key)) {
      looking?.abort();
      lookFor(row);
    }
    return [
      element("h2", {}, ofPair("Nearest training activations")),
      element("p", { class: "meta" }, "By cosine with the reconstruction", found ? `, among ${count(found.among)}. ` : ". ",
        "Their texts up to the token:"),
      found ? element("ul", { class: "others" }, ...found.nearest.map(nearLine)) : standingLine(key),
    ];
  },
});
