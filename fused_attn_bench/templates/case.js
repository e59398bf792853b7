// One case: its history over dates or commits, and the raw samples of the shown run.
function chosenCase() {
  const rows = shownRows();
  return state.case || (rows.find((row) => device().changes.some((c) => c.case === row.case)) ?? rows.find((row) => value(row, "time")) ?? rows[0])?.case || "";
}

// Gaps between commits are equal, whatever time lay between them.
function places(runs) {
  if (state.over === "date") return runs.map((run) => run.time);
  const commits = unique(runs.map((run) => run.commit));
  return runs.map((run) => commits.indexOf(run.commit));
}

function historySeries() {
  const name = chosenCase();
  return device().series.filter((one) => one[0] === name && (!state.provider || one[1] === state.provider) && one[3].length > 1);
}

const withBefore = (i) => ({ by: "run", a: device().runs[i - 1].id, b: device().runs[i].id });

// What a pointer selects in the figure, a keyboard does in a list.
function historyPoints() {
  const { runs } = device(), select = document.querySelector("select[name=point]");
  const points = unique(historySeries().flatMap((one) => one[3])).filter((i) => i > 0).sort((x, y) => y - x).map((i) => runs[i]);
  byId("points").hidden = !points.length;
  if (points.length) fill(select, points.map((run) => [run.id, named(run)]), (points.find((run) => run.id === select.value) ?? points[0]).id);
}

// One provider below the other, each zoomed to its own times: on one axis the slowest would flatten the others.
const ROOM = 140;
function historyFigure() {
  const { runs, machines, changes } = device(), series = historySeries(), x = places(runs), traces = [], shapes = [];
  const kinds = unique(series.map((one) => machines[one[2]])).filter(Boolean);
  byId("no-history").textContent = series.length ? (kinds.length > 1 ? `Lines of their own, which are not compared: ${kinds.join("; ")}.` : "") : "This device has no earlier run of this case in the same environment.";
  if (!series.length) return null;
  const made = stacked(unique(series.map((one) => one[1])).map((name) => [name, ROOM]), (name, yaxis, annotations) => {
    const tone = colour(name);
    for (const [, who, machine, at, medians, spreads] of series) {
      if (who !== name) continue;
      const common = { x: at.map((i) => x[i]), yaxis, mode: "lines" };
      const edge = (sign) => medians.map((us, i) => us * 1e-6 * (1 + (sign * (spreads[i] ?? 0)) / 1000));
      const band = { ...common, line: { width: 0 }, hoverinfo: "skip" };
      traces.push({ ...band, y: edge(-1) }, { ...band, y: edge(1), fill: "tonexty", fillcolor: faded(tone, 0.25) });
      traces.push({
        ...common, y: medians.map((us) => us * 1e-6), mode: "lines+markers", line: { color: tone, width: 1.5 }, marker: { symbol: mark(name), size: 6 },
        customdata: at.map((i, j) => [i, full(`${seconds(medians[j] * 1e-6)} ± ${(spreads[j] ?? 0) / 10} %`, `${date(runs[i].time)}, run ${runs[i].id}`, `commit ${short(runs[i].commit)}`, machines[machine])]),
        hovertemplate: "%{customdata[1]}<extra></extra>",
      });
    }
    changes.filter((c) => c.case === chosenCase() && c.provider === name).forEach((change, k) => {
      const step = change.kind === "step", tone = css(change.percent > 0 ? "--bad" : "--good"), text = signedPercent(change.percent);
      if (step) shapes.push({ type: "line", x0: x[change.run], x1: x[change.run], yref: `${yaxis} domain`, y0: 0, y1: 1, line: { color: tone, width: 2, dash: "dot" } });
      annotations.push({
        ...(step ? { x: x[change.run], xref: "x" } : { x: 1, xref: "paper" }), y: 1 - 0.18 * k, yref: `${yaxis} domain`, xanchor: step ? "left" : "right", yanchor: "top", showarrow: false,
        text: step ? text : `drift of ${text}`, font: { color: tone, size: 12 }, bgcolor: css("--ground"),
      });
    });
    return SECONDS;
  });
  const commits = unique(runs.map((run) => run.commit)), each = Math.ceil(commits.length / (narrow() ? 5 : 12)), ticks = commits.filter((_, i) => i % each === 0);
  const over = state.over === "date" ? { type: "date", nticks: narrow() ? 4 : 10 } : { title: "commits", tickvals: ticks.map((c) => commits.indexOf(c)), ticktext: ticks.map((c) => shortened(short(c), 90)), tickangle: 30 };
  return {
    traces, click: (point) => { const i = point.customdata?.[0]; if (i > 0) set(withBefore(i)); },
    layout: { ...made, shapes, xaxis: axis({ ...over, ...made.xaxis }) },
  };
}

const SENSORS = { "clock, MHz": "sm_mhz", "power, W": "watts", load: "load" };

function samplesFigure() {
  const name = chosenCase(), { rows, samples } = device(), traces = [];
  const mine = rows.map((row, i) => [row, samples[i]]).filter(([row, taken]) => row.case === name && taken && matches(row.tags, row.case));
  byId("no-samples").textContent = mine.length ? "" : "The shown run has no samples of this case, or the filters hide them.";
  if (!mine.length) return null;
  const sensors = Object.keys(SENSORS).filter((title) => mine.some(([, taken]) => taken[SENSORS[title]]));
  const at = (taken) => taken.us.map((_, i) => i * taken.step + 1);
  const made = stacked([...mine.map(([row]) => [provider(row), 110]), ...sensors.map((title) => [title, 85])], (title, yaxis) => {
    const own = mine.filter(([row]) => provider(row) === title);
    for (const [row, taken] of own) {
      const held = taken.throttled ?? [];
      traces.push({
        x: at(taken), y: taken.us.map((us) => us * 1e-6), yaxis, mode: "markers", marker: { color: colour(title), size: 7, opacity: 0.85, symbol: taken.us.map((_, i) => (held[i] ? "x" : "circle")) },
        customdata: taken.us.map((us, i) => full(`${title}: ${seconds(us * 1e-6)}${held[i] ? `, held back: ${held[i]}` : ""}`)), hovertemplate: "%{customdata}<extra></extra>",
      });
    }
    if (own.length) return SECONDS;
    for (const [row, taken] of mine) {
      const values = taken[SENSORS[title]];
      if (values) traces.push({ x: at(taken), y: values, yaxis, mode: "lines", line: { color: colour(provider(row)), width: 1.5 }, customdata: values.map((one) => full(`${one} beside ${provider(row)}`)), hovertemplate: "%{customdata}<extra></extra>" });
    }
    return {};
  });
  return { traces, layout: { ...made, xaxis: axis({ title: "sample", ...made.xaxis }) } };
}

renderers.push(() => {
  const named = unique([...shownRows().map((row) => row.case), ...device().series.filter((one) => seriesMatches(one[0], one[1])).map((one) => one[0])]);
  fill(document.querySelector("select[name=case]"), named, chosenCase());
  historyPoints();
  plot(byId("history"), `History of ${chosenCase()}`, historyFigure);
  plot(byId("samples"), `Samples of ${chosenCase()}`, samplesFigure);
});
