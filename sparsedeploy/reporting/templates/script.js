// The page is whole without this: tables sort, and a slider shows one model at a time.
(() => {
  const number = text => {
    const found = text.replace(/,/g, "").match(/-?\d+(\.\d+)?(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : null;
  };
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (x !== null && y !== null) return x - y;
    if (x !== null || y !== null) return x !== null ? -1 : 1;
    return a.localeCompare(b);
  };
  const sort = (table, column, sign) => {
    const body = table.tBodies[0];
    const runs = [[]];
    for (const row of body.rows) {
      if (row.classList.contains("group")) runs.push([row], []);
      else runs[runs.length - 1].push(row);
    }
    const cell = row => row.cells[column].textContent.trim();
    for (const run of runs) if (run.length > 1) run.sort((a, b) => sign * compare(cell(a), cell(b)));
    body.append(...runs.flat());
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach(other => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        sort(table, column, sign);
      });
    });
  }
  for (const box of document.querySelectorAll(".levels")) {
    const levels = [...box.querySelectorAll(":scope > .model")];
    if (levels.length < 2) continue;
    const line = document.createElement("p");
    const label = document.createElement("label");
    const range = document.createElement("input");
    const shown = document.createElement("output");
    Object.assign(range, {type: "range", id: `${box.id}-level`, min: 0, max: levels.length - 1, step: 1});
    range.value = levels.length - 1;
    label.htmlFor = shown.htmlFor = range.id;
    label.textContent = box.dataset.label;
    line.className = "slider";
    line.append(label, range, shown);
    const show = () => {
      levels.forEach((level, at) => { level.hidden = at !== Number(range.value); });
      shown.textContent = levels[range.value].dataset.name;
      range.setAttribute("aria-valuetext", shown.textContent);
    };
    range.addEventListener("input", show);
    box.prepend(line);
    show();
  }
})();
