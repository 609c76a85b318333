"""The page's style sheet and script. Nothing is loaded: the fonts are the reader's own, and the script makes no requests."""

# Light and dark; a phone, and from 70rem on a desktop with the contents at the side.
CSS = """
:root { color-scheme: light dark; --paper: #fdfdfb; --panel: #f5f4f0; --ink: #1c1e21; --soft: #5a5e65; --hair: #dfddd6;
  --mark: #fbe7b0; --alert: #a3261b; --sans: system-ui, sans-serif; --mono: ui-monospace, Menlo, Consolas, monospace;
  --rl: #1f5fa8; --warm: #b0670c; --control: #767a82; --gold: #3f7443; --third: #8a4a86; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --panel: #1d2024; --ink: #e6e5e1; --soft: #a3a7ae;
  --hair: #34383e; --mark: #5c4a12; --alert: #f08a7e; --rl: #6fa8ea; --warm: #e0a04e; --control: #8f949c;
  --gold: #82bd88; --third: #c78bc3; } }
.rl { --c: var(--rl); } .warm { --c: var(--warm); } .control { --c: var(--control); } .gold { --c: var(--gold); }
.third { --c: var(--third); } * { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 Charter, Cambria, Georgia, serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main { padding: 1.5rem 1rem 4rem; min-width: 0; } h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--hair); }
h3, h4 { font: 600 .9rem/1.4 var(--sans); margin: 0 0 .3rem; } h4 { color: var(--c); }
p { max-width: 44rem; margin: .4rem 0 1rem; } a { color: var(--rl); } mark { background: var(--mark); color: inherit; }
pre, .context { font: .8rem/1.6 var(--mono); white-space: pre-wrap; background: var(--panel); padding: .8rem 1rem;
  margin: .5rem 0 1rem; }
nav, .meta, figcaption, table, dl, summary, .missing, .note, .legend, .bars, form { font-family: var(--sans); }
.meta, figcaption, .missing, .note, .legend { color: var(--soft); font-size: .82rem; }
figcaption p, .note { margin: .2rem 0; } .missing { padding: .8rem 1rem; background: var(--panel); }
.warning { border-left: 5px solid var(--alert); background: var(--panel); padding: .1rem 1rem; font-weight: 600; }
nav ol { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: 0; padding: .8rem 1rem; }
.columns, .cards, .panels { display: grid; gap: 1.6rem 2.5rem; --least: 26rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
.panels { --least: 17rem; margin-top: 2rem; }
dl { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: 1.2rem 0; } dd { margin: 0; }
dt, dd:last-child { color: var(--soft); font-size: .82rem; } dd:nth-child(2) { font-size: 1.5rem; }
dl div:first-child { flex-basis: 100%; }
dl div:first-child dd:nth-child(2) { font-size: 4rem; line-height: 1.1; color: var(--rl); }
figure { margin: 0; min-width: 0; } .legend { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.legend span::before { content: ""; display: inline-block; width: .9em; height: .22em; margin: 0 .4em .25em 0;
  background: var(--c); }
.plot { padding: 26px 20px 40px 0; } .plot > svg { height: 320px; } .cards .plot > svg { height: 220px; }
.panels .plot > svg { height: 120px; } .bars svg { height: 26px; } .bars svg:last-child { height: 34px; }
svg { display: block; width: 100%; overflow: visible; font: 12px var(--sans); } svg text { fill: var(--soft); }
.end { text-anchor: end; } .middle { text-anchor: middle; } circle, .bar { fill: var(--c); stroke: var(--paper); }
path, line { vector-effect: non-scaling-stroke; fill: none; stroke: var(--c); stroke-linejoin: round; }
.grid { stroke: var(--hair); } .zero { stroke: var(--control); } .whisker { stroke: var(--ink); stroke-width: 2; }
.line { stroke-width: 1.8; stroke-linecap: round; } .faint .line { opacity: .35; stroke-width: 1; }
.median { stroke-dasharray: 3 3; } .dashed .line { stroke-dasharray: 5 4; }
.area, .band { fill: var(--c); fill-opacity: .14; } .band { stroke-opacity: .6; stroke-width: 2; }
.bars { font-size: .84rem; } .bars b { font-weight: 400; white-space: nowrap; }
.bars p { display: flex; gap: 1rem; justify-content: space-between; max-width: none; margin: .3rem 0 0; }
.scroll { overflow-x: auto; } .tables { display: flex; flex-wrap: wrap; gap: 0 4rem; align-items: flex-start; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 0 .3rem 1.2rem; border-bottom: 1px solid var(--hair); text-align: right; font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; } thead th { font-weight: 600; }
summary { cursor: pointer; font-size: .86rem; } :focus-visible { outline: 2px solid var(--rl); outline-offset: 2px; }
form:not([hidden]) { display: flex; flex-wrap: wrap; gap: .6rem 1.5rem; } select, input { font: inherit; }
.example summary { display: grid; grid-template-columns: 3.2em 1fr; padding: .6rem 0; }
.example { border-bottom: 1px solid var(--hair); } .example summary > :first-child::before { content: "▸ "; }
.example[open] summary > :first-child::before { content: "▾ "; }
.tags { grid-column: 2; display: flex; flex-wrap: wrap; gap: 0 1rem; } .tags, .after { color: var(--soft); }
.tags b { color: var(--c); } summary mark { font-family: var(--mono); white-space: pre-wrap; }
.texts { display: grid; gap: .6rem 1.8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12rem), 1fr)); }
.texts p { white-space: pre-wrap; } .picks .gold { display: none; }
@media (min-width: 70rem) { body { display: grid; grid-template-columns: 12rem minmax(0, 72rem); }
  nav ol { flex-direction: column; position: sticky; top: 2.5rem; } main { padding: 2.5rem 2rem 5rem; } }
"""

# Sorts and filters the examples. The controls stay hidden where scripts are off.
SCRIPT = """
const form = document.querySelector("form"), list = document.querySelector(".examples"), rows = [...list.children];
const [order, wanted, said] = form.elements, score = (row) => Number(row.dataset.score);
const draw = () => {
  list.append(...[...rows].sort((a, b) => Number(order.value) * (score(a) - score(b))));
  rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted.value.toLowerCase()); });
  said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
};
form.addEventListener("input", draw);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
draw();
"""
