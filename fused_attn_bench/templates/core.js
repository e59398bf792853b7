"use strict";
// Data, the state that the address keeps, and what every part of the page uses.
const data = JSON.parse(document.getElementById("data").textContent);
for (const { rows } of data.devices) for (const row of rows) row.case = row.cells[0];
const byId = (id) => document.getElementById(id);

// What the state is where the address says nothing; the empty text is "all", "none" or "the first".
const DEFAULTS = {
  device: "", search: "", op: "", variant: "", mode: "", dtype: "", provider: "", status: "", sort: "", case: "",
  figure: `vs ${data.reference}`, over: "date", by: "run", a: "", b: "", all: "",
};
const state = { ...DEFAULTS };
const renderers = [];  // functions of the keys that changed, in the order of the page

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(DEFAULTS)) state[key] = given.get(key) ?? DEFAULTS[key];
}

function address(changes = {}) {
  const said = Object.entries({ ...state, ...changes }).filter(([key, value]) => value !== DEFAULTS[key]);
  return `#${new URLSearchParams(said)}`;
}

function set(changes) {
  const changed = new Set(Object.keys(changes).filter((key) => state[key] !== changes[key]));
  if (!changed.size) return;
  Object.assign(state, changes);
  history.replaceState(null, "", address());
  render(changed);
}

function render(changed) {
  for (const renderer of renderers) renderer(changed);
}

const device = () => data.devices.find((one) => one.name === state.device) ?? data.devices[0];

// Elements are made with text nodes only: whatever a file holds stays text.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// A value that is not among the options is shown as one, so that a link to it is not silently something else.
function fill(select, options, value) {
  const all = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  if (!all.some(([key]) => key === value)) all.unshift([value, value]);
  select.replaceChildren(...all.map(([key, text]) => element("option", { value: key }, text)));
  select.value = value;
}

const FILTERS = data.filters;

function matches(tags, name) {
  const text = `${name} ${tags[FILTERS.indexOf("provider")]}`.toLowerCase();
  return FILTERS.every((key, i) => !state[key] || tags[i] === null || tags[i] === state[key]) && text.includes(state.search.toLowerCase());
}

// For what is no row of the shown run, which has no status: null goes through that filter.
function seriesMatches(name, provider) {
  const parts = name.split("/");
  const [op, variant, mode, dtype] = parts.length === 5 ? parts : ["", "", "", ""];
  return matches([op, variant, mode, dtype, provider, null], name);
}

const shownRows = () => device().rows.filter((row) => matches(row.tags, row.case));
const value = (row, column) => {
  const cell = row.cells[device().columns.indexOf(column)];
  return Array.isArray(cell) ? cell[1] : null;
};
const provider = (row) => row.tags[FILTERS.indexOf("provider")];
const status = (row) => row.tags[FILTERS.indexOf("status")];
const unique = (values) => [...new Set(values)];
const median = (values) => {
  const sorted = [...values].sort((x, y) => x - y), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

function seconds(value) {
  const [factor, unit] = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]].find(([f]) => value >= f) ?? [1e-6, "µs"];
  return `${Number((value / factor).toPrecision(4))} ${unit}`;
}
const percent = (ratio) => `${ratio >= 1 ? "+" : "−"}${Math.abs(100 * (ratio - 1)).toFixed(1)} %`;
const signedPercent = (number) => `${number > 0 ? "+" : "−"}${Math.abs(number)} %`;
const date = (text) => text.slice(0, 16).replace("T", " ");
const short = (commit) => (/^[0-9a-f]{40}/.test(commit) ? commit.slice(0, 10) + commit.slice(40) : commit || "unknown");
const named = (run) => `${date(run.time)}, ${short(run.commit)}, ${run.id}`;

function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Text that a spreadsheet would take for a formula gets an apostrophe before it; a number is none, whatever its sign.
function csv(columns, lines) {
  const quoted = (cell) => {
    const text = typeof cell === "string" ? cell.replace(/^[=+\-@\t\r]/, "'$&") : String(cell ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...lines].map((line) => line.map(quoted).join(",") + "\r\n").join("");
}

// What has no room for all of its text says it in a title.
function titled(made) {
  if (made.textContent.length > 20) made.title = made.textContent;
  return made;
}

// A table whose headings sort: cells are text, or [text, number], or an element. What has no number stays last in both directions.
function table(target, columns, lines, { sorted = "", onsort = null } = {}) {
  const body = element("tbody");
  const content = (cell) => (Array.isArray(cell) ? cell[0] : cell);
  const numbers = columns.map((_, i) => lines.some(({ cells }) => Array.isArray(cells[i])));
  const heads = columns.map((name, i) => element("th", { scope: "col", "aria-sort": "none", class: numbers[i] ? "number" : null }, titled(element("button", { type: "button" }, name))));
  const trs = lines.map(({ cells, className }) => {
    const tr = element("tr", { class: className || null });
    cells.forEach((cell, i) => {
      const made = i ? element("td", { class: numbers[i] ? "number" : null }, content(cell)) : element("th", { scope: "row" }, element("div", {}, content(cell)));
      tr.append(titled(made));
    });
    return tr;
  });
  const order = (by) => {
    const down = by.startsWith("-"), name = by.replace(/^-/, ""), index = columns.indexOf(name);
    const numeric = numbers[index];
    const key = (i) => {
      const cell = lines[i].cells[index];
      return numeric ? (Array.isArray(cell) ? cell[1] : null) : trs[i].cells[index].textContent;
    };
    const places = lines.map((_, i) => i);
    if (index >= 0) {
      places.sort((i, j) => {
        const [x, y] = [key(i), key(j)];
        if (x === null || y === null) return (x === null) - (y === null);
        return (numeric ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
      });
    }
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== index ? "none" : down ? "descending" : "ascending"));
    body.append(...places.map((i) => trs[i]));
    return places;
  };
  heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
    const by = (head.getAttribute("aria-sort") === "ascending" ? "-" : "") + columns[i];
    order(by);
    onsort?.(by);
  }));
  target.replaceChildren(element("thead", {}, element("tr", {}, ...heads)), body);
  order(sorted);
  return { rows: trs, order };
}
