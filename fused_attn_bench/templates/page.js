// The summary, what histories and comparisons decided, the controls, and the start.
function about() {
  const one = device(), run = one.runs[one.run], { busy } = one.environments[run.env];
  byId("about").textContent = [one.name, `run ${run.id}`, date(run.time), `commit ${short(run.commit)}`, ...(busy ? [`beside ${busy}`] : [])].join(" · ");
  byId("warnings").replaceChildren(...(one.warnings.length ? [element("ul", {}, ...one.warnings.map((text) => element("li", {}, text)))] : []));
  byId("left-out").textContent = one.left_out.length ? `Left out to keep the page small: ${one.left_out.join("; ")}.` : "";
}

const list = (lines) => element("dl", {}, ...lines.map(([name, ...rest]) => element("div", {}, titled(element("dt", {}, name)), element("dd", {}, ...rest))));

function means() {
  const rows = shownRows(), column = `vs ${data.reference}`;
  const lines = unique(rows.map(provider)).filter((name) => name !== data.reference).map((name) => {
    const ratios = rows.filter((row) => provider(row) === name && value(row, column)).map((row) => Math.log(value(row, column)));
    const mean = Math.exp(ratios.reduce((x, y) => x + y, 0) / ratios.length);
    return ratios.length ? [name, `${mean.toFixed(2)}×`, element("span", { class: "small" }, ` ${ratios.length} case${ratios.length > 1 ? "s" : ""}`)] : null;
  }).filter(Boolean);
  byId("means").replaceChildren(lines.length ? list(lines) : element("p", {}, `Nothing was timed beside ${data.reference}.`));
}

function statuses() {
  const rows = shownRows();
  byId("statuses").replaceChildren(list([["cases", unique(rows.map((row) => row.case)).length], ...unique(rows.map(status)).map((name) => [name, rows.filter((row) => status(row) === name).length])].map(([name, count]) => [name, String(count)])));
}

const signed = (effect) => (effect === null || !Number.isFinite(effect) ? "-" : percent(Math.exp(effect)));

function verdicts() {
  const { runs, changes, comparisons } = device();
  const steps = changes.filter((c) => seriesMatches(c.case, c.provider)), decided = comparisons.filter((c) => seriesMatches(c.case, c.a) || seriesMatches(c.case, c.b));
  const count = (all, what) => all.filter(what).length;
  const jump = (text, target) => element("a", { href: address(), onclick: (event) => visit(event, {}, target) }, text);
  const lines = [[jump("in the history", "changes"), `${count(steps, (c) => c.percent > 0)} slower, ${count(steps, (c) => c.percent < 0)} faster`]];
  if (comparisons.length) lines.push([jump("compared", "comparisons"), unique(decided.map((c) => c.verdict)).map((name) => `${count(decided, (c) => c.verdict === name)} ${name}`).join(", ") || "none"]);
  byId("verdicts").replaceChildren(list(lines));
  byId("changes").hidden = false;
  const link = (text, changed, target) => element("a", { href: address(changed), onclick: (event) => visit(event, changed, target) }, text);
  table(byId("changed"), ["case", "provider", "change", "first run with it", "commits"], steps.map((c) => ({
    className: c.percent > 0 ? "slower" : "faster",
    cells: [
      link(c.case, { case: c.case }, "one"), c.provider, [`${signedPercent(c.percent)}${c.kind === "step" ? "" : " drift"}`, c.percent],
      c.kind === "step" ? `${date(runs[c.run].time)}, ${runs[c.run].id}` : "-",
      c.kind === "step" ? link(`${short(runs[c.before].commit)} → ${short(runs[c.run].commit)}`, { by: "run", a: runs[c.before].id, b: runs[c.run].id }, "two") : "-",
    ],
  })));
  if (!steps.length) byId("changed").replaceChildren(element("caption", {}, "No change beyond the noise in what the filters show."));
  byId("comparisons").hidden = !decided.length;
  table(byId("compared"), ["case", "A", "B", "B takes", "95 % interval", "could find", "verdict", "when"], decided.map((c) => ({
    className: c.verdict, cells: [
      c.case, c.a, c.b, c.effect === null ? "-" : [signed(c.effect), c.effect], c.low === null ? "-" : `${signed(c.low)} … ${signed(c.high)}`,
      c.smallest === null ? "-" : [c.smallest > Math.LN2 ? "too few launches" : `± ${(100 * Math.expm1(c.smallest)).toFixed(1)} %`, c.smallest], c.reason ? `${c.verdict}: ${c.reason}` : c.verdict, date(c.time),
    ],
  })));
}

function controls() {
  fill(document.querySelector("select[name=device]"), data.devices.map((one) => one.name), device().name);
  byId("devices").hidden = data.devices.length < 2;
  const { rows, columns } = device();
  byId("selects").replaceChildren(...FILTERS.map((name, i) => {
    const select = element("select", { name });
    fill(select, [["", "all"], ...unique(rows.map((row) => row.tags[i])).filter(Boolean).sort()], state[name]);
    return element("label", {}, `${name} `, select);
  }));
  const figures = FIGURES(columns).filter((name) => rows.some((row) => value(row, name)));
  fill(document.querySelector("select[name=figure]"), figures.map((name) => [name, name.startsWith("vs ") ? `Speed against ${data.reference}` : name]), state.figure);
  for (const name of ["search", "over", "by"]) document.querySelector(`[name=${name}]`).value = state[name];
  if (FILTERS.some((name) => state[name])) byId("more").open = true;
}

renderers.unshift((changed) => {
  if (changed.has("device") || changed.has("")) {
    about();
    controls();
  }
});
renderers.push((changed) => {
  means();
  statuses();
  verdicts();
  plot(byId("time"), "Time of every provider by case", timeFigure);
  plot(byId("figure"), state.figure, chosenFigure);
  byId("roof").hidden = !shownRows().some((row) => row.work && value(row, "time"));
  plot(byId("roofline"), "Roofline", rooflineFigure);
  const filtering = ["", "device", "search", "all", ...FILTERS].some((key) => changed.has(key));
  if (filtering) sweepFigures();
});

// A filter of one device may mean nothing on another, but runs and cases surely do not carry over.
const TIED = { device: { a: "", b: "", case: "" }, by: { a: "", b: "" } };
let waiting = 0;
function control({ target: { name, value: given } }) {
  if (!(name in DEFAULTS)) return;
  const chosen = name === "device" && given === data.devices[0].name ? "" : given;
  clearTimeout(waiting);
  waiting = setTimeout(() => set({ [name]: chosen, ...(chosen === state[name] ? {} : TIED[name]) }), name === "search" ? 120 : 0);
}
document.addEventListener("input", control);
document.addEventListener("change", control);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", (event) => {
  event.preventDefault();
  clearTimeout(waiting);  // leaving a field for the button is a change of that field
  set(Object.fromEntries(["search", ...FILTERS].map((name) => [name, ""])));
  controls();
});
byId("swap").addEventListener("click", () => {
  const [a, b] = chosenRuns();
  set({ a: b, b: a });
});
byId("before").addEventListener("click", (event) => {
  const chosen = document.querySelector("select[name=point]").value;
  visit(event, withBefore(device().runs.findIndex((run) => run.id === chosen)), "two");
});
for (const button of document.querySelectorAll("[data-download]")) {
  const kind = button.dataset.download;
  button.addEventListener("click", () => (kind === "difference" ? downloadDifference() : downloadResults(kind)));
}
document.querySelector(".skip").addEventListener("click", (event) => visit(event, {}, "results"));
byId("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
// Paper is white, and all of the page is on it.
let unprinted = "";
addEventListener("beforeprint", () => {
  unprinted = document.documentElement.dataset.theme ?? "";
  document.documentElement.dataset.theme = "light";
  redraw(true);
});
addEventListener("afterprint", () => {
  if (unprinted) document.documentElement.dataset.theme = unprinted;
  else delete document.documentElement.dataset.theme;
  redraw();
});
addEventListener("hashchange", () => {
  clearTimeout(waiting);
  readAddress();
  render(new Set(["", "sort"]));
});

// The library is compressed; what comes out may run, since the page's policy names its hash.
async function loadLibrary() {
  const packed = Uint8Array.from(atob(byId("library").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(element("script", {}, await new Response(stream).text()));
  ready = typeof Plotly !== "undefined";
  redraw();
}

for (const one of document.querySelectorAll(".reference")) one.textContent = data.reference;
if (!narrow()) byId("more").open = true;
readAddress();
render(new Set([""]));
loadLibrary();
