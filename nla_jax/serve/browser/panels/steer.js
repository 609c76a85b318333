// The explanation edited, and what the subject says when its activation is moved along the difference; beside controls.
const STRENGTHS = [0.125, 0.25, 0.5, 1, 2, 4]; // stops of the slider
const drafts = new Map(); // edits that are being written, by text, pair and token
let stop = 3; // of the slider
let steering = null; // what can be given up: the strengths of an edit that is followed by another

const steerKey = (row) => `steer ${state.document.id} ${state.pair} ${row}`;

function steerNow(row) {
  const pair = state.pair, edited = byId("edited").value;
  const others = STRENGTHS.filter((_, i) => i !== stop), strengths = [STRENGTHS[stop], ...others];
  const take = ({ edit, strength, steered }) => {
    const known = state.steered[pair][row];
    const by = known?.edit.edited === edit.edited ? known.by : {};
    state.steered[pair][row] = { edit, by: { ...by, [strength]: steered } };
    drawSteered(row, pair);
  };
  const fields = { do: "steer", row, pair, edited, strengths };
  steering?.abort();
  steering = new AbortController();
  standing.delete(steerKey(row));
  demand(steerKey(row), fields, take, () => drawSteered(row, pair), steering.signal);
}

// The results alone: who is writing into the panel is not disturbed.
function drawSteered(row, pair) {
  if (row !== state.row || pair !== state.pair || !byId("steered")) return;
  const found = state.steered[pair][row], strength = STRENGTHS[stop], rows = found?.by[strength];
  byId("strength-said").textContent = `${strength} × the activation's length`;
  byId("strength").setAttribute("aria-valuetext", `${strength} times the activation's length`);
  const inside = [];
  if (found) {
    const { size, cosine, words, edited, unrelated } = found.edit;
    const share = (name) => `${figure(size[name])} of the reconstruction's length`;
    inside.push(element("p", { class: "meta", id: "delta" }, `Δ, from the explanation to “${edited}”: ${share("edit")}, cosine of the two `,
      `reconstructions ${figure(cosine, 3)}. The unrelated edit, to “${unrelated}”: ${share("unrelated edit")}.`));
    const columns = [
      { title: "moved along", of: ({ direction }) => direction },
      { title: "KL", of: ({ kl }) => figure(kl), number: true },
      ...words.map((word, i) => ({ title: `p(${word})`, of: ({ p }) => figure(p[i], 3), number: true })),
      { title: "goes on", of: ({ continuation: text }) => continuation(text) },
    ];
    if (rows) inside.push(conditions(`What the subject says at strength ${strength}`, columns, rows));
    else if (state.saved || !standing.get(steerKey(row))?.busy) inside.push(element("p", { class: "meta" }, "Not computed at this strength."));
  }
  byId("steered").replaceChildren(...inside, state.saved ? "" : standingLine(steerKey(row)));
}

function editor(row) {
  const key = steerKey(row), { explanation } = state.answers[state.pair][row];
  const text = element("textarea", { id: "edited", rows: 3, "aria-label": "The explanation, to be edited",
    input: () => drafts.set(key, text.value) });
  text.value = drafts.get(key) ?? state.steered[state.pair][row]?.edit.edited ?? explanation;
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) steerNow(row);
  });
  const restore = () => { drafts.delete(key); text.value = explanation; text.focus(); };
  return [text, element("p", { class: "buttons" },
    element("button", { type: "button", id: "steer", click: () => steerNow(row) }, "Steer"),
    element("button", { type: "button", click: restore }, "Undo the edit"))];
}

PANELS.push({
  title: "Steer",
  shows: (answer) => answer.row === state.row && answer.pair === state.pair && "explanation" in answer && !byId("edited"),
  draw(row) {
    const found = state.steered[state.pair][row];
    if (!found && (state.saved || !explained(row))) return [];
    const pair = state.pair, slider = element("input", { type: "range", id: "strength", min: 0, max: STRENGTHS.length - 1, step: 1, value: stop,
      input: (event) => { stop = Number(event.target.value); drawSteered(row, pair); } });
    setTimeout(() => drawSteered(row, pair)); // once these stand in the page
    return [
      element("h2", {}, ofPair("Steer")),
      element("p", { class: "meta" }, "Edit the explanation. The activation is moved along Δ, the difference that the edit makes to the ",
        "reconstruction, and the subject goes on from there. An edit steers only where the controls of the same strength do not."),
      ...(state.saved ? [] : editor(row)),
      element("p", { class: "bar" }, element("label", {}, "Strength ", slider), element("span", { id: "strength-said", class: "meta" })),
      element("div", { id: "steered" }),
    ];
  },
});
