"""How the report looks: HTML and CSS for page.py to fill. Jinja escapes all that is not Markup."""

import jinja2

# A model writes part of the data, so beyond escaping, the policy forbids scripts and all that would
# be loaded from outside.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ preset }} · {{ run }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
  <p class="kicker">SRFT training report</p>
  <h1>{{ preset }}</h1>
  <dl class="facts">
    {%- for name, value in facts.items() %}
    <div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
    {%- endfor %}
  </dl>
</header>
{%- if headlines %}
<section id="headlines">
  <div class="tiles">
    {%- for tile in headlines %}
    <div class="card tile">
      <p class="name">{{ tile.name }} <span>pass@1</span></p>
      {%- if tile.change is none %}
      <p class="value">{{ tile.after }}</p>
      <p class="note">at step {{ tile.steps[1] }}</p>
      {%- else %}
      <p class="value"><span>{{ tile.before }} →</span> {{ tile.after }}</p>
      <p class="note"><b class="{{ tile.tone }}">{{ tile.change }} points</b>
        from step {{ tile.steps[0] }} to {{ tile.steps[1] }}</p>
      {%- endif %}
    </div>
    {%- endfor %}
  </div>
</section>
{%- endif %}
{%- for heading, charts in sections.items() %}
<section id="{{ heading | lower }}">
  <h2>{{ heading }}</h2>
  <div class="grid">
    {%- for chart in charts %}
    <figure class="card">{{ chart }}</figure>
    {%- endfor %}
  </div>
</section>
{%- endfor %}
<p class="note">Thin lines are single steps, thick lines their centred mean.
  Point at a chart for the values of a step.</p>
{%- if comparisons %}
<section id="samples">
  <h2>Before and after</h2>
  <p class="note">The first recorded prompts of each evaluation set, not selected.</p>
  {%- for pair in comparisons %}
  <article class="card sample">
    <div class="prompt">
      <p class="name">{{ pair.set }}</p>
      <pre>{{ pair.prompt }}</pre>
      <p class="note">answer <code>{{ pair.answer }}</code></p>
    </div>
    <div class="pair">
      {%- for row in pair.rows %}
      <div>
        <p class="note">step {{ row.step }}
          <span class="badge {{ row.tone }}">{{ row.mark }} {{ row.verdict }}</span></p>
        <pre>{{ row.completion }}</pre>
      </div>
      {%- endfor %}
    </div>
  </article>
  {%- endfor %}
</section>
{%- endif %}
<section id="config">
  <details class="card">
    <summary>Resolved configuration</summary>
    <pre>{{ config }}</pre>
  </details>
</section>
</body>
</html>
"""

STYLE = """
:root { --page: #f6f7f8; --card: #ffffff; --line: #e3e6e9; --well: #f3f5f6;
  --good: #00714f; --good-back: #dff3ea; --bad: #b3261e; --bad-back: #fbe6e4;
  --other: #7a5a00; --other-back: #f8efd2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121518; --card: #1a1e22; --line: #2a2f35; --well: #14171a;
    --good: #55d6a5; --good-back: #12382b; --bad: #ff9a90; --bad-back: #45201d;
    --other: #e3c04d; --other-back: #3a3113; }
}
* { box-sizing: border-box; }
body { max-width: 1100px; margin: 0 auto; padding: 48px 24px 72px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
p, pre, dl, dd, figure { margin: 0; }
section { margin-top: 28px; }
h1 { margin: 2px 0 14px; font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 44px 0 14px; font-size: 19px; letter-spacing: -0.01em; }
.kicker, .note, dt { color: var(--muted); font-size: 13px; }
.card { padding: 18px 20px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 32px; }
dd { overflow-wrap: anywhere; font-weight: 500; }
.tiles { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.name { font-weight: 600; }
.name span { color: var(--muted); font-weight: 400; }
.value { margin: 4px 0; font-size: 32px; line-height: 1.25; font-weight: 650;
  letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.value span { color: var(--muted); font-weight: 400; }
b.good { color: var(--good); } b.bad { color: var(--bad); }
.grid, .pair { display: grid; gap: 16px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.grid + .grid, .sample { margin-top: 16px; }
.sample .prompt { display: grid; grid-template-columns: auto 1fr auto; gap: 4px 16px;
  align-items: baseline; margin-bottom: 14px; }
pre, code { font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.pair pre, details pre { max-height: 20em; margin-top: 8px; padding: 10px 12px; overflow: auto;
  background: var(--well); border-radius: 6px; }
.prompt pre { max-height: 12em; overflow: auto; }
.badge { margin-left: 6px; padding: 1px 8px; border-radius: 99px; font-weight: 600; }
.badge.good { color: var(--good); background: var(--good-back); }
.badge.bad { color: var(--bad); background: var(--bad-back); }
.badge.other { color: var(--other); background: var(--other-back); }
summary { cursor: pointer; font-weight: 600; }
details pre { max-height: none; }
body > .note { margin-top: 12px; }
@media (max-width: 760px) {
  body { padding: 28px 14px 48px; }
  .grid, .pair { grid-template-columns: minmax(0, 1fr); }
  .card { padding: 14px; }
  .sample .prompt { grid-template-columns: minmax(0, 1fr); }
}
@media print { body { background: none; } .card { break-inside: avoid; } }
"""


def render(**fields: object) -> str:
    """The page with its fields filled in; a name that it uses and `fields` lacks is an error."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(fields)
