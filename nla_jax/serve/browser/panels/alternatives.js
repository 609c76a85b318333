// Other explanations of the chosen token, sampled at temperature 1 and scored by the AR; best first.
const ALTERNATIVES = 8;

function sampleMore(row) {
  const seed = Math.max(...state.alternatives.map((of) => of[row]?.seed ?? -1)) + 1;
  let left = true;
  const fields = () => left && { do: "alternatives", document: state.document.id, row, count: ALTERNATIVES, seed };
  const button = byId("sample");
  button.disabled = true;
  const put = (answer) => {
    const known = state.alternatives[answer.pair][row]?.alternatives ?? [];
    const texts = [...known, ...answer.alternatives].sort((a, b) => (b.cosine ?? -2) - (a.cosine ?? -2));
    state.alternatives[answer.pair][row] = { seed, alternatives: texts };
    left = false;
    drawPanels({ alternatives: true, row });
  };
  persist(fields, put).finally(() => drawPanels({ alternatives: true, row }));
}

PANELS.push({
  title: "Alternatives",
  shows: (answer) => answer.alternatives && answer.row === state.row,
  draw(row) {
    const columns = state.pairs.map(({ name, fve }, pair) => {
      const texts = state.alternatives[pair][row]?.alternatives ?? [];
      const value = (text) => (text.explanation ? figure(fve ? text.fve : text.cosine) : "–");
      const lines = texts.map((text) => element("li", {}, element("span", { class: "number" }, value(text)),
        element("span", {}, text.explanation || "(no explanation)", text.cut ? " …" : "")));
      return texts.length && element("div", {}, named() ? element("h3", {}, name) : null, element("ul", { class: "others" }, ...lines));
    }).filter(Boolean);
    const title = element("h2", {}, columns.length ? "Alternatives, best first" : "Alternatives");
    const button = element("button", { type: "button", id: "sample", click: () => sampleMore(row) },
      `Sample ${ALTERNATIVES} ${columns.length ? "more" : "at temperature 1"}`);
    if (state.saved) return columns.length ? [title, element("div", { class: "columns" }, ...columns)] : [];
    return [title, element("div", { class: "columns" }, ...columns), element("p", { class: "buttons" }, button)];
  },
});
