// What each pair says of the chosen token, pairs side by side: explanation, claims, what the AR makes of it.
const DOUBTFUL = 0.3; // an FVE below this is marked

const gauge = (name, value) => [
  element("span", {}, name),
  (() => {
    const bar = element("span", { class: "gauge" }, element("span"));
    bar.firstChild.style.setProperty("--share", `${100 * Math.max(0, Math.min(1, value ?? 0))}%`);
    return bar;
  })(),
  element("span", { class: "number" }, figure(value)),
];

function doubts({ explanation, cut, fve, claims }) {
  const wrong = claims.filter((claim) => claim.true === false).map((claim) => claim.kind);
  const low = Number.isFinite(fve) && fve < DOUBTFUL;
  return [
    !explanation && ["doubt", "no explanation in the response"],
    explanation && cut && ["", "cut at the limit"],
    low && ["doubt", fve < 0 ? "doubtful: worse than the mean activation" : "doubtful: a low FVE"],
    wrong.length && ["doubt", `not true of the text: ${wrong.join(", ")}`],
  ].filter(Boolean).map(([css, text]) => element("span", { class: `badge ${css}` }, text));
}

function saidOf(pair, row) {
  const answer = state.answers[pair][row], name = named() ? element("h3", {}, state.pairs[pair].name) : null;
  if (!answer) return element("div", { class: "said" }, name, element("p", { class: "meta" }, state.saved ? "Not computed." : "Waiting …"));
  return element("div", { class: "said" }, name,
    element("p", { class: "text" }, answer.explanation || "–", answer.cut && answer.explanation ? " …" : ""), ...doubts(answer),
    ...claimList(pair, row),
    element("div", { class: "measures" }, ...(state.pairs[pair].fve ? gauge("FVE", answer.fve) : []), ...gauge("cosine", answer.cosine)));
}

PANELS.push({
  title: "Explanation",
  shows: (answer) => answer.row === state.row,
  draw(row) {
    if (row !== doubted) doubting.abort();
    const { roles, norms, sinks, tokens } = state.document, all = norms.map((of) => `${figure(of[row])} times`);
    const same = new Set(all).size === 1;
    const sink = sinks.some((of) => of[row]);
    return [
      element("h2", {}, tokenName(row), ` token ${count(row + 1)} of ${count(tokens.length)}${roles[row] ? `, ${roles[row]}` : ""}`),
      element("p", { class: "meta" }, `Norm: ${same ? all[0] : all.join(", ")} the usual. `,
        sink ? element("span", { class: "badge doubt" }, "attention sink: an explanation says little of it") : null),
      SILENT ? "" : element("div", { class: "columns" }, ...state.pairs.map((_, pair) => saidOf(pair, row))),
    ];
  },
});
