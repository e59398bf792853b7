// Two runs, or two commits, against each other; of a commit the median over its runs.
const MOST_DIFFERENCES = 25;
let differences = [];

function choices() {
  const { runs } = device();
  if (state.by === "run") return runs.map((run) => [run.id, named(run)]).reverse();
  return unique(runs.map((run) => run.commit)).map((commit) => [commit, `${short(commit)}, ${date(runs.findLast((run) => run.commit === commit).time)}`]).reverse();
}

const members = (name) => device().runs.map((run, i) => ((state.by === "run" ? run.id : run.commit) === name ? i : -1)).filter((i) => i >= 0);

// By default the shown run and the one before it that may be compared with it.
function chosenRuns() {
  const { runs, run } = device(), key = (one) => (state.by === "run" ? one.id : one.commit);
  const b = state.b || key(runs[run]);
  const last = runs.findLastIndex((one) => key(one) === b), before = runs.slice(0, Math.max(last, 0)).filter((one) => key(one) !== b);
  const same = before.findLast((one) => one.env === runs[last]?.env && one.timer === runs[last]?.timer) ?? before.at(-1);
  return [state.a || (same ? key(same) : b), b];
}

// Of one run against the next, as a log ratio, from what neighbouring runs of the series differ by: a step hardly touches their median,
// which 0.6745 turns into a standard deviation. Null where there are too few runs to tell.
const FEWEST = 5;
function noise(medians) {
  const steps = medians.slice(1).map((us, i) => Math.abs(Math.log(us / medians[i])));
  return steps.length < FEWEST ? null : median(steps) / 0.6745;
}

function compareRuns() {
  const [a, b] = chosenRuns().map((name) => new Set(members(name))), found = new Map();
  for (const [name, who, , places, medians, spreads] of device().series) {
    if (!seriesMatches(name, who)) continue;
    const key = JSON.stringify([name, who]), pair = found.get(key) ?? { case: name, provider: who, a: [], b: [], noise: null };
    if (places.some((run) => b.has(run))) pair.noise = noise(medians);
    places.forEach((run, i) => {
      for (const [side, runs] of [["a", a], ["b", b]]) if (runs.has(run)) pair[side].push([medians[i] * 1e-6, (spreads[i] ?? 0) / 1000]);
    });
    found.set(key, pair);
  }
  const middle = (side, i) => median(side.map((one) => one[i]));
  differences = [...found.values()].filter((pair) => pair.a.length && pair.b.length).map((pair) => {
    const [before, after] = [middle(pair.a, 0), middle(pair.b, 0)], spread = Math.hypot(middle(pair.a, 1), middle(pair.b, 1));
    return { case: pair.case, provider: pair.provider, a: before, b: after, ratio: after / before, spread, noise: pair.noise };
  });
}

// Three times what neighbouring runs differ by, the spread, and one per cent, the smallest change that the tool speaks of.
const beyond = (d) => d.noise !== null && Math.abs(Math.log(d.ratio)) > Math.max(3 * d.noise, d.spread, 0.01);
const tone = (d) => (beyond(d) ? (d.ratio > 1 ? "slower" : "faster") : "");

function differenceFigure() {
  if (!differences.length) return null;
  const largest = [...differences].sort((x, y) => Math.abs(Math.log(y.ratio)) - Math.abs(Math.log(x.ratio))).slice(0, most(MOST_DIFFERENCES));
  const groups = Map.groupBy ? Map.groupBy(largest, (d) => d.case) : largest.reduce((all, d) => all.set(d.case, [...(all.get(d.case) ?? []), d]), new Map());
  const made = grouped([...groups].map(([name, ds]) => [name, ds.map((d) => ({
    provider: d.provider, x: 100 * (d.ratio - 1), bar: 100 * d.spread * d.ratio, text: `${d.provider}: ${percent(d.ratio)} ± ${(100 * d.spread).toFixed(1)} %, ${seconds(d.a)} → ${seconds(d.b)}`,
  }))]), (ms) => ({ x: ms.map((m) => m.x), error_x: bar(ms.map((m) => m.bar)) }));
  made.layout.xaxis = axis({ title: "B takes longer by", ticksuffix: " %", zeroline: true, zerolinecolor: css("--ink"), zerolinewidth: 1 });
  return made;
}

function differenceTable() {
  const lines = differences.map((d) => ({
    className: tone(d), cells: [
      d.case, d.provider, [seconds(d.a), d.a], [seconds(d.b), d.b], [percent(d.ratio), d.ratio], [`${(100 * d.spread).toFixed(1)} %`, d.spread],
      d.noise === null ? "-" : [`${(100 * d.noise).toFixed(1)} %`, d.noise], tone(d) || (d.noise === null ? "too few runs" : "within the noise"),
    ],
  }));
  table(byId("differences"), ["case", "provider", "A", "B", "B takes", "±", "run to run", "beyond the noise"], lines);
}

function environmentTable() {
  const { runs, environments } = device();
  const [a, b] = chosenRuns().map((name) => runs[members(name).at(-1)]);
  const described = (run) => (run ? { ...environments[run.env], timer: run.timer, commit: run.commit } : {});
  const [before, now] = [described(a), described(b)];
  const names = unique([...Object.keys(now), ...Object.keys(before)]).filter((name) => before[name] || now[name]);
  const differs = (name) => (before[name] ?? "") !== (now[name] ?? "");
  table(byId("environment"), ["what", "A", "B"], names.sort((x, y) => differs(y) - differs(x)).map((name) => ({
    className: differs(name) ? "differs" : "", cells: [name, before[name] ?? "", `${now[name] ?? ""}${differs(name) ? " (changed)" : ""}`],
  })));
  const broken = [...data.key, "timer", "busy"].filter(differs);
  byId("incomparable").textContent = broken.length ? `These differ as well: ${broken.join(", ")}. The times may differ for that reason alone.` : "";
}

function downloadDifference() {
  const [a, b] = chosenRuns();
  const lines = differences.map((d) => [d.case, d.provider, a, b, d.a, d.b, d.ratio, d.spread, d.noise]);
  download("difference.csv", "text/csv", csv(["case", "provider", "A", "B", "A seconds", "B seconds", "ratio", "spread", "run to run"], lines));
}

renderers.push(() => {
  const [a, b] = chosenRuns();
  fill(document.querySelector("select[name=a]"), choices(), a);
  fill(document.querySelector("select[name=b]"), choices(), b);
  compareRuns();
  more("difference", differences.length, MOST_DIFFERENCES);
  plot(byId("difference"), "Difference between A and B", differenceFigure);
  differenceTable();
  environmentTable();
});
