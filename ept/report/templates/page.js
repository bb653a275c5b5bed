// Sort a table by any column, and show only the rows whose name holds a word. Without this script the page is whole.
"use strict";
for (const table of document.querySelectorAll(".wide > table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column], number = cell.dataset.number;
    return number === undefined ? null : Number(number);
  };
  const text = (row, column) => row.cells[column].textContent.trim();

  const sort = (column, direction) => {
    const numeric = rows.some((row) => value(row, column) !== null);
    const compare = (a, b) => {
      if (!numeric) return direction * text(a, column).localeCompare(text(b, column));
      const [x, y] = [value(a, column), value(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);  // what is missing stands last, either way
      return direction * (x - y);
    };
    body.append(...(direction ? [...rows].sort(compare) : rows));
    heads.forEach((head, i) => {
      if (i === column && direction) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort; again: the other way; a third time: as it was";
    button.append(...head.childNodes);
    head.append(button);
    const first = rows.some((row) => value(row, column) !== null) ? "descending" : "ascending", second = first === "descending" ? "ascending" : "descending";
    const next = { [first]: second, [second]: null };
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort"), to = now ? next[now] : first;
      sort(column, to === "ascending" ? 1 : to === "descending" ? -1 : 0);
    });
  });

  if (rows.length < 5) continue;
  const line = document.createElement("p"), label = document.createElement("label"), input = document.createElement("input"), shown = document.createElement("span");
  line.className = "filter";
  label.textContent = heads[0].textContent.trim() === "task" ? "Only tasks named" : "Only methods named";
  input.type = "search";
  shown.setAttribute("role", "status");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    for (const row of rows) row.hidden = words.length > 0 && !words.some((word) => row.cells[0].textContent.toLowerCase().includes(word));
    shown.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  });
  label.append(input);
  line.append(label, shown);
  table.parentElement.before(line);
}
