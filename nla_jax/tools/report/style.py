"""The page's style sheet: light and dark, desk and phone. No fonts are loaded; the reader's own are used."""

CSS = """
:root { color-scheme: light dark;
  --paper: #fdfdfb; --panel: #f5f4f0; --ink: #1c1e21; --soft: #5a5e65; --hair: #dfddd6; --mark: #fbe7b0;
  --rl: #1f5fa8; --warm: #b0670c; --control: #868a92; --gold: #4a7d4f; --third: #8a4a86;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Cambria, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --panel: #1d2024; --ink: #e6e5e1; --soft: #a3a7ae; --hair: #34383e; --mark: #5c4a12;
  --rl: #6fa8ea; --warm: #e0a04e; --control: #8f949c; --gold: #82bd88; --third: #c78bc3; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 var(--serif); }
main { max-width: 56rem; margin: 0 auto; padding: 3rem 1rem 5rem; }
h1, h2 { font-weight: 600; line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 2rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--hair); }
p { max-width: 42rem; margin: .5rem 0 1rem; }
code, pre { font-family: var(--mono); font-size: .8em; }
pre { margin: .5rem 0; padding: .8rem 1rem; background: var(--panel); white-space: pre-wrap; overflow-wrap: anywhere; }
.meta, figcaption, .legend, th, td, dt, summary, .missing, h3, .tags { font-family: var(--sans); }
.meta, figcaption, .missing { color: var(--soft); font-size: .82rem; line-height: 1.5; }
.meta { overflow-wrap: anywhere; }
.missing { padding: .8rem 1rem; background: var(--panel); }

.headline { display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; align-items: flex-end; margin: 2rem 0 1rem; }
.headline dl, .headline div { margin: 0; }
.headline dt { color: var(--soft); font-size: .82rem; line-height: 1.4; }
.headline dd { margin: 0; font-variant-numeric: tabular-nums lining-nums; font-size: 1.5rem; line-height: 1.25; }
.headline .main dd { font-size: 4.2rem; line-height: 1; letter-spacing: -.02em; color: var(--rl); }
.headline .main .interval { font: .95rem var(--sans); letter-spacing: 0; color: var(--ink); padding-top: .5rem; }

figure { margin: 1rem 0 1.5rem; min-width: 0; }
figcaption { max-width: 42rem; margin-top: .4rem; }
svg { display: block; height: auto; overflow: visible; }
.narrow { display: none; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 2rem;
  align-items: start; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1.5rem 2rem; }
.panels figure { margin: 0; display: flex; flex-direction: column; } .panels svg { margin-top: auto; }
h3 { margin: 0 0 .2rem; font-size: .88rem; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0 0 .3rem; font-size: .8rem; color: var(--soft); }
.legend span::before { content: ""; display: inline-block; width: .9em; height: .22em; margin-right: .4em;
  vertical-align: .25em; background: var(--c); }
.rl { --c: var(--rl); } .warm { --c: var(--warm); } .control { --c: var(--control); } .gold { --c: var(--gold); }
.third { --c: var(--third); }
svg text { font: 12px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .name, svg .value { fill: var(--ink); font-size: 13px; }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg .grid { stroke: var(--hair); } svg .zero { stroke: var(--control); }
svg .rule { stroke: var(--gold); stroke-dasharray: 5 4; }
svg .line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
svg .faint .line { opacity: .5; stroke-width: 1.2; }
svg .dot { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
svg .hover { fill: transparent; } svg .hover:hover { fill: var(--c); }
svg .bar { fill: var(--c); }
svg .area { fill: var(--c); fill-opacity: .14; stroke: var(--c); stroke-width: 1.4; }
svg .median { stroke: var(--c); stroke-dasharray: 3 3; }
svg .whisker line { stroke: var(--ink); stroke-width: 1.4; filter: drop-shadow(0 0 1px var(--paper)); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .86rem; }
th, td { padding: .32rem 1.2rem .32rem 0; border-bottom: 1px solid var(--hair); text-align: left; vertical-align: top;
  font-weight: 400; }
thead th { color: var(--soft); font-size: .8rem; } thead th:last-child { text-align: right; }
th:last-child, td { padding-right: 0; }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 0 4rem; align-items: flex-start; }
summary { cursor: pointer; font-size: .86rem; }
figure details { margin-top: .4rem; color: var(--soft); }

.example { border-bottom: 1px solid var(--hair); }
.example > summary { padding: .7rem 0; line-height: 1.7; overflow-wrap: anywhere; }
.example > div { padding: 0 0 1.6rem; }
.number { display: inline-block; min-width: 1.7em; color: var(--soft); font-variant-numeric: tabular-nums; }
.tags { display: inline-flex; flex-wrap: wrap; gap: .3rem .9rem; font-size: .78rem; color: var(--soft);
  font-variant-numeric: tabular-nums; margin-left: .8em; }
.tags b { color: var(--c); font-weight: 600; }
mark { background: var(--mark); color: inherit; padding: .08em .12em; border-radius: 2px; }
summary mark { font-family: var(--mono); font-size: .92em; white-space: pre-wrap; }
.context { white-space: pre-wrap; overflow-wrap: anywhere; font: .8rem/1.6 var(--mono); margin: 0 0 1.2rem;
  padding: .9rem 1rem; background: var(--panel); }
.context .after { color: var(--soft); }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem 1.8rem; }
.texts p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .92rem; line-height: 1.5; }
.texts h3 { color: var(--c); }
.texts .label { --c: var(--gold); }

@media (max-width: 40rem) {
  body { font-size: 16px; } main { padding-top: 1.5rem; }
  .wide { display: none; } .narrow { display: block; } figure svg { max-width: 30rem; }
  .headline { gap: 1rem 2rem; } .headline .main { flex-basis: 100%; }
  .tags { display: flex; margin-left: 2.1em; }
}
@media print { .wide { display: block; } .narrow { display: none; } .example { break-inside: avoid; } }
"""
