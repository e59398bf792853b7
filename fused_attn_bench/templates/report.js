"use strict";
const form = document.getElementById("filters");
const filtered = [...document.querySelectorAll(".filtered")];
const headings = filtered.filter((node) => node.tagName === "H3");
const rest = filtered.filter((node) => node.tagName !== "H3");
const rows = rest.filter((node) => node.tagName === "TR");

function filter() {
  const wanted = [...new FormData(form)].filter(([, value]) => value !== "");
  for (const node of rest) {
    const text = `${node.dataset.case} ${node.dataset.provider}`.toLowerCase();
    node.hidden = !wanted.every(([name, value]) =>
      name === "search" ? text.includes(value.toLowerCase()) : node.dataset[name] === value);
  }
  for (const heading of headings) {
    heading.hidden = rest.every((node) => node.tagName === "TR" || node.hidden || node.dataset.case !== heading.dataset.case);
  }
  document.getElementById("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} results`;
}
form.addEventListener("input", filter);
form.addEventListener("change", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
filter();

// Cells without a number stay at the end in both directions.
function sort(heading) {
  const index = [...heading.parentNode.children].indexOf(heading);
  const down = heading.getAttribute("aria-sort") === "ascending";
  const body = heading.closest("table").tBodies[0];
  const numeric = [...body.rows].some((row) => "value" in row.cells[index].dataset);
  const key = (row) => {
    const cell = row.cells[index];
    return numeric ? ("value" in cell.dataset ? Number(cell.dataset.value) : null) : cell.textContent;
  };
  const sorted = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = numeric ? x - y : x.localeCompare(y);
    return down ? -order : order;
  });
  for (const other of heading.parentNode.children) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...sorted);
}
for (const heading of document.querySelectorAll("#results th[aria-sort]")) {
  heading.querySelector("button").addEventListener("click", () => sort(heading));
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
