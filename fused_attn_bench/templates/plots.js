// Figures: drawn by Plotly when they come into view, in the page's colours.
const drawn = new Map();  // element → what draws it, null when it is up to date
let ready = false;

// Plotly takes a few tags for markup; names from files must not be.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const colour = (name) => data.looks[name]?.[0] ?? "#888888";
const mark = (name) => data.looks[name]?.[1] ?? "circle";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const faded = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
const narrow = () => innerWidth < 640;

// A label may take what the narrowest figure has. Names differ at both ends: the middle of one that is too long goes.
const ruler = document.createElement("canvas").getContext("2d");
ruler.font = "12px system-ui, sans-serif";
const room = () => Math.min(innerWidth - 60, 440);
function shortened(text, pixels = room()) {
  const letters = [...text];
  const cut = (kept) => (kept < letters.length ? [...letters.slice(0, Math.ceil(kept / 2)), "…", ...letters.slice(-Math.floor(kept / 2))].join("") : text);
  let kept = letters.length, width;
  while (kept > 2 && (width = ruler.measureText(cut(kept)).width) > pixels) kept = Math.min(kept - 1, Math.ceil((kept * pixels) / width));
  return plain(cut(kept));
}
const legend = (name) => shortened(name, room() / 2);
// What a label says in full when a pointer is on it, in lines that a screen has room for.
const full = (...texts) => texts.flatMap((text) => String(text).match(narrow() ? /.{1,36}/gsu : /.{1,60}/gsu) ?? []).map(plain).join("<br>");

function axis(more = {}) {
  return {
    gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true, fixedrange: narrow(), ...more,
    title: { text: more.title ?? "", font: { size: 12 }, standoff: 6 },
  };
}

function layout(more) {
  return {
    paper_bgcolor: css("--ground"), plot_bgcolor: css("--ground"), font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 8, r: 12, t: 8, b: 40 }, hovermode: "closest", showlegend: true, dragmode: narrow() ? false : "zoom",
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 }, align: "left" },
    legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0, font: { size: 12 } }, ...more,
  };
}

const CONFIG = { displaylogo: false, responsive: true, displayModeBar: narrow() ? false : "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const SECONDS = { tickformat: "~s", ticksuffix: "s" };
const watcher = new IntersectionObserver((seen) => seen.filter((one) => one.isIntersecting).forEach((one) => draw(one.target)), { rootMargin: "300px" });

// A logarithmic axis whose every tick has its unit and room for its label: rounder numbers go before others, and none has digits that the distance of two ticks makes needless.
function logAxis(low, high, label, more = {}) {
  const ticks = [], apart = Math.log(high / low) / (narrow() ? 5 : 10);
  for (const digit of [1, 5, 2]) {
    for (let e = Math.floor(Math.log10(high)); e >= Math.log10((apart * low) / 2) - 1; e--) {
      const step = digit * 10 ** e;
      for (let i = Math.ceil(low / step); i * step <= high && i <= Math.max(1, 2 / apart); i++) {
        const tick = Number((i * step).toPrecision(6));
        if (ticks.every((other) => Math.abs(Math.log(tick / other)) >= apart)) ticks.push(tick);
      }
    }
  }
  ticks.sort((x, y) => x - y);
  return axis({ type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: ticks, ticktext: ticks.map(label), ...more });
}
const logSeconds = (values, below = 0.1) => logAxis(Math.min(...values) / 10 ** below, Math.max(...values) * 10 ** 0.1, seconds);

// `make` gives traces and layout, or null where there is nothing to show.
function plot(target, label, make) {
  target.setAttribute("role", "img");
  target.setAttribute("aria-label", label);
  drawn.set(target, make);
  watcher.unobserve(target);
  watcher.observe(target);
}

function draw(target) {
  const make = drawn.get(target);
  if (!ready || !make) return;
  drawn.set(target, null);
  target.redraw = make;
  const made = make();
  target.hidden = !made;
  if (!made) return;
  const { click, ...figure } = made;
  target.style.height = `${figure.layout.height}px`;
  Plotly.react(target, figure.traces, layout(figure.layout), CONFIG);
  target.removeAllListeners?.("plotly_click");
  if (click) target.on("plotly_click", (event) => click(event.points[0]));
}

function redraw(all = false) {
  for (const [target, make] of drawn) {
    drawn.set(target, make ?? target.redraw ?? null);
    if (all) draw(target);
    else {
      watcher.unobserve(target);
      watcher.observe(target);
    }
  }
}

// Horizontal bars in groups, the group's name above them: names are long and screens narrow.
const ROW = 17, HEAD = 20;
function grouped(groups, trace) {
  const annotations = [], byName = new Map();
  let y = 0;
  for (const [name, members] of groups) {
    annotations.push({ x: 0, xref: "paper", xanchor: "left", y: y + HEAD / 2, yanchor: "middle", text: shortened(name), hovertext: full(name), showarrow: false, font: { size: 12 }, bgcolor: css("--ground"), borderpad: 1 });
    y += HEAD;
    for (const member of members) {
      if (!byName.has(member.provider)) byName.set(member.provider, []);
      byName.get(member.provider).push({ ...member, y: y + ROW / 2 });
      y += ROW;
    }
    y += 6;
  }
  const traces = [...byName].map(([name, members]) => ({
    name: legend(name), type: "bar", orientation: "h", y: members.map((m) => m.y), width: members.map(() => ROW - 4), marker: { color: colour(name) },
    customdata: members.map((m) => full(m.text)), hovertemplate: "%{customdata}<extra></extra>", ...trace(members),
  }));
  const yaxis = axis({ range: [y, 0], visible: false, fixedrange: true });
  return { traces, layout: { annotations, yaxis, height: y + 110, barmode: "overlay", margin: { l: 8, r: 24, t: 40, b: 44 } } };
}

const bar = (sizes) => ({ type: "data", array: sizes.map((x) => x ?? 0), color: css("--ink"), thickness: 1, width: 3 });

// Cases that a figure shows at once, unless all are asked for.
const MOST = 12;
function casesOf(rows) {
  const groups = new Map();
  for (const row of rows) groups.set(row.case, [...(groups.get(row.case) ?? []), row]);
  more("cases", groups.size, MOST);
  return [...groups].slice(0, most(MOST));
}
const most = (number) => (state.all ? Infinity : number);
function more(name, size, limit) {
  for (const note of document.querySelectorAll(`[data-of="${name}"]`)) {
    note.hidden = size <= limit || Boolean(state.all);
    note.replaceChildren(`The first ${limit} of ${size} are drawn. `, element("button", { type: "button", onclick: () => set({ all: "1" }) }, "Draw all"));
  }
}

function timeFigure() {
  const groups = casesOf(shownRows().filter((row) => value(row, "time")));
  if (!groups.length) return null;
  const made = grouped(groups.map(([name, rows]) => [name, rows.map((row) => ({
    provider: provider(row), x: value(row, "time"), bar: value(row, "±"),
    text: `${provider(row)}: ${seconds(value(row, "time"))} ± ${(100 * (value(row, "±") ?? 0)).toFixed(1)} %`,
  }))]), (members) => ({ x: members.map((m) => m.x), error_x: bar(members.map((m) => m.x * m.bar)) }));
  // Bars on a logarithmic axis have no zero to begin at: they begin a bit below the shortest.
  const all = groups.flatMap(([, rows]) => rows.map((row) => value(row, "time")));
  made.layout.xaxis = logSeconds(all, 0.4);
  return made;
}

// Whose error bar is that of the time; of a ratio the reference's as well.
const RATES = new Set(["TFLOP/s", "GB/s", "of roof"]);
const FIGURES = (columns) => [`vs ${data.reference}`, ...columns.slice(columns.indexOf("vs " + data.reference) + 1, -1), "host"];

function chosenFigure() {
  const name = state.figure, ratio = name === `vs ${data.reference}`;
  const rows = shownRows().filter((row) => value(row, name) && !(ratio && provider(row) === data.reference));
  const groups = casesOf(rows);
  if (!groups.length) return null;
  const plainOf = new Map(device().rows.filter((row) => provider(row) === data.reference).map((row) => [row.case, value(row, "±")]));
  const text = (row) => row.cells[device().columns.indexOf(name)][0];
  const spread = (row) => (ratio ? Math.hypot(value(row, "±") ?? 0, plainOf.get(row.case) ?? 0) : RATES.has(name) || name.endsWith("/s") ? value(row, "±") ?? 0 : 0);
  const made = grouped(groups.map(([title, members]) => [title, members.map((row) => ({
    provider: provider(row), x: value(row, name), text: `${provider(row)}: ${text(row)}`, bar: spread(row),
  }))]), (members) => ({
    x: members.map((m) => (ratio ? m.x - 1 : m.x)), base: ratio ? 1 : null, error_x: bar(members.map((m) => m.x * m.bar)),
  }));
  // With room for the error bars.
  const ends = groups.flatMap(([, members]) => members.flatMap((row) => [1, value(row, name) * (1 + spread(row)), value(row, name) / (1 + spread(row))]));
  made.layout.xaxis = ratio
    ? logAxis(Math.min(...ends) / 1.02, Math.max(...ends) * 1.02, (x) => `${x}×`, { title: `times faster than ${data.reference}` })
    : axis({ title: shortened(name), tickformat: name === "of roof" ? ".0%" : "~s", ...(name === "host" ? SECONDS : {}), rangemode: "tozero" });
  if (name.includes("error") || name.startsWith("2 ×")) Object.assign(made.layout.xaxis, { type: "log", tickformat: ".0e", rangemode: "normal" });
  if (ratio) made.layout.shapes = [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: css("--ink"), width: 1 } }];
  return made;
}

function rooflineFigure() {
  const rows = shownRows().filter((row) => row.work && value(row, "time"));
  if (!rows.length) return null;
  const traces = [], roofs = unique(rows.map((row) => row.work.slice(2).join()));
  for (const roof of roofs) {
    const [copy, product] = roof.split(",").map(Number), ridge = product / copy;
    const dtypes = unique(rows.filter((row) => row.work.slice(2).join() === roof).map((row) => row.tags[FILTERS.indexOf("dtype")]));
    const name = `${shortened(dtypes.join(", "), 120)}: ${Number((product / 1e12).toPrecision(3))} TFLOP/s, copy ${Number((copy / 1e9).toPrecision(3))} GB/s`;
    // Marks that cannot be seen keep the name off its line.
    traces.push({
      mode: "lines+markers+text", marker: { size: 8, opacity: 0 }, x: [ridge / 30, ridge, ridge * 100], y: [product / 30, product, product], line: { color: css("--quiet"), width: 1.5 },
      text: ["", "", name], textposition: "top left", textfont: { color: css("--ink") }, showlegend: false, hoverinfo: "skip",
    });
  }
  // Names beside points where there is room for them: one a case, at its fastest, unless another name stands there; in decades.
  const cases = unique(rows.map((row) => row.case)), named = cases.length <= 12 && !narrow();
  const place = (row) => [row.work[0] / row.work[1], row.work[0] / value(row, "time")];
  const beside = (row, other) => place(row).every((x, i) => Math.abs(Math.log10(x / place(other)[i])) < [0.25, 0.15][i]);
  const labelled = cases.map((name) => rows.filter((row) => row.case === name).reduce((x, y) => (value(x, "time") <= value(y, "time") ? x : y)))
    .reduce((kept, row) => (kept.some((other) => beside(row, other)) ? kept : [...kept, row]), []);
  for (const name of unique(rows.map(provider))) {
    const mine = rows.filter((row) => provider(row) === name);
    traces.push({
      name: legend(name), mode: named ? "markers+text" : "markers", x: mine.map((row) => place(row)[0]), y: mine.map((row) => place(row)[1]),
      marker: { color: colour(name), symbol: mark(name), size: 9 }, text: mine.map((row) => (labelled.includes(row) ? shortened(row.case.split("/").pop(), 90) : "")), textposition: "top center", textfont: { size: 12 },
      customdata: mine.map((row) => full(row.case, `${name}: ${seconds(value(row, "time"))}, ${row.cells[device().columns.indexOf("of roof")][0]} of its roof`)),
      hovertemplate: "%{customdata}<extra></extra>",
    });
  }
  return {
    traces, layout: {
      height: 440, xaxis: axis({ type: "log", title: "operations per byte that has to move", tickformat: "~g", dtick: narrow() ? 1 : "D2" }),
      yaxis: axis({ type: "log", title: "operations per second", tickformat: "~s", dtick: narrow() ? 1 : "D2" }), margin: { l: 8, r: 12, t: 40, b: 44 },
    },
  };
}

const MOST_SWEEPS = 12;
function sweepFigures() {
  const visible = new Set(shownRows());
  const kept = device().sweeps.map((sweep) => ({ ...sweep, members: sweep.rows.map((i, k) => [device().rows[i], sweep.sizes[k]]).filter(([row]) => row && visible.has(row)) }))
    .filter((sweep) => unique(sweep.members.map(([row]) => row.case)).length > 1);
  byId("sweeping").hidden = !kept.length;
  more("sweeps", kept.length, MOST_SWEEPS);
  for (const old of byId("sweeps").querySelectorAll(".plot")) {
    drawn.delete(old);
    watcher.unobserve(old);
    if (ready) Plotly.purge(old);
  }
  byId("sweeps").replaceChildren(...kept.slice(0, most(MOST_SWEEPS)).map((sweep) => {
    const target = element("div", { class: "plot" });
    plot(target, `Time over N, ${sweep.name}`, () => ({
      traces: unique(sweep.members.map(([row]) => provider(row))).map((name) => {
        const mine = sweep.members.filter(([row]) => provider(row) === name).sort((x, y) => x[1] - y[1]);
        return {
          name: legend(name), mode: "lines+markers", x: mine.map(([, size]) => size), y: mine.map(([row]) => value(row, "time")), line: { color: colour(name) },
          marker: { symbol: mark(name), size: 8 }, error_y: bar(mine.map(([row]) => value(row, "time") * (value(row, "±") ?? 0))),
          customdata: mine.map(([row, size]) => full(`${name}, N = ${size}: ${seconds(value(row, "time"))}`)), hovertemplate: "%{customdata}<extra></extra>",
        };
      }),
      layout: {
        height: 300, xaxis: axis({ type: "log", title: "N", tickvals: unique(sweep.sizes) }), yaxis: logSeconds(sweep.members.map(([row]) => value(row, "time"))), margin: { l: 8, r: 12, t: 40, b: 40 },
      },
    }));
    return element("figure", {}, element("figcaption", {}, sweep.name), target);
  }));
}

// Figures one below the other with one horizontal axis: `rows` of [name, pixels], drawn by `each` with the axis' name and its domain.
function stacked(rows, each) {
  const total = rows.reduce((sum, [, pixels]) => sum + pixels, 0), axes = {}, annotations = [];
  let top = 0;
  rows.forEach(([name, pixels], i) => {
    const domain = [1 - (top + pixels - 8) / total, 1 - (top + 22) / total];
    annotations.push({ x: 0, xref: "paper", y: domain[1], yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, text: `<b>${shortened(name, 0.85 * room())}</b>`, hovertext: full(name), font: { color: css("--ink"), size: 12 } });
    axes[`yaxis${i ? i + 1 : ""}`] = axis({ domain, nticks: 4, ...each(name, i ? `y${i + 1}` : "y", annotations) });
    top += pixels;
  });
  const margin = { l: 8, r: 16, t: 8, b: 48 };
  return { height: total + margin.t + margin.b, ...axes, annotations, margin, showlegend: false, xaxis: { anchor: rows.length > 1 ? `y${rows.length}` : "y" } };
}
