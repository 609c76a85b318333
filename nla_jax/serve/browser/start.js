// The start: what is read comes from the form, from the address, or from the saved page itself.
const EXAMPLE = "Return the sum of the array elements over a given axis.\n\nParameters\n----------\na : array_like\n    Elements to sum.";
const ROLES = ["user", "assistant", "system"];

function addMessage(role = "user", content = "") {
  const options = [...new Set([...ROLES, role])].map((name) => element("option", { value: name, selected: name === role }, name));
  const text = element("textarea", { rows: 2, "aria-label": "What is said" });
  text.value = content;
  const message = element("div", { class: "message" }, element("select", { "aria-label": "Who speaks" }, ...options), text,
    element("button", { type: "button", "aria-label": "Remove this message", click: () => message.remove() }, "✕"));
  byId("messages").lastElementChild.before(message);
  return text;
}

function written() {
  if (new FormData(byId("source")).get("kind") === "text") return { text: byId("text").value };
  const messages = [...byId("messages").querySelectorAll(".message")].map((one) => (
    { role: one.querySelector("select").value, content: one.querySelector("textarea").value }));
  return { messages: messages.filter(({ content }) => content.trim()) };
}

function fill(content) {
  const kind = content.text === undefined ? "messages" : "text";
  byId("source").elements.kind.value = kind;
  chooseKind(kind);
  if (kind === "text") return void (byId("text").value = content.text);
  byId("messages").querySelectorAll(".message").forEach((one) => one.remove());
  if (Array.isArray(content.messages))
    content.messages.forEach((one) => addMessage(String(one?.role ?? "user"), String(one?.content ?? "")));
}

function chooseKind(kind) {
  byId("text").hidden = kind !== "text";
  byId("messages").hidden = kind === "text";
}

function startForm() {
  const form = byId("source");
  form.hidden = false;
  byId("kinds").hidden = !state.pairs.every(({ chat }) => chat);
  byId("messages").append(element("p", { class: "buttons" },
    element("button", { type: "button", click: () => addMessage().focus() }, "Add a message")));
  addMessage("user");
  addMessage("assistant");
  byId("kinds").addEventListener("change", () => chooseKind(form.elements.kind.value));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    read(written());
  });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  byId("example").addEventListener("click", () => {
    fill({ text: EXAMPLE });
    read({ text: EXAMPLE });
  });
}

function fromAddress() {
  const found = remembered();
  byId("colour").value = state.colour;
  byId("pair").value = state.pair;
  if (!found) return;
  fill(found.content);
  read(found.content, found.row);
}

function start() {
  byId("pairs").textContent = state.pairs.map(({ name, subject, place }) => `${name}${subject && `: ${subject}`}${place && ` ${place}`}`).join(" · ");
  startStrip();
  startReading();
  startKeep();
  if (!state.saved) {
    startForm();
    addEventListener("hashchange", fromAddress);
    return void fromAddress();
  }
  byId("pairs").textContent += ` · saved ${state.saved}`;
  byId("kept").textContent = "This is a saved page: it holds what was computed, and asks nobody for more.";
  byId("work").hidden = SILENT || !missing().length;
  byId("about").hidden = byId("search").hidden = SILENT;
  show(state.row);
}

start();
