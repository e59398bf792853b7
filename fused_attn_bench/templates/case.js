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

// One provider below the other, each zoomed to its own times: on one axis the slowest would flatten the others.
const ROOM = 150;
function historyFigure() {
  const { runs, machines, changes } = device(), series = historySeries(), x = places(runs);
  byId("no-history").textContent = series.length ? "" : "This case has no earlier run on this device.";
  if (!series.length) return null;
  const names = unique(series.map((one) => one[1])), traces = [], shapes = [], annotations = [], axes = {};
  const height = 60 + ROOM * names.length, part = 1 / names.length;
  names.forEach((name, row) => {
    const domain = [1 - (row + 1) * part + 0.14 * part, 1 - row * part - 0.12 * part], y = row ? `y${row + 1}` : "y";
    axes[`yaxis${row ? row + 1 : ""}`] = axis({ domain, nticks: 4, ...SECONDS });
    annotations.push({ x: 0, xref: "paper", y: domain[1], yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, text: `<b>${plain(name)}</b>`, font: { color: css("--ink"), size: 12 } });
    series.filter((one) => one[1] === name).forEach(([, , machine, at, medians, spreads], k) => {
      const tone = data.palette[(data.palette.indexOf(colour(name)) + k) % data.palette.length];
      const common = { x: at.map((i) => x[i]), yaxis: y, legendgroup: `${name} ${machine}` };
      const edge = (sign) => medians.map((us, i) => us * 1e-6 * (1 + (sign * (spreads[i] ?? 0)) / 1000));
      const band = { ...common, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      traces.push({ ...band, y: edge(-1) }, { ...band, y: edge(1), fill: "tonexty", fillcolor: faded(tone, 0.2) });
      traces.push({
        ...common, name: plain(`${name}, ${machines[machine]}`), showlegend: machines[machine] !== "", y: medians.map((us) => us * 1e-6), mode: "lines+markers", line: { color: tone, width: 1.5 }, marker: { symbol: mark(name), size: 6 },
        customdata: at.map((i, j) => [i, plain(`${seconds(medians[j] * 1e-6)} ± ${(spreads[j] ?? 0) / 10} %`) + `<br>${plain(date(runs[i].time))}, run ${plain(runs[i].id)}<br>commit ${plain(short(runs[i].commit))}`]),
        hovertemplate: "%{customdata[1]}<extra></extra>",
      });
    });
    changes.filter((c) => c.case === chosenCase() && c.provider === name).forEach((change, k) => {
      const step = change.kind === "step", tone = css(change.percent > 0 ? "--bad" : "--good"), text = `${change.percent > 0 ? "+" : "−"}${Math.abs(change.percent)} %`;
      if (step) shapes.push({ type: "line", x0: x[change.run], x1: x[change.run], yref: `${y} domain`, y0: 0, y1: 1, line: { color: tone, width: 2, dash: "dot" } });
      annotations.push({
        ...(step ? { x: x[change.run], xref: "x" } : { x: 1, xref: "paper" }), y: 1 - 0.18 * k, yref: `${y} domain`, xanchor: step ? "left" : "right", yanchor: "top", showarrow: false,
        text: step ? text : `drift of ${text}`, font: { color: tone, size: 12 },
      });
    });
  });
  const commits = unique(runs.map((run) => run.commit)), each = Math.ceil(commits.length / (narrow() ? 5 : 12)), ticks = commits.filter((_, i) => i % each === 0);
  const over = state.over === "date" ? { type: "date" } : { title: "commits", tickvals: ticks.map((c) => commits.indexOf(c)), ticktext: ticks.map((c) => plain(short(c))), tickangle: 45 };
  return {
    traces, click: (point) => { const i = point.customdata?.[0]; if (i > 0) set({ by: "run", a: runs[i - 1].id, b: runs[i].id }); },
    layout: { height, shapes, annotations, ...axes, xaxis: axis({ ...over, anchor: names.length > 1 ? `y${names.length}` : "y" }), margin: { l: 8, r: 16, t: 30, b: 40 } },
  };
}

const SENSORS = [["sm_mhz", "clock, MHz"], ["watts", "power, W"], ["load", "load"]];

function samplesFigure() {
  const name = chosenCase(), { rows, samples } = device(), traces = [];
  const mine = rows.map((row, i) => [row, samples[i]]).filter(([row, taken]) => row.case === name && taken && matches(row.tags, row.case));
  byId("no-samples").textContent = mine.length ? "" : "The shown run has no samples of this case, or the filters hide them.";
  if (!mine.length) return null;
  const sensors = SENSORS.filter(([key]) => mine.some(([, taken]) => taken[key])), height = 0.34 / Math.max(sensors.length, 1);
  const floor = sensors.length ? 0.42 : 0, axes = { yaxis: axis({ domain: [floor, 1], ...SECONDS }) };
  sensors.forEach(([, title], i) => {
    const top = floor - 0.05 - i * (height + 0.02);
    axes[`yaxis${i + 2}`] = axis({ domain: [Math.max(top - height, 0), top], title, nticks: 3, rangemode: "tozero" });
  });
  for (const [row, taken] of mine) {
    const place = taken.us.map((_, i) => i * taken.step + 1), held = taken.throttled ?? [];
    const common = { x: place, marker: { color: colour(provider(row)) }, legendgroup: provider(row), name: plain(provider(row)) };
    traces.push({
      ...common, mode: "markers", y: taken.us.map((us) => us * 1e-6), marker: { color: colour(provider(row)), size: 7, symbol: place.map((_, i) => (held[i] ? "x" : "circle")), opacity: 0.8 },
      customdata: place.map((_, i) => plain(`${provider(row)}: ${seconds(taken.us[i] * 1e-6)}${held[i] ? `, held back: ${held[i]}` : ""}`)), hovertemplate: "%{customdata}<extra></extra>",
    });
    sensors.forEach(([key, title], i) => {
      if (taken[key]) traces.push({ ...common, y: taken[key], yaxis: `y${i + 2}`, mode: "lines", line: { color: colour(provider(row)), width: 1.5 }, showlegend: false, hovertemplate: `%{y:~g} ${title.split(", ")[1] ?? title}<extra></extra>` });
    });
  }
  return { traces, layout: { height: 280 + 90 * sensors.length, ...axes, xaxis: axis({ title: "sample", anchor: sensors.length ? `y${sensors.length + 1}` : "y" }), margin: { l: 8, r: 12, t: 40, b: 40 } } };
}

renderers.push(() => {
  const named = unique([...shownRows().map((row) => row.case), ...device().series.filter((one) => seriesMatches(one[0], one[1])).map((one) => one[0])]);
  fill(document.querySelector("select[name=case]"), named, chosenCase());
  plot(byId("history"), `History of ${chosenCase()}`, historyFigure);
  plot(byId("samples"), `Samples of ${chosenCase()}`, samplesFigure);
});
