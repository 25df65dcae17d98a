"""How the report looks: colours that colour-blind readers tell apart, in light and in dark."""

PARTS = {  # of a step's cost
    "dense": "#8a8f98",
    "experts": "#0072b2",
    "exchange": "#e69f00",
    "fetched": "#d55e00",
    "kept": "#cc79a7",
    "migration": "#56b4e9",
    "fixed": "#b9bec6",
}
# Cividis, from max/mean 1 up to 3 and beyond: its lightness rises evenly, also for readers who see no red or green.
HEAT = (
    (1.005, "#00224e"),
    (1.02, "#123570"),
    (1.05, "#2b446e"),
    (1.1, "#3f536f"),
    (1.2, "#575d6d"),
    (1.35, "#6b6d73"),
    (1.5, "#7d7c78"),
    (1.75, "#948e77"),
    (2.0, "#a9a173"),
    (2.5, "#c4b56c"),
    (3.0, "#dfcd5c"),
    (float("inf"), "#fee838"),
)
STYLE = """:root{color-scheme:light dark;--bg:#fff;--fg:#1c1f24;--dim:#5c6470;--line:#d8dce2;--band:#f4f6f8;
--bad:#a3320b;--ours:#00795a;--baseline:#0072b2;--static:#8a8f98}@media(prefers-color-scheme:dark){:root{--bg:#15181d;
--fg:#e6e8eb;--dim:#a2aab5;--line:#363c45;--band:#1e232a;--bad:#ff9d76;--ours:#26b98c;--baseline:#56b4e9;--static:#9aa1ac}}
body{font:15px/1.5 system-ui,sans-serif;margin:1.5em auto;max-width:1100px;padding:0 1em;background:var(--bg);
color:var(--fg)}h1{font-size:1.6em}h2{font-size:1.25em;margin-top:2em;border-bottom:1px solid var(--line)}
h3{font-size:1em;margin:1.4em 0 .5em}.wide{overflow-x:auto}table{border-collapse:collapse;
font-variant-numeric:tabular-nums}td,th{padding:3px 9px;text-align:right;white-space:nowrap;font-weight:400}
th[scope=col]{color:var(--dim)}td:first-child,th:first-child{text-align:left}
tr:nth-child(even){background:var(--band)}.ours th,.ours td{font-weight:600}.inputs td{text-align:left;
white-space:normal;overflow-wrap:anywhere}.inputs th{color:var(--dim);vertical-align:top}
.note{color:var(--dim)}.failed{color:var(--bad);border-left:3px solid;padding-left:.7em}
.bar{display:grid;margin:2px 0;grid-template-columns:minmax(7em,13em) 1fr 4.2em;
gap:.6em;align-items:center}.bar>:last-child{text-align:right;font-variant-numeric:tabular-nums}
.name{overflow-wrap:anywhere}.track{position:relative;height:1.1em;display:flex;background:var(--band)}
.track i{display:block;height:100%}.one{position:absolute;top:0;bottom:0;border-left:1.5px solid var(--fg);
opacity:.6}.dot{position:absolute;top:.15em;width:.8em;height:.8em;margin-left:-.4em;border-radius:50%}
.baseline{background:var(--baseline)}.static{background:var(--static);border-radius:0}
i.ours,.dot.ours,.key.ours{background:var(--ours)}.dot.ours{transform:rotate(45deg);border-radius:0}
.axis{color:var(--dim)}.axis .track span{font-size:.85em}.axis .track{background:none}
.axis .track span{position:absolute;transform:translateX(-50%)}
.keyed{white-space:nowrap;margin-right:1em}
.key{display:inline-block;width:.8em;height:.8em;
margin-right:.3em;vertical-align:-.05em}
.mark.baseline{border-radius:50%}.mark.ours{transform:rotate(45deg)}.maps{display:grid;
grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:1.2em}figure{margin:0}
figcaption{margin-bottom:.3em}.maps svg{width:100%;height:150px;display:block}.scale{display:flex;
max-width:520px;margin-top:.8em;font-size:.85em;color:var(--dim)}.scale span{flex:1;text-align:right}
.scale i{display:block;height:.9em}@media(max-width:640px){.bar{grid-template-columns:1fr 4.2em}
.bar .name{grid-column:1/-1;margin-top:.4em}.axis .name{display:none}}"""
