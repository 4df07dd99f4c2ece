// Lists of rows with filters. Red-team text is not even in the document until its reader asks for it.
const PAGE = 20; // rows shown before "Show more"
const red = { shown: false, listeners: [] };

function textOf(row, text, type = "") {
  const hidden = row.kind === "red_team" && !red.shown;
  return hidden ? hiddenText(text) : el("p", { class: `text ${type}` }, text === "" ? el("em", {}, "(empty)") : text);
}

const words = (text) => (text.match(/\S+/g) ?? []).length;
const hiddenText = (text) => el("p", { class: "hidden-text" }, `red-team text hidden, ${words(text)} words`);

function diffOf(row, before, after) {
  if (row.kind === "red_team" && !red.shown) return hiddenText(after);
  const mark = { "=": (t) => t, "-": (t) => el("del", {}, t), "+": (t) => el("ins", {}, t) };
  return el("p", { class: "text" }, diffWords(before, after).map(([kind, text]) => mark[kind](text)));
}

const wish = (text) => (text ? el("p", { class: "wish" }, text) : null);
const badge = (text, type = "") => el("span", { class: `badge ${type}` }, text);
const unique = (values) => [...new Set(values)].sort();
const promptOf = (row) => row.turns[row.turns.length - 1][1];

function conversation(row) {
  return row.turns.map(([role, text]) => el("div", { class: "step" }, el("h3", {}, role === "human" ? "Human" : "Assistant"), textOf(row, text)));
}

function rowTitle(row) {
  const hidden = row.kind === "red_team" && !red.shown;
  return el("span", { class: "title" }, hidden ? `red-team prompt, ${words(promptOf(row))} words` : promptOf(row));
}

// kind: {filters: [{name, label, options(rows), keep(row, value)}], sorts: {label: (a, b) => number}, text(row), badges(row),
// inside(row, state)}; checks: {name: [label, initial]}
function makeBrowser(place, data, kind) {
  const { rows } = data;
  if (!rows.length) return place.replaceChildren(el("p", { class: "note" }, "None yet."));
  const state = { words: "", sort: Object.keys(kind.sorts)[0], shown: PAGE, open: new Set(), choices: {} };
  for (const [name, [, initial]] of Object.entries(kind.checks ?? {})) state[name] = initial;
  const list = el("div"), found = el("p", { class: "found", role: "status" });
  const searched = new Map(rows.map((row) => [row, kind.text(row).toLowerCase()]));
  const passes = (row) => searched.get(row).includes(state.words) && kind.filters.every((f) => !state.choices[f.name] || f.keep(row, state.choices[f.name]));
  const card = (row) => {
    const inside = el("div", { class: "inside" });
    const open = state.open.has(row.id);
    if (open) inside.append(...kind.inside(row, state));
    return el("details", { class: "card row", open, "data-id": row.id, toggle: (event) => {
      const now = event.target.open;
      if (now === state.open.has(row.id)) return;
      if (now) state.open.add(row.id), inside.replaceChildren(...kind.inside(row, state));
      else state.open.delete(row.id);
    } }, el("summary", {}, rowTitle(row), kind.badges(row), el("code", {}, row.id)), inside);
  };
  const update = () => {
    const chosen = rows.filter(passes).sort(kind.sorts[state.sort]);
    found.textContent = `${chosen.length} of ${rows.length} shown`;
    const rest = chosen.length - state.shown;
    list.replaceChildren(...chosen.slice(0, state.shown).map(card), ...(rest > 0 ? [el("button", { type: "button", class: "more", click: () => {
      const next = state.shown;
      state.shown += PAGE;
      update();
      list.children[next]?.querySelector("summary").focus();
    } }, `Show ${Math.min(PAGE, rest)} more`)] : []));
  };
  const change = (apply) => (event) => { apply(event.target); state.shown = PAGE; update(); };
  const controls = [
    el("label", {}, "Find text", el("input", { type: "search", name: "words", input: change((input) => { state.words = input.value.trim().toLowerCase(); }) })),
    ...kind.filters.map((f) => {
      const options = f.options(rows);
      return options.length < 2 ? null : el("label", {}, f.label, el("select", { name: f.name, change: change((input) => { state.choices[f.name] = input.value; }) },
        el("option", { value: "" }, "all"), options.map(([value, text]) => el("option", { value }, text))));
    }),
    Object.keys(kind.sorts).length < 2 ? null : el("label", {}, "Sort by", el("select", { name: "sort", change: change((input) => { state.sort = input.value; }) },
      Object.keys(kind.sorts).map((name) => el("option", { value: name }, name)))),
    ...Object.entries(kind.checks ?? {}).map(([name, [label, initial]]) => el("label", { class: "check" },
      el("input", { type: "checkbox", name, checked: initial, change: change((input) => { state[name] = input.checked; }) }), label)),
  ];
  place.replaceChildren(el("div", { class: "controls" }, controls.filter(Boolean)), found, list);
  red.listeners.push(update);
  update();
}

const same = (values) => values.map((value) => [value, value.replaceAll("_", "-")]);
const kindFilter = { name: "kind", label: "Prompts", options: (rows) => same(unique(rows.map((r) => r.kind))), keep: (row, value) => row.kind === value };

function chainBrowser(principles) {
  const outcomes = (row) => (row.kept ? ["kept"] : ["rejected", `rejected: ${row.reason}`]);
  return {
    filters: [
      kindFilter,
      { name: "outcome", label: "Outcome", options: (rows) => same(unique(rows.flatMap(outcomes))), keep: (row, value) => outcomes(row).includes(value) },
      { name: "principle", label: "Principle", options: (rows) => same(unique(rows.flatMap((r) => r.rounds.map((x) => x[0])))), keep: (row, value) => row.rounds.some((x) => x[0] === value) },
    ],
    sorts: { "file order": () => 0, "words changed": (a, b) => changed(b) - changed(a) },
    checks: { marks: ["Mark changes", true] },
    text: (row) => [row.id, ...row.turns.map((t) => t[1]), row.response, ...row.rounds.flat()].join("\n"),
    badges: (row) => [badge(row.kind === "helpful" ? "plain answer" : `${row.rounds.length} ${row.rounds.length === 1 ? "round" : "rounds"}`), row.kept ? badge("kept", "good") : badge(`rejected: ${row.reason}`, "bad")],
    inside: (row, state) => [
      ...conversation(row),
      el("div", { class: "step" }, el("h3", {}, row.rounds.length ? "First answer" : "Answer"), textOf(row, row.response)),
      ...row.rounds.map(([principle, critique, revision], k) => {
        const before = k ? row.rounds[k - 1][2] : row.response;
        const [asked, wished] = principles[principle] ?? [];
        return el("div", { class: "step" },
          el("h3", {}, `Round ${k + 1}`, badge(`principle ${principle}`), before === revision ? badge("unchanged") : null),
          critique ? [wish(asked), textOf(row, critique, "critique")] : null,
          wish(wished), state.marks ? diffOf(row, before, revision) : textOf(row, revision));
      }),
    ],
  };
}

function changed(row) {
  if (row.changed === undefined) row.changed = row.rounds.reduce((sum, round, k) => sum + diffWords(k ? row.rounds[k - 1][2] : row.response, round[2])
    .reduce((count, [kind, text]) => count + (kind === "=" ? 0 : words(text)), 0), 0);
  return row.changed;
}

const confidence = (row) => (row.prob === null ? -1 : Math.abs(row.prob - 0.5));
const gap = (row) => Math.max(-1, ...row.views.filter((v) => v[1] !== null && v[2] !== null).map((v) => Math.abs(v[1] - v[2])));
const flips = (row) => row.views.some((v) => v[1] !== null && v[2] !== null && v[1] > 0.5 !== v[2] > 0.5);

function scale(row, [principle, ab, ba, thoughts], principles) {
  const known = [ab, ba].filter((p) => p !== null);
  const at = (p) => `${3 + 94 * p}%`;
  const bias = known.length === 2 ? ` bias to the first ${show(Number((ab - ba).toFixed(4)))}` : "";
  return el("div", { class: "scale" },
    el("span", { class: "name" }, principle),
    svg("svg", { "aria-hidden": "true" },
      svg("line", { class: "rail", x1: at(0), x2: at(1), y1: 9, y2: 9 }), svg("line", { class: "middle", x1: at(0.5), x2: at(0.5), y1: 3, y2: 15 }),
      known.length === 2 ? svg("line", { class: "gap", x1: at(Math.min(ab, ba)), x2: at(Math.max(ab, ba)), y1: 9, y2: 9 }) : null,
      ab === null ? null : svg("circle", { cx: at(ab), cy: 9, r: 5 }), ba === null ? null : svg("circle", { class: "ba", cx: at(ba), cy: 9, r: 4.5 })),
    el("span", {}, `● A first ${show(ab)}, ○ B first ${show(ba)};${bias || " one order"}`),
    wish(principles[principle]?.[2]), thoughts.map((text) => el("div", { class: "wish" }, textOf(row, text, "critique"))));
}

function comparisonBrowser(principles) {
  const sides = (row) => (row.prob === null ? [] : [row.prob > 0.5 ? "A" : row.prob < 0.5 ? "B" : "tie"]);
  return {
    filters: [
      { name: "source", label: "Source", options: (rows) => same(unique(rows.map((r) => r.source))), keep: (row, value) => row.source === value },
      kindFilter,
      { name: "principle", label: "Principle", options: (rows) => same(unique(rows.flatMap((r) => r.views.map((v) => v[0])))), keep: (row, value) => row.views.some((v) => v[0] === value) },
      { name: "better", label: "Better", options: (rows) => same(unique(rows.flatMap(sides))), keep: (row, value) => sides(row).includes(value) },
      { name: "orders", label: "Orders", options: (rows) => (rows.some(flips) ? [["agree", "agree"], ["differ", "differ"]] : []), keep: (row, value) => row.views.length > 0 && flips(row) === (value === "differ") },
    ],
    sorts: { "file order": () => 0, "most confident": (a, b) => confidence(b) - confidence(a), "least confident": (a, b) => confidence(a) - confidence(b), "disagreement of orders": (a, b) => gap(b) - gap(a) },
    text: (row) => [row.id, ...row.turns.map((t) => t[1]), row.a, row.b, ...row.views.flatMap((v) => [v[0], ...v[3]])].join("\n"),
    badges: (row) => [badge(row.source === "ai" ? "AI label" : row.source), flips(row) ? badge("orders differ", "bad") : null, badge(row.prob === null ? "no label" : `P(A better) ${row.prob.toFixed(3)}`)],
    inside: (row) => [
      ...conversation(row),
      el("div", { class: "sides" }, [["A", row.a, row.prob > 0.5], ["B", row.b, row.prob !== null && row.prob < 0.5]].map(([name, text, better]) =>
        el("div", { class: `side ${better ? "better" : ""}` }, el("h3", {}, `Answer ${name}`, better ? badge("preferred", "good") : null), textOf(row, text)))),
      ...row.views.map((view) => scale(row, view, principles)),
      row.clamp ? el("p", { class: "note" }, `Label kept within ${row.clamp[0]} and ${row.clamp[1]}.`) : null,
    ].filter(Boolean),
  };
}

const answerBrowser = () => ({
  filters: [kindFilter],
  sorts: { "file order": () => 0 },
  text: (row) => [row.id, ...row.turns.map((t) => t[1]), ...row.answers.map((a) => a[1])].join("\n"),
  badges: (row) => [badge(row.kind.replaceAll("_", "-"))],
  inside: (row) => [
    ...conversation(row),
    el("div", { class: "sides" }, row.answers.map(([policy, text]) =>
      el("div", { class: "side" }, el("h3", {}, { base: "base", sl_cai: "SL-CAI", rl_cai: "RL-CAI" }[policy] ?? policy), textOf(row, text)))),
  ],
});
