"""The style sheet of a page: one column on a phone, three on a desk and on paper, light or dark as the system is.

Kinds have the colours of Okabe and Ito, darkened or lightened until they stand out from the ground by 3:1. Ages run
from light to dark, on a dark ground from dim to bright, so that their order is seen without a legend.
"""

COLOURS = """
:root {
  --ground: #f6f6f4; --card: #ffffff; --ink: #1c1e22; --muted: #5a606b; --rule: #d9dbdf; --grid: #e6e7ea;
  --accent: #0b62a4; --warn: #a63c00; --warn-ground: #fdf1e8;
  --c0: #0072b2; --c1: #c44e00; --c2: #008a64; --c3: #a8558a; --c4: #946a00; --c5: #2f8fc4; --c6: #6b7280;
  --a0: #58a53e; --a1: #1f9472; --a2: #26828e; --a3: #31688e; --a4: #3e4989; --a5: #440154;
  --h0: #e4eef7; --h1: #b9d6ec; --h2: #78b0d9; --h3: #3181bd; --h4: #08467f;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #121417; --card: #1a1d22; --ink: #e9ebee; --muted: #a6adb9; --rule: #363b44; --grid: #2b3038;
    --accent: #6cb6ee; --warn: #ffb27a; --warn-ground: #33231a;
    --c0: #56b4e9; --c1: #f08a4b; --c2: #35c797; --c3: #dd9fc8; --c4: #e6b43c; --c5: #9bd3f5; --c6: #aab1bd;
    --a0: #4a6fa5; --a1: #2f93a0; --a2: #35b779; --a3: #8fd744; --a4: #dde318; --a5: #fff6b0;
    --h0: #1e2f3e; --h1: #214f73; --h2: #2a7ab0; --h3: #5fb3e6; --h4: #c9e8ff;
  }
}
"""

_PAGE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1264px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 12px; padding-top: 10px; border-top: 2px solid var(--ink); }
h3 { font-size: 16px; line-height: 1.3; margin: 0; }
h4 { font-size: 13px; font-weight: 600; margin: 0 0 6px; }
p { margin: 0; }
a { color: var(--accent); }
code { font: 0.92em ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.about { color: var(--muted); margin-top: 4px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 20px 0 0;
  padding: 0; background: var(--rule); border: 1px solid var(--rule); list-style: none; }
.facts li { background: var(--card); padding: 10px 14px 12px; }
.facts b { display: block; font-size: 20px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.facts span { color: var(--muted); font-size: 13px; display: block; }
.advice { margin: 20px 0 0; padding: 14px 20px 14px; background: var(--card); border-left: 4px solid var(--accent); }
.advice h2, .alarms h2 { font-size: 16px; margin: 0 0 6px; padding: 0; border: 0; }
.advice ol { margin: 0; padding-left: 22px; }
.advice li + li { margin-top: 4px; }
.advice .small { margin-top: 8px; }
.alarms { margin: 12px 0 0; padding: 14px 20px; background: var(--warn-ground); border-left: 4px solid var(--warn); }
.alarms ul { margin: 0; padding-left: 20px; }
.contents { margin-top: 16px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.cards { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--rule); padding: 14px 16px 16px; min-width: 0;
  break-inside: avoid; }
.card h3 { display: flex; justify-content: space-between; gap: 12px; }
.card h3 .number { color: var(--muted); font-weight: 400; font-size: 13px; white-space: nowrap; padding-top: 2px; }
.decision { color: var(--muted); font-size: 13px; margin: 3px 0 12px; }
.panels { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; }
.panel { margin: 0; min-width: 0; max-width: 440px; }
figcaption { font-size: 13px; margin-top: 4px; }
.missing { color: var(--muted); font-size: 14px; border: 1px dashed var(--rule); padding: 12px 14px;
  overflow-wrap: anywhere; }
.small { color: var(--muted); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; margin-top: 8px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; color: var(--muted); }
td.n, th.n { text-align: right; white-space: nowrap; }
table.words td { min-width: 6em; overflow-wrap: anywhere; }
th:last-child, td:last-child { padding-right: 0; }
dl { margin: 8px 0 0; font-size: 13px; }
dt { font-weight: 600; }
dd { margin: 0 0 6px; color: var(--muted); }
.sample { margin-top: 12px; padding-top: 10px; border-top: 1px solid var(--grid); }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0; padding: 8px 10px;
  background: var(--ground); font: 13px/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
.sample .tokens span, .ages span { border-bottom: 2px solid var(--c); }
.ages span { padding: 0 5px; color: var(--ink); }
.plot { display: block; width: 100%; height: auto; overflow: visible; }
"""

PLOT = """
.plot text { fill: var(--muted);
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.plot text.legend, .plot text.label { fill: var(--ink); }
.plot .grid line { stroke: var(--grid); stroke-width: 1; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.a0 { --c: var(--a0); } .a1 { --c: var(--a1); } .a2 { --c: var(--a2); }
.a3 { --c: var(--a3); } .a4 { --c: var(--a4); } .a5 { --c: var(--a5); }
.h0 { --c: var(--h0); } .h1 { --c: var(--h1); } .h2 { --c: var(--h2); } .h3 { --c: var(--h3); } .h4 { --c: var(--h4); }
.ink { --c: var(--ink); } .soft { --c: var(--muted); }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.dashed { stroke-dasharray: 6 4; stroke-linecap: butt; }
.range { stroke: var(--c); stroke-width: 3; }
.range.thin { stroke-width: 1.2; }
.limit { stroke: var(--c); stroke-width: 1.4; stroke-dasharray: 3 3; }
.limit.solid { stroke-width: 1; stroke-dasharray: none; }
.fill { fill: var(--c); }
.dot { fill: var(--c); }
.ring { fill: var(--card); stroke: var(--c); stroke-width: 1.6; }
"""

_LAYOUT = """
@media (min-width: 760px) {
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .span-2, .span-3 { grid-column: span 2; }
  .span-2 .panels, .span-3 .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); row-gap: 0; }
}
@media print, (min-width: 1120px) {
  .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .span-2 { grid-column: span 2; }
  .span-3 { grid-column: span 3; }
  .span-2 .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); row-gap: 0; }
  .span-3 .panels { grid-template-columns: repeat(3, minmax(0, 1fr)); row-gap: 0; }
}
@media print, (min-width: 760px) { /* title, plot and reading of panels side by side are rows: their axes stand level */
  .span-2 .panel, .span-3 .panel { display: grid; grid-template-rows: subgrid; grid-row: span 3; }
  .plot { align-self: end; }
  .missing { align-self: start; }
}
@media (max-width: 759px) {
  main { padding: 18px 12px 32px; }
  h1 { font-size: 24px; }
  .card { padding: 12px 12px 14px; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media print {
  @page { size: landscape; margin: 10mm; }
  body { zoom: 0.76; background: #fff; font-size: 14px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .facts { grid-template-columns: repeat(6, minmax(0, 1fr)); }
  .cards { gap: 8px; }
  .card { padding: 8px 10px; }
  .decision { margin-bottom: 6px; }
  .contents { display: none; }
  .wide { overflow: visible; }
  table { font-size: 12px; }
  th, td { padding-right: 8px; }
  h2 { break-after: avoid; margin-top: 16px; font-size: 18px; }
}
"""

STYLE = COLOURS + _PAGE + PLOT + _LAYOUT
