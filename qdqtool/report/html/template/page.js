"use strict";
// Sorting and filtering of tables, plots in the page's colours, and copying: what a page can do beside being read.
(() => {
  const each = (selector, act, within = document) => within.querySelectorAll(selector).forEach(act);

  // Tables. A cell's data-sort is its value where it is no text; empty cells stay last, whichever way.
  const valueOf = (row, index) => {
    const cell = row.cells[index];
    if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
    return cell.querySelector(".t").textContent;
  };
  const compare = (one, other) => (typeof one === "number" && typeof other === "number")
    ? one - other : String(one).localeCompare(String(other), undefined, { numeric: true });

  function sort(header, rows, body) {
    const index = header.cellIndex, wasUp = header.getAttribute("aria-sort") === "ascending";
    const firstUp = !header.classList.contains("number");
    const up = header.hasAttribute("aria-sort") ? !wasUp : firstUp;
    each("[aria-sort]", (other) => other.removeAttribute("aria-sort"), header.parentElement);
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.sort((a, b) => {
      const [x, y] = [valueOf(a, index), valueOf(b, index)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return up ? compare(x, y) : compare(y, x);
    });
    body.append(...rows);
  }

  function makeTable(table) {
    const body = table.querySelector("tbody"), rows = [...body.rows], headers = [...table.querySelectorAll("thead th")];
    const search = table.querySelector("[data-search]"), told = table.querySelector("[data-count]");
    const more = table.querySelector("[data-more]"), selects = [...table.querySelectorAll("[data-filter]")];
    const column = Object.fromEntries(headers.map((header) => [header.dataset.title, header.cellIndex]));
    const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    let fold = Number(table.dataset.fold || 0);

    function show() {
      const words = (search ? search.value : "").toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = selects.filter((select) => select.value).map((select) => [column[select.dataset.filter], select.value]);
      let seen = 0;
      for (const row of rows) {
        const fits = words.every((word) => texts.get(row).includes(word))
          && chosen.every(([index, value]) => row.cells[index].querySelector(".t").textContent === value);
        seen += fits;
        row.hidden = !fits || (fold > 0 && seen > fold);
      }
      if (told) told.textContent = seen === rows.length ? `${rows.length} rows` : `${seen} of ${rows.length} rows`;
      if (more) more.hidden = !(fold > 0 && seen > fold);
    }
    headers.forEach((header) => header.querySelector("button").addEventListener("click", () => { sort(header, rows, body); show(); }));
    if (search) search.addEventListener("input", show);
    selects.forEach((select) => select.addEventListener("change", show));
    if (more) more.addEventListener("click", () => { fold = 0; show(); });
    window.addEventListener("beforeprint", () => { fold = 0; show(); });
    show();
  }
  each("[data-table]", makeTable);

  // Copying: the clipboard is not there for pages opened as files in every browser, selecting always is.
  each("[data-copy]", (button) => button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
  }));
  window.addEventListener("beforeprint", () => each("details", (one) => { one.open = true; }));

  // Plots. Tags as fill_color=--series-1 name the CSS variable that a property takes, in light and in dark.
  if (typeof Bokeh === "undefined") return;
  const documents = [], dark = matchMedia("(prefers-color-scheme: dark)");
  const axis = {
    axis_label_text_color: "--axis", major_label_text_color: "--axis", axis_line_color: "--axis",
    major_tick_line_color: "--axis", group_text_color: "--axis",
  };
  const byType = {
    LinearAxis: axis, LogAxis: axis, CategoricalAxis: axis, Grid: { grid_line_color: "--grid" },
    Legend: { label_text_color: "--text", background_fill_color: "--ground", border_line_color: "--ground" },
  };

  function paint(held) {
    const style = getComputedStyle(document.documentElement);
    for (const model of held._all_models.values()) {
      const wanted = { ...byType[model.type] };
      for (const tag of model.tags) {
        const [property, variable] = String(tag).split("=");
        if (variable) wanted[property] = variable;
      }
      for (const [property, variable] of Object.entries(wanted)) {
        const known = model[property];
        if (known === undefined || known === null || known.value === null) continue;
        const colour = style.getPropertyValue(variable).trim();
        model[property] = typeof known === "object" && "value" in known ? { value: colour } : colour;
      }
    }
  }
  const paintAll = () => documents.forEach(paint);
  dark.addEventListener("change", paintAll);
  matchMedia("print").addEventListener("change", paintAll);

  const signed = (value) => String(value).replace("-", "\u2212");
  function columns(data) {
    let { lo, hi } = data;
    if (!(hi > lo)) { lo -= 0.5; hi += 0.5; }
    const counts = data.counts, width = (hi - lo) / counts.length;
    return {
      left: counts.map((_, i) => lo + width * i), right: counts.map((_, i) => lo + width * (i + 1)),
      count: counts, top_linear: counts, top_log: counts.map((count) => Math.max(count, 0.5)),
    };
  }

  function histogram(figure, held) {
    const all = JSON.parse(document.getElementById("data-histograms").textContent);
    const find = (name) => held.get_model_by_name(name);
    const choose = figure.querySelector("[data-choose]"), log = figure.querySelector("[data-log]");
    const told = figure.querySelector("[data-told]");
    function show() {
      const data = all[Number(choose.value)], pad = 0.04 * (data.hi - data.lo) || 0.5;
      find("bars").data = columns(data);
      find("ranges").data = Object.fromEntries(Object.entries(data.ranges).map(
        ([name, values]) => [name, values.map((value) => value === null ? NaN : value)]));
      const ends = [data.lo, data.hi, data.chosen[0], data.chosen[1]];
      find("values").setv({ start: Math.min(...ends) - pad, end: Math.max(...ends) + pad });
      const most = Math.max(...data.counts);
      find("counts_linear").setv({ start: 0, end: 1.05 * most });
      find("counts_log").setv({ start: 0.5, end: 2 * most });
      for (const scale of ["linear", "log"]) {
        find(`chosen_${scale}`).setv({ left: data.chosen[0], right: data.chosen[1] });
        find(scale).visible = (scale === "log") === log.checked;
      }
      told.textContent = `Shaded: the range in the model, ${signed(data.chosen[0])} to ${signed(data.chosen[1])} by `
        + `${data.chosen[2]}, expected SQNR ${data.chosen[3]}. Seen: ${signed(data.lo)} to ${signed(data.hi)}.`;
    }
    choose.addEventListener("change", show);
    log.addEventListener("change", show);
    show();
  }

  async function draw(figure) {
    const name = figure.dataset.plot;
    const item = JSON.parse(document.querySelector(`script[data-item="${name}"]`).textContent);
    const views = await Bokeh.embed.embed_item(item);
    const held = (Array.isArray(views) ? views[0] : views.roots[0]).model.document;
    documents.push(held);
    if (name === "histogram") histogram(figure, held);
    paint(held);
    figure.dataset.drawn = "";
  }

  // A plot is drawn when it comes near, so that a page opens at once; for paper all of them are.
  const waiting = new Set(document.querySelectorAll("[data-plot]"));
  const near = new IntersectionObserver((entries) => entries.filter((one) => one.isIntersecting).forEach(({ target }) => start(target)),
    { rootMargin: "600px" });
  function start(figure) {
    if (!waiting.delete(figure)) return;
    near.unobserve(figure);
    draw(figure);
  }
  waiting.forEach((figure) => near.observe(figure));
  window.addEventListener("beforeprint", () => [...waiting].forEach(start));
})();
