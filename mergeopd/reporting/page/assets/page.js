(() => {
  const {root, data, tip} = page;
  const NUM_COLOURS = 10;
  const NAMED = {"-1": "--accent", "-2": "--soft", "-3": "--good"};
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const hidden = new Set();
  const rough = new Set();
  const plots = [...document.querySelectorAll(".plot")];
  const coarse = matchMedia("(pointer: coarse)").matches;

  // ---------------------------------------------------------------------------------------- curves

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colourOf = (series) => css(NAMED[series.colour] ?? "--c" + (series.colour % NUM_COLOURS));
  const plain = (text) => text.replaceAll("<", "&lt;");  // plotly reads some tags

  // A centred mean that stays inside each phase: another phase has another scale.
  function smoothed(x, values) {
    const phaseOf = x.map((update) => data.phases.filter((phase) => phase[1] <= update).length);
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
    const canHide = "toggles" in element.closest("section").dataset;
    const result = [];
    for (const series of chart.series.filter((one) => one.kind !== "level")) {
      const x = series.x ?? data.updates, colour = colourOf(series);
      const line = {color: colour, width: 1.8, dash: DASHES[Math.floor(Math.max(0, series.colour) / NUM_COLOURS) % DASHES.length]};
      const trace = {
        type: "scatter", mode: x.length === 1 ? "markers" : series.low ? "lines+markers" : "lines", name: plain(series.name), x, y: series.values,
        line, marker: {color: colour, size: 7}, hovertemplate: "%{y:.4~g}", visible: !canHide || !hidden.has(series.name), showlegend: false,
      };
      if (series.kind === "point") {
        const part = (bounds, sign) => series.values.map((value, i) => (bounds[i] === null ? 0 : sign * (bounds[i] - value)));
        Object.assign(trace, {mode: "markers", cliponaxis: false, marker: {color: css("--card"), size: 11, symbol: "diamond", line: {color: colour, width: 2}}});
        if (series.low) trace.error_y = {type: "data", symmetric: false, array: part(series.high, 1), arrayminus: part(series.low, -1), color: colour, thickness: 1.5, width: 4};
      } else if (series.low) {
        const edge = {...trace, mode: "lines", line: {width: 0}, hoverinfo: "skip", hovertemplate: null};
        result.push({...edge, y: series.low}, {...edge, y: series.high, fill: "tonexty", fillcolor: colour + "2e"});
      } else if (chart.stacked) {
        Object.assign(trace, {stackgroup: "all", line: {...line, width: 0.5}, fillcolor: colour + "c8"});
      } else if (smooth && !chart.steady && x.length > 20) {
        // The number shown is the measured one, not the mean.
        result.push({...trace, line: {...line, width: 1}, opacity: 0.35, hoverinfo: "skip", hovertemplate: null});
        Object.assign(trace, {line: {...line, width: 2.2}, y: smoothed(x, series.values), customdata: series.values, hovertemplate: "%{customdata:.4~g}"});
      }
      result.push(trace);
    }
    return result;
  }

  // Names of phases, the longest phase first, each in that of two rows that has more room at its start.
  function phaseLabels(phases, [first, last], width) {
    const LETTER = 6.5, rows = [[], []], labels = [];
    const at = (update) => Math.max(0, ((update - first) / Math.max(1, last - first)) * width);
    const own = (i) => (i + 1 < phases.length ? phases[i + 1][1] : last) - phases[i][1];
    for (const i of [...phases.keys()].sort((a, b) => own(b) - own(a))) {
      const [name, update] = phases[i], start = at(update);
      const letters = rows.map((taken) => {
        if (taken.some(([left, right]) => left <= start && start < right)) return 0;
        const end = Math.min(width, ...taken.map(([left]) => left).filter((left) => left >= start));
        return Math.min(name.length, Math.floor((end - start) / LETTER));
      });
      const row = letters[1] > letters[0] ? 1 : 0, room = letters[row];
      if (room < Math.min(4, name.length)) continue;
      const text = name.length <= room ? name : name.slice(0, room - 1) + "…";
      rows[row].push([start, start + (text.length + 1) * LETTER]);
      labels.push({update, text, row});
    }
    return labels;
  }

  // Ticks at 1, 2 and 5 times powers of ten, or at the powers alone over more than two decades.
  function logTicks(values) {
    const low = Math.min(...values), high = Math.max(...values), ticks = [];
    const steps = Math.log10(high / low) > 2 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1; power += 1) {
      ticks.push(...steps.map((step) => Number(`${step}e${power}`)));
    }
    return {type: "log", tickvals: ticks, ticktext: ticks.map(String)};
  }

  function extent(chart) {
    const all = chart.series.flatMap((series) => (series.kind === "level" ? [] : series.x ?? data.updates));
    return chart.span ?? [Math.min(...all), Math.max(...all)];
  }

  function layout(element, chart) {
    const soft = css("--soft"), grid = css("--grid"), small = {size: 11, color: soft};
    const axis = {gridcolor: grid, zeroline: false, linecolor: grid, tickfont: small, fixedrange: coarse, automargin: true};
    const [first, last] = extent(chart), levels = chart.series.filter((series) => series.kind === "level");
    const inside = data.phases.filter(([, update], i) => update <= last && (data.phases[i + 1]?.[1] ?? Infinity) > first);
    const labels = inside.length > 1 ? phaseLabels(inside, [first, last], element.clientWidth - 60) : [];
    const top = labels.length ? 22 + 14 * Math.max(...labels.map((label) => label.row)) : 8;
    const values = chart.series.flatMap((series) => series.values).filter((value) => value > 0);
    const bound = chart.unit === "%" && (chart.stacked ? [0, 100] : levels.length || chart.series[0].low ? [-3, 103] : null);
    const margin = Math.max(0.5, 0.01 * (last - first));
    return {
      margin: {l: 8, r: 10, t: top, b: 8},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: coarse ? false : "zoom",
      font: {family: "system-ui, sans-serif", color: css("--ink"), size: 12},
      hovermode: "x unified", hoverdistance: 60,
      hoverlabel: {bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--ink"), size: 12}},
      xaxis: {...axis, showgrid: false, spikecolor: soft, spikethickness: 1, spikedash: "dot", nticks: 6, tickformat: ",d", hoverformat: ",d",
        range: [first - margin, last + margin], title: {text: "update", font: small, standoff: 4}, unifiedhovertitle: {text: "update %{x}"}},
      yaxis: {...axis, nticks: 5, exponentformat: "power", rangemode: "normal", title: {text: chart.unit, font: small, standoff: 6},
        ...(chart.is_log ? logTicks(values) : {}), ...(bound ? {range: bound} : {})},
      shapes: [
        ...inside.slice(1).map(([, update]) => ({type: "line", x0: update, x1: update, yref: "paper", y0: 0, y1: 1, line: {color: soft, width: 1, dash: "dot"}})),
        ...levels.map((level) => ({type: "line", xref: "paper", x0: 0, x1: 1, y0: level.values[0], y1: level.values[0], line: {color: colourOf(level), width: 1.5, dash: "dash"}})),
      ],
      annotations: [
        ...labels.map((label) => ({x: Math.max(first, label.update), yref: "paper", y: 1, yshift: 14 * label.row, yanchor: "bottom", xanchor: "left", showarrow: false, text: plain(label.text), font: small})),
        // The base at the right, below a curve that rises, the others at the left.
        ...levels.map((level, i) => ({xref: "paper", x: i ? 0.02 : 0.98, y: level.values[0], yanchor: level.values[0] > 88 ? "top" : "bottom", xanchor: i ? "left" : "right", showarrow: false, text: plain(`${level.name} ${level.values[0].toFixed(1)}`), font: {size: 11, color: colourOf(level)}})),
      ],
    };
  }

  const drawn = new Set();
  function draw(element) {
    const chart = data.charts[element.dataset.chart];
    const smooth = !rough.has(element.closest("section").id);
    Plotly.react(element, traces(element, chart, smooth), layout(element, chart), {displayModeBar: false, responsive: true, doubleClick: "reset"});
    drawn.add(element);
  }
  const redraw = () => drawn.forEach(draw);

  // Charts are drawn when they come near the viewport, and the others when the browser has time: pictures of
  // the whole page and prints need all of them.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      if (!drawn.has(entry.target)) draw(entry.target);
    }
  }, {rootMargin: "800px"});
  plots.forEach((plot) => near.observe(plot));
  const later = window.requestIdleCallback ?? ((work) => setTimeout(work, 100));
  function drawRest() {
    const plot = plots.find((one) => !drawn.has(one));
    if (!plot) return;
    draw(plot);
    later(drawRest);
  }
  later(drawRest);
  // On paper cards have another width: pictures are scaled, since there is no time to draw them again.
  addEventListener("beforeprint", () => plots.forEach((plot) => {
    if (!drawn.has(plot)) draw(plot);
    const {width, height} = plot._fullLayout;
    plot.style.setProperty("--shape", `${width} / ${height}`);
    plot.querySelectorAll(".main-svg").forEach((svg) => svg.setAttribute("viewBox", `0 0 ${width} ${height}`));
  }));
  addEventListener("afterprint", () => document.querySelectorAll(".main-svg").forEach((svg) => svg.removeAttribute("viewBox")));

  // The numbers of a chart, one column per series and bound.
  function table(chart) {
    const columns = new Map();
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    for (const series of chart.series) {
      for (const [key, suffix] of [["values", ""], ["low", " low"], ["high", " high"]]) {
        if (!series[key]) continue;
        const x = series.kind === "level" ? [""] : series.x ?? data.updates;
        columns.set(series.name + suffix, new Map(x.map((update, i) => [update, series[key][i]])));
      }
    }
    const updates = [...new Set([...columns.values()].flatMap((column) => [...column.keys()]))];
    updates.sort((a, b) => (a === "" ? -1 : b === "" ? 1 : a - b));
    const rows = updates.map((update) => [update, ...[...columns.values()].map((column) => column.get(update) ?? "")]);
    return [["update", ...columns.keys()].map(quoted), ...rows].map((row) => row.join(",")).join("\n") + "\n";
  }
  for (const button of document.querySelectorAll(".csv")) {
    button.addEventListener("click", () => {
      const key = button.closest("figure").querySelector(".plot").dataset.chart;
      const link = document.createElement("a");
      link.download = key.replace(/[^\w-]+/g, "_") + ".csv";
      link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(table(data.charts[key]));
      link.click();
    });
  }

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

  page.onTheme(redraw);

  // ------------------------------------------------------------------------------------- responses

  const slider = document.getElementById("at");
  if (slider) {
    const panels = [...document.querySelectorAll("[data-update]")];
    const updates = [...new Set(panels.map((panel) => panel.dataset.update))].sort((a, b) => a - b);
    const show = () => {
      const update = updates[slider.value];
      panels.forEach((panel) => { panel.hidden = panel.dataset.update !== update; });
      const phase = panels.find((panel) => panel.dataset.update === update).dataset.phase;
      document.querySelector("output").textContent = `${Number(update).toLocaleString("en")}, ${phase}`;
      slider.setAttribute("aria-valuetext", `update ${update}, ${phase}`);
    };
    slider.addEventListener("input", show);
    show();
  }

  let shown = null;
  const amount = (value) => (value >= 0.01 || value === 0 ? value.toPrecision(3) : value.toExponential(1)) + " %";
  const percent = (logprob) => (logprob === "-" ? "not finite" : amount(100 * Math.exp(Number(logprob))));
  const quoted = (text) => (text ? JSON.stringify(text) : "part of a character");

  function rows(token, place) {
    const response = token.parentElement;
    const [value, student, teacher] = token.dataset.v.split(" ");
    const result = [["token", `${place + 1}`]];
    if (token.classList.contains("given")) return result;
    result.push([response.dataset.value, `${value} nats`], ["p of student", percent(student)]);
    if (response.dataset.teacher) result.push([`p of ${response.dataset.teacher}`, percent(teacher)]);
    return result;
  }

  // What both models would have written most likely: a column each.
  function candidates(token, place) {
    const {topS, topT, teacher} = token.parentElement.dataset, columns = [];
    for (const [number, name] of [[topT, teacher], [topS, "student"]]) {
      const row = number === undefined ? [] : data.candidates.rows[number][place];
      if (!row.length) continue;
      const pairs = [];
      for (let i = 0; i < row.length; i += 2) pairs.push([quoted(data.candidates.texts[row[i]]), amount(100 * row[i + 1])]);
      columns.push([name, pairs]);
    }
    if (!columns.length) return null;
    const best = document.createElement("table");
    best.className = "best";
    for (const [name, pairs] of columns) {
      const line = best.insertRow();
      line.insertCell().textContent = name;
      line.insertCell().replaceChildren(...pairs.map(([text, p]) => {
        const item = document.createElement("div"), word = document.createElement("b");
        word.textContent = text;
        item.append(word, ` ${p}`);
        return item;
      }));
    }
    return best;
  }

  function show(token) {
    if (shown) shown.classList.remove("on");
    shown = token;
    if (!token) return tip.hide();
    token.classList.add("on");
    const place = [...token.parentElement.children].indexOf(token);
    const text = document.createElement("b");
    text.textContent = quoted(token.textContent);
    const table = document.createElement("table");
    for (const row of rows(token, place)) {
      const line = table.insertRow();
      for (const cell of row) line.insertCell().textContent = cell;
    }
    const outside = {given: "not in the loss: not generated by the assistant", out: "not in this teacher's loss: its end token differs"};
    const notes = Object.keys(outside).filter((name) => token.classList.contains(name)).map((name) => {
      const note = document.createElement("div");
      note.textContent = outside[name];
      return note;
    });
    const best = candidates(token, place);
    tip.show(token, text, table, ...(best ? [best] : []), ...notes);
  }
  const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".response span") : null;
  document.addEventListener("mouseover", (event) => {
    const token = tokenOf(event);
    if (token !== shown) show(token);
  });
  document.addEventListener("click", (event) => show(tokenOf(event)));
  document.addEventListener("scroll", () => shown && show(null), {passive: true, capture: true});
  for (const response of document.querySelectorAll(".response")) {
    response.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (event.key === "Escape") show(null);
      if (!step) return;
      event.preventDefault();
      const tokens = [...response.querySelectorAll("span")], at = tokens.indexOf(shown);
      show(tokens[Math.max(0, Math.min(tokens.length - 1, at + step))]);
    });
    response.addEventListener("blur", () => show(null));
  }
})();
