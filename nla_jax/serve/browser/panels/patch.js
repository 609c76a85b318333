// What the subject says after the chosen token when the reconstruction stands in place of its activation.
function patchNow(row) {
  const pair = state.pair, redraw = () => drawPanels({ patched: true, row });
  demand(`patch ${pair} ${row}`, { do: "patch", row, pair }, (answer) => { state.patched[pair][row] = answer.patched; }, redraw);
}

const nextTokens = ({ next }) => element("span", {}, ...next.flatMap(([token, p], i) =>
  [i ? " " : "", element("span", { class: "next" }, element("span", { class: "token-name" }, visible(token) || "∅"), ` ${figure(p)}`)]));

PANELS.push({
  title: "Patch",
  shows: (answer) => answer.row === state.row && (answer.patched || answer.pair === state.pair && "explanation" in answer),
  draw(row) {
    const found = state.patched[state.pair][row], key = `patch ${state.pair} ${row}`;
    if (!found && (state.saved || !explained(row))) return [];
    const columns = [
      { title: "in its place", of: ({ state: name }) => name },
      { title: "KL", of: ({ kl }) => figure(kl), number: true },
      { title: "likeliest next", of: nextTokens },
      { title: "goes on", of: ({ continuation: text }) => continuation(text) },
    ];
    return [
      element("h2", {}, ofPair("Patch")),
      element("p", { class: "meta" }, "What the subject says after this token when another vector of the same length stands in ",
        "place of its activation. KL: in nats, from the activation itself."),
      found ? conditions("What the subject says with each vector", columns, found) : null,
      found ? null : element("p", { class: "buttons" }, element("button", { type: "button", id: "patch",
        disabled: standing.get(key)?.busy, click: () => patchNow(row) }, "Put the reconstruction in its place")),
      state.saved ? null : standingLine(key),
    ].filter(Boolean);
  },
});
