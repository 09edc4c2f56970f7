// Headers of a sortable table sort it, numbers as numbers; a second press turns the order round. Without script the order is the one given.
(() => {
  if (window.labSort) return;
  window.labSort = true;
  const key = (row, place) => row.cells[place].dataset.v ?? row.cells[place].textContent.trim();
  const before = (a, b) => {
    const numbers = [Number(a), Number(b)];
    const numeric = a !== "" && b !== "" && !numbers.some(Number.isNaN);
    return numeric ? numbers[0] - numbers[1] : a.localeCompare(b, undefined, { numeric: true });
  };
  document.addEventListener("click", (event) => {
    const head = event.target.closest?.(".lab-view .sortable th");
    if (!head || !event.target.closest("button")) return;
    const place = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => turn * before(key(a, place), key(b, place))));
  });
})();
