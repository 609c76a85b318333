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

const LINGER = 150; // milliseconds over a claim before its worth is asked for

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

function claimLine({ kind, value, true: holds }, pair, row, index) {
  const [mark, css, said] = { true: ["✓", "yes", "true"], false: ["✗", "no", "false"], null: ["·", "", "not checked"] }[holds];
  const pointer = lingering(pair, row), focus = lingering(pair, row);
  const line = { tabindex: 0, "data-key": `claim ${pair} ${index}`, title: state.ablations[pair][row]?.[index].text,
    mouseenter: pointer.enter, mouseleave: pointer.leave, focus: focus.enter, blur: focus.leave };
  return element("li", line, element("span", { class: css, role: "img", "aria-label": said, title: said }, mark),
    element("span", { class: "kind" }, kind),
    element("span", {}, value, element("span", { class: "worth meta" }, worth(pair, row, index))));
}

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
    answer.claims.length ? element("ul", { class: "claims", "aria-label": "Claims" }, ...answer.claims.map((claim, i) => claimLine(claim, pair, row, i))) : null,
    element("div", { class: "measures" }, ...(state.pairs[pair].fve ? gauge("FVE", answer.fve) : []), ...gauge("cosine", answer.cosine)));
}

PANELS.push({
  title: "Explanation",
  shows: (answer) => answer.row === state.row,
  draw(row) {
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
