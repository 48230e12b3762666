"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("run-data").textContent);
  const NUM_COLOURS = 10;
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const hidden = new Set();
  const rough = new Set();
  const plots = [...document.querySelectorAll(".plot")];
  const coarse = matchMedia("(pointer: coarse)").matches;

  // ---------------------------------------------------------------------------------------- curves

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // A centred mean that stays inside each phase: another phase has another scale.
  function smoothed(values) {
    const phaseOf = data.updates.map((update) => data.phases.filter((phase) => phase[1] <= update).length);
    const reach = Math.round(Math.max(2, Math.min(25, values.length / 40)));
    return values.map((value, i) => {
      if (value === null) return null;
      let sum = 0, weight = 0;
      for (let j = Math.max(0, i - reach); j <= Math.min(values.length - 1, i + reach); j += 1) {
        if (values[j] === null || phaseOf[j] !== phaseOf[i]) continue;
        const share = reach + 1 - Math.abs(i - j);
        sum += share * values[j];
        weight += share;
      }
      return sum / weight;
    });
  }

  function traces(element, chart, smooth) {
    const isOfRun = element.closest("section").id === "run";  // its series are neither teachers nor domains
    const alone = data.updates.length === 1;
    const result = [];
    for (const series of chart.series) {
      const colour = css(series.colour < 0 ? "--accent" : "--c" + (series.colour % NUM_COLOURS));
      const line = {color: colour, width: 1.8, dash: DASHES[Math.floor(Math.max(0, series.colour) / NUM_COLOURS) % DASHES.length]};
      const trace = {
        type: "scatter", mode: alone ? "markers" : "lines", name: series.name.replaceAll("<", "&lt;"), x: data.updates, y: series.values,
        line, marker: {color: colour, size: 7}, hovertemplate: "%{y:.4~g}", visible: isOfRun || !hidden.has(series.name), showlegend: false,
      };
      if (chart.stacked) {
        Object.assign(trace, {stackgroup: "all", line: {...line, width: 0.5}, fillcolor: colour + "c8"});
        result.push(trace);
        continue;
      }
      const wanted = smooth && !chart.steady && data.updates.length > 20;
      if (wanted) {
        // The number shown is the measured one, not the mean.
        const mean = {...trace, line: {...line, width: 2.2}, y: smoothed(series.values), customdata: series.values, hovertemplate: "%{customdata:.4~g}"};
        Object.assign(trace, {line: {...line, width: 1}, opacity: 0.35, hoverinfo: "skip", hovertemplate: null});
        result.push(trace, mean);
        continue;
      }
      result.push(trace);
    }
    return result;
  }

  function layout(chart) {
    const soft = css("--soft"), grid = css("--grid");
    const axis = {gridcolor: grid, zeroline: false, linecolor: grid, tickfont: {size: 11, color: soft}, fixedrange: coarse, automargin: true};
    const marks = data.phases.map(([name, update], i) => ({name, update, i}));
    return {
      margin: {l: 8, r: 10, t: data.phases.length > 1 ? 22 : 8, b: 8},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: coarse ? false : "zoom",
      font: {family: "system-ui, sans-serif", color: css("--ink"), size: 12},
      hovermode: "x unified", hoverdistance: 60,
      hoverlabel: {bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--ink"), size: 12}},
      xaxis: {...axis, showgrid: false, spikecolor: soft, spikethickness: 1, spikedash: "dot", nticks: 6, tickformat: ",d", hoverformat: ",d", unifiedhovertitle: {text: "update %{x}"}},
      yaxis: {...axis, nticks: 5, exponentformat: "power", rangemode: "normal",
        ...(chart.stacked && chart.unit === "%" ? {range: [0, 100]} : {})},
      shapes: marks.slice(1).map((mark) => ({type: "line", x0: mark.update, x1: mark.update, yref: "paper", y0: 0, y1: 1, line: {color: soft, width: 1, dash: "dot"}})),
      annotations: marks.length < 2 ? [] : marks.map((mark) => ({
        x: mark.update, yref: "paper", y: 1, yanchor: "bottom", xanchor: "left", showarrow: false, text: mark.name.replaceAll("<", "&lt;"), font: {size: 11, color: soft},
      })),
    };
  }

  const drawn = new Set();
  function draw(element) {
    const chart = data.charts[element.dataset.chart];
    const smooth = !rough.has(element.closest("section").id);
    Plotly.react(element, traces(element, chart, smooth), layout(chart), {displayModeBar: false, responsive: true, doubleClick: "reset"});
    drawn.add(element);
  }
  const redraw = () => drawn.forEach(draw);

  // Charts are drawn when they come near the viewport.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, {rootMargin: "800px"});
  plots.forEach((plot) => near.observe(plot));
  addEventListener("beforeprint", () => plots.forEach(draw));

  for (const button of document.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      const name = button.dataset.series;
      const show = hidden.delete(name);
      if (!show) hidden.add(name);
      document.querySelectorAll("[data-series]").forEach((other) => {
        if (other.dataset.series === name) other.setAttribute("aria-pressed", String(show));
      });
      redraw();
    });
  }
  for (const box of document.querySelectorAll(".smooth input")) {
    box.addEventListener("change", () => {
      const section = box.closest("section");
      if (box.checked) rough.delete(section.id);
      else rough.add(section.id);
      section.querySelectorAll(".plot").forEach((plot) => drawn.has(plot) && draw(plot));
    });
  }

  // ----------------------------------------------------------------------------------------- theme

  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = root.classList.contains("dark") || (dark.matches && !root.classList.contains("light"));
    root.classList.toggle("dark", !isDark);
    root.classList.toggle("light", isDark);
    redraw();
  });

  // --------------------------------------------------------------------------------------- responses

  for (const group of document.querySelectorAll("[data-tabs]")) {
    const buttons = [...group.querySelectorAll("[data-tab]")];
    const panels = [...group.querySelectorAll("[data-panel]")];
    const show = (index) => {
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.tab === index)));
      panels.forEach((panel) => { panel.hidden = panel.dataset.panel !== index; });
    };
    buttons.forEach((button) => button.addEventListener("click", () => show(button.dataset.tab)));
    show(buttons[0].dataset.tab);  // before the first update there is most to see
  }

  const tip = document.getElementById("tip");
  let shown = null;
  const percent = (logprob) => {
    const value = 100 * Math.exp(Number(logprob));
    return (value >= 0.01 || value === 0 ? value.toPrecision(3) : value.toExponential(1)) + " %";
  };

  function rows(token) {
    const response = token.parentElement;
    const [value, student, teacher] = token.dataset.v.split(" ");
    const place = [...response.children].indexOf(token) + 1;
    const result = [["token", `${place}`]];
    if (token.classList.contains("given")) return result;
    result.push([response.dataset.value, `${value} nats`]);
    result.push(["p of student", student === "-" ? "not finite" : percent(student)]);
    if (response.dataset.teacher) result.push([`p of ${response.dataset.teacher}`, teacher === "-" ? "not finite" : percent(teacher)]);
    return result;
  }

  function show(token) {
    if (shown) shown.classList.remove("on");
    shown = token;
    tip.hidden = !token;
    if (!token) return;
    token.classList.add("on");
    const text = document.createElement("b");
    text.textContent = token.textContent ? JSON.stringify(token.textContent) : "part of a character";
    const table = document.createElement("table");
    for (const row of rows(token)) {
      const line = table.insertRow();
      for (const cell of row) line.insertCell().textContent = cell;
    }
    tip.replaceChildren(text, table);
    const outside = {given: "not in the loss: not generated by the assistant", out: "not in this teacher's loss: its end token differs"};
    for (const kind of Object.keys(outside).filter((name) => token.classList.contains(name))) {
      const note = document.createElement("div");
      note.textContent = outside[kind];
      tip.append(note);
    }
    const box = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left + box.width / 2 - size.width / 2, innerWidth - size.width - 8));
    const above = box.top - size.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  }
  const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".response span") : null;
  document.addEventListener("mouseover", (event) => {
    const token = tokenOf(event);
    if (token !== shown) show(token);
  });
  document.addEventListener("click", (event) => show(tokenOf(event)));
  document.addEventListener("scroll", () => shown && show(null), {passive: true, capture: true});
})();
