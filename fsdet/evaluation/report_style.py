"""Look of the HTML page: light and dark, from a phone's width to a desk's, and printed."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --bg: #f4f6f8; --card: #fff; --ink: #18202b; --muted: #5a6676; --rule: #dfe4ea;
  --soft: #eef1f5; --accent: #0b5cad; --novel: #fdf6e7; --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b8578f;
  --s4: #c98a00; --s5: #3d9bd1; --s6: #666; }
@media (prefers-color-scheme: dark) { :root { --bg: #11151b; --card: #191f27; --ink: #e5e9ef; --muted: #9aa6b5;
  --rule: #2f3844; --soft: #222a34; --accent: #7db8f0; --novel: #2a261b; --s0: #4fa8e8; --s1: #ff8a4c; --s2: #2cc79a;
  --s3: #e59cc5; --s4: #f2b73a; --s5: #a5d8f7; --s6: #a6aeb9; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.page { max-width: 1320px; margin: 0 auto; padding: 28px 20px 72px; }
header h1 { font-size: 27px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; }
.sub, .facts, .note { color: var(--muted); margin: 0; }
.note { font-size: 13px; margin-top: 10px; max-width: 90ch; }
nav { margin: 18px 0 0; font-size: 14px; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav > ol > li { margin: 0 0 8px; }
nav ol ol { display: flex; flex-wrap: wrap; gap: 0 14px; padding-left: 12px; font-size: 13px; }
nav > ol > li > a { font-weight: 600; color: var(--ink); }
main > section { margin: 40px 0 0; scroll-margin-top: 12px; }
h2 { font-size: 21px; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 2px; }
h3 { font-size: 16px; margin: 0 0 10px; }
h4 { font-size: 13px; font-weight: 600; margin: 0 0 6px; }
h4 span { color: var(--muted); font-weight: 400; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px;
  margin: 14px 0 0; min-width: 0; scroll-margin-top: 12px; }
dl.protocol { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 8px 20px; margin: 0; }
dl.protocol div { min-width: 0; overflow-wrap: anywhere; }
dl.protocol dt { color: var(--muted); font-size: 12.5px; }
dl.protocol dd { margin: 0; font-weight: 600; line-height: 1.35; }
dl.protocol small { display: block; font-weight: 400; font-size: 12.5px; color: var(--muted); }
ul.notes { margin: 10px 0 0; padding-left: 18px; color: var(--muted); font-size: 14px;
  overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)); gap: 18px 26px; }
.grid > div { min-width: 0; }
.grid.wide { grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
.wide svg.plot { max-width: 560px; }
.tables { display: flex; flex-wrap: wrap; gap: 18px 44px; }
.tables > div { min-width: 0; max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: 13.5px; }
th { text-align: right; font-weight: 600; color: var(--muted); border-bottom: 2px solid var(--rule);
  padding: 5px 0 5px 18px; }
td { text-align: right; border-bottom: 1px solid var(--rule); padding: 4px 0 4px 18px; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding: 4px 8px 4px 0; position: sticky; left: 0;
  background: var(--card); }
table.words th, table.words td { text-align: left; }
tr.novel td { background: var(--novel); }
td .width, td .count { color: var(--muted); font-size: 0.9em; }
summary { font-weight: 600; cursor: pointer; }
details[open] > summary { margin-bottom: 10px; }
details.single { margin-top: 12px; font-size: 13.5px; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px; padding: 0;
  font-size: 13.5px; }
ul.legend li { display: flex; align-items: center; gap: 7px; }
ul.boxes { margin: 10px 0 0; color: var(--muted); font-size: 13px; }
ul.boxes i { width: 13px; height: 13px; border-radius: 3px; border: 1px solid #0006; }
svg.plot { display: block; width: 100%; max-width: 430px; height: auto; overflow: visible; }
svg.plot text { fill: var(--muted); font-size: 12px; }
svg.plot text.name { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .grid { stroke: var(--rule); }
svg .zero { stroke: var(--muted); stroke-width: 1.2; }
svg .base { stroke: var(--muted); stroke-dasharray: 6 4; fill: none; }
svg .line { stroke: var(--c); stroke-width: 1.8; fill: none; }
svg .dashed { stroke-dasharray: 4 3; }
svg .bar { stroke: var(--c); stroke-width: 1.4; fill: none; }
svg .few { stroke-dasharray: 1 3; }
svg .run { fill: var(--c); fill-opacity: 0.34; }
svg .mark { fill: var(--c); stroke: var(--card); stroke-width: 1; }
svg .hollow { fill: var(--card); stroke: var(--c); stroke-width: 1.6; }
.beside { display: grid; grid-template-columns: 172px minmax(0, 1fr); gap: 22px; margin-top: 12px; }
.supports > div { display: flex; flex-wrap: wrap; gap: 6px; }
.supports img { width: 80px; height: 80px; border-radius: 5px; background: var(--soft); }
.supports p { margin: 4px 0 0; color: var(--muted); font-size: 13px; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; height: 170px; object-fit: contain; border-radius: 5px; background: var(--soft);
  display: block; }
figcaption { font-size: 12.5px; line-height: 1.35; color: var(--muted); margin-top: 5px; }
figcaption b { color: #fff; font-weight: 600; font-size: 11.5px; border-radius: 3px; padding: 1px 5px; }
.correct b { background: #00795a; }
.false b { background: #b34f00; }
.missed b { background: #f0e442; color: #222; }
footer { margin-top: 44px; color: var(--muted); font-size: 13px; border-top: 1px solid var(--rule); padding-top: 12px; }
@media (min-width: 1180px) {
  .page { display: grid; grid-template-columns: 200px minmax(0, 1fr); gap: 0 32px; }
  header, footer { grid-column: 1 / -1; }
  nav { position: sticky; top: 20px; align-self: start; margin-top: 40px; max-height: calc(100vh - 40px);
    overflow-y: auto; overflow-wrap: anywhere; }
  nav ol ol { display: block; }
}
@media (max-width: 640px) {
  .page { padding: 18px 12px 48px; }
  header h1 { font-size: 23px; }
  h2 { font-size: 19px; }
  .card { padding: 13px 12px; border-radius: 8px; }
  dl.protocol { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
  th, td { padding-left: 14px; }
  td:first-child { white-space: normal; min-width: 84px; max-width: 36vw; }
  .beside { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  .supports img { width: 62px; height: 62px; }
  .examples { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 12px 10px; }
  figure img { height: 130px; }
}
@media print {
  :root { color-scheme: light; --bg: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #ccc; --soft: #f2f2f2;
    --novel: #fdf6e7; --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b8578f; --s4: #c98a00; --s5: #3d9bd1;
    --s6: #666; }
  body { font-size: 11px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .page { display: block; max-width: none; padding: 0; }
  nav { position: static; max-height: none; }
  details::details-content { content-visibility: visible; height: auto; }
  .scroll { overflow: visible; }
  table { font-size: 9.5px; white-space: normal; }
  .card, figure, tr { break-inside: avoid; }
  details.card { break-inside: auto; }
}
"""
