// What the same pair says of the tokens around, and where it says the same.
const AROUND = 3;

PANELS.push({
  title: "Around it",
  shows: (answer) => "explanation" in answer && Math.abs(answer.row - state.row) <= AROUND && answer.pair === state.pair,
  draw(row) {
    const of = state.answers[state.pair], lines = [];
    for (let at = Math.max(0, row - AROUND); at <= Math.min(spans.length - 1, row + AROUND); at++) {
      if (at === row || !of[at]) continue;
      const same = of[at].explanation === of[row]?.explanation;
      lines.push(element("li", {}, element("button", { type: "button", click: () => choose(at) }, tokenName(at),
        element("span", { class: same ? "meta" : "" }, same ? "says the same" : of[at].explanation || "(no explanation)"))));
    }
    const title = named() ? `Around it, ${state.pairs[state.pair].name}` : "Around it";
    return lines.length ? [element("h2", {}, title), element("ul", { class: "others" }, ...lines)] : [];
  },
});
