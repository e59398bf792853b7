// The table of the shown run: every row is made once, filters hide rows.
let results = null;  // of the device whose rows the table has

function resultsTable() {
  const { rows, columns } = device();
  const lines = rows.map((row) => ({
    className: status(row),
    cells: [
      element("a", { href: address({ case: row.case }), class: "case", onclick: (event) => visit(event, { case: row.case }, "one") }, row.case),
      ...row.cells.slice(1),
      element("code", {}, row.command),
    ],
  }));
  results = { device: device(), ...table(byId("table"), [...columns, "command"], lines, { sorted: state.sort, onsort: (sort) => set({ sort }) }) };
}

function filterTable() {
  const { rows } = device();
  let count = 0;
  rows.forEach((row, i) => {
    const visible = matches(row.tags, row.case);
    results.rows[i].hidden = !visible;
    count += visible;
  });
  byId("count").textContent = `${count} of ${rows.length} results`;
}

// A link within the page keeps its address for others, and moves there without a reload of the state.
function visit(event, changes, target) {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  set(changes);
  byId(target).scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  byId(target).focus({ preventScroll: true });
}

function shownResults() {
  const { runs, run, name, rows, samples, columns } = device();
  const inOrder = results.order(state.sort).filter((i) => !results.rows[i].hidden);
  return inOrder.map((i) => ({
    device: name, run: runs[run].id, date: runs[run].time, commit: runs[run].commit, timer: runs[run].timer,
    ...Object.fromEntries(FILTERS.map((key, k) => [key, rows[i].tags[k]])),
    ...Object.fromEntries(columns.map((column, k) => {
      const cell = rows[i].cells[k];
      if (column === "status") return ["said", cell];
      return [column === "time" ? "seconds" : column, Array.isArray(cell) ? cell[1] : cell === "-" ? null : cell];
    })),
    command: rows[i].command,
    samples: (samples[i]?.us ?? []).map((us) => Number((us * 1e-6).toPrecision(5))),
  }));
}

function downloadResults(kind) {
  const shown = shownResults(), { runs, run } = device(), name = `results-${runs[run].id}`;
  if (kind === "json") return download(`${name}.json`, "application/json", JSON.stringify(shown, null, 1));
  const columns = ["device", "run", "date", "commit", "timer", ...FILTERS, ...device().columns.filter((c) => !FILTERS.includes(c)).map((c) => (c === "time" ? "seconds" : c)), "said", "command"];
  return download(`${name}.csv`, "text/csv", csv(columns, shown.map((row) => columns.map((column) => row[column]))));
}

renderers.push((changed) => {
  if (results?.device !== device()) resultsTable();
  else if (changed.has("sort")) results.order(state.sort);
  filterTable();
});
