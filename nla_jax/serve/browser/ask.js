// Requests to the server: lines of JSON, taken one by one as they are ready.
const AGAIN = 1500; // milliseconds until a server that does not answer is asked again
const TOKEN = new URLSearchParams(location.search).get("token") ?? "";

class Refused extends Error {
  constructor(answer) {
    super(answer.error);
    this.unknown = answer.unknown === true; // the server does not hold the text
  }
}
class Away extends Error {}

async function ask(fields, take, signal) {
  let response, rest = "";
  const headers = { "Content-Type": "application/json", "X-Token": TOKEN };
  const reached = (promise) => promise.catch((error) => { throw error.name === "AbortError" ? error : new Away(); });
  response = await reached(fetch("ask", { method: "POST", headers, body: JSON.stringify(fields), signal }));
  if (!response.ok) throw new Refused(await response.json().catch(() => ({ error: "The server refuses this." })));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reached(reader.read());
    if (done) throw new Away(); // amid an answer
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const answer of lines.map((line) => JSON.parse(line))) {
      if (answer.error) throw new Refused(answer);
      if (answer.done) return;
      take(answer);
    }
  }
}

// Asks until it is answered: a server that went away is asked again, and one that has forgotten the text reads it
// again. `fields` gives what is still wanted; null ends it. `refused` is told why something is refused. True: everything
// came.
async function persist(fields, take, signal, refused = notice) {
  let away = false;
  for (let wanted = fields(); wanted; wanted = fields()) {
    try {
      await ask(wanted, take, signal);
      if (away) notice("");
      return true;
    } catch (error) {
      if (error.name === "AbortError" || signal?.aborted) return false;
      if (error instanceof Away) {
        away = true;
        notice("The server does not answer. What is here stays; this page goes on as soon as the server runs again.");
        await new Promise((done) => setTimeout(done, AGAIN));
      } else if (error instanceof Refused && error.unknown && wanted.do !== "read") {
        if (!(await persist(() => ({ do: "read", ...state.content }), () => {}, signal, refused))) return false;
      } else if (error instanceof Refused) {
        refused(error.message);
        return false;
      } else throw error;
      if (signal?.aborted) return false;
    }
  }
  return true;
}
