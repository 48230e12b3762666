(() => {
  const {data, tip} = page;
  const amount = (p) => `${100 * p >= 0.01 || p === 0 ? (100 * p).toPrecision(3) : (100 * p).toExponential(1)} %`;
  const nats = (value) => (value === null ? "not scored" : `${value} nats`);
  const quoted = (text) => (text ? JSON.stringify(text) : "part of a character");

  function make(tag, text = "", children = []) {
    const element = document.createElement(tag);
    element.textContent = text;
    element.append(...children);
    return element;
  }

  // ---------------------------------------------------------------------------------------- tokens

  // The spans of a response are made when it is opened for the first time.
  function build(sample) {
    const box = sample.querySelector(".response"), response = data.responses[sample.dataset.response];
    if (!response || box.firstChild) return;
    box.append(...response.texts.map((number, place) => {
      const text = data.texts[number], level = response.levels[place], token = make("span", text);
      const kinds = [level === "-" ? "unscored" : `h${parseInt(level, 16)}`];
      if (!text) kinds.push("part");
      else if (text.includes("\n")) kinds.push("nl");
      token.className = kinds.join(" ");
      token.tabIndex = place ? -1 : 0;
      token.setAttribute("role", "option");
      return token;
    }));
  }
  for (const sample of document.querySelectorAll("[data-response]")) {
    sample.addEventListener("toggle", () => sample.open && build(sample));
    if (sample.open) build(sample);
  }

  function candidates(title, row, chosen) {
    const items = [];
    for (let i = 0; i < row.length; i += 2) {
      const item = make("li", "", [make("b", quoted(data.texts[row[i]])), make("span", amount(row[i + 1]))]);
      item.style.setProperty("--p", `${100 * row[i + 1]}%`);
      if (row[i] === chosen) item.className = "chosen";
      items.push(item);
    }
    return make("div", "", [make("em", title), make("ol", "", items)]);
  }

  function table(rows) {
    return make("table", "", rows.map((row) => make("tr", "", row.map((cell) => make("td", cell)))));
  }

  // What the tip shows of a token, or of a part of a chart.
  function content(item) {
    if (item.dataset.rows) return [table(JSON.parse(item.dataset.rows))];
    const sample = item.closest("[data-response]"), response = data.responses[sample.dataset.response];
    const place = [...item.parentElement.children].indexOf(item), chosen = response.texts[place];
    const rows = [["token", `${place + 1}`], ["reverse KL", nats(response.reverse_kl[place])]];
    if (response.advantage[place] !== null) rows.push(["log p, teacher - student", nats(response.advantage[place])]);
    const student = data.rows[response.student][place], teacher = data.rows[response.teacher][place];
    const both = make("div", "", [candidates("student", student, chosen), candidates(sample.dataset.teacher, teacher, chosen)]);
    both.className = "two";
    return [make("b", quoted(data.texts[chosen])), table(rows), ...(student.length + teacher.length ? [both] : [])];
  }

  // ------------------------------------------------------------------------- pointer, focus and keys

  let shown = null;
  function show(item) {
    if (shown === item) return;
    if (shown) shown.classList.remove("on");
    shown = item;
    if (!item) return tip.hide();
    item.classList.add("on");
    tip.show(item, ...content(item));
  }
  const itemOf = (target) => (target instanceof Element ? target.closest("[data-roving]>*") : null);
  const focused = () => itemOf(document.activeElement);

  // One item of each group is a tab stop.
  function focus(item) {
    item.parentElement.querySelectorAll(":scope>[tabindex='0']").forEach((other) => { other.tabIndex = -1; });
    item.tabIndex = 0;
    item.focus({preventScroll: true});
    item.scrollIntoView({block: "nearest", behavior: "instant"});
    tip.move(item);
  }
  document.addEventListener("focusin", (event) => show(itemOf(event.target)));
  document.addEventListener("focusout", () => show(null));
  document.addEventListener("mouseover", (event) => show(itemOf(event.target) ?? focused()));
  document.addEventListener("click", (event) => {
    const item = itemOf(event.target);
    if (item) focus(item);
  });
  function follow() {
    if (shown && shown === focused()) tip.move(shown);
    else show(null);
  }
  addEventListener("scroll", follow, {passive: true, capture: true});
  addEventListener("resize", follow);

  const isStrong = (item) => {
    const response = data.responses[item.closest("[data-response]").dataset.response];
    return response.reverse_kl[[...item.parentElement.children].indexOf(item)] >= data.strong;
  };
  function jump(items, from, step) {
    for (let i = from + step; i >= 0 && i < items.length; i += step) if (isStrong(items[i])) return i;
    return from;
  }

  // The nearest item of the line above or below.
  function across(items, from, step) {
    const own = items[from].getBoundingClientRect();
    let best = from, distance = Infinity, line = null;
    for (let i = from + step; i >= 0 && i < items.length; i += step) {
      const rect = items[i].getClientRects()[0];
      if (!rect || Math.abs(rect.top - own.top) < 4) continue;
      line ??= rect.top;
      if (Math.abs(rect.top - line) > 4) break;
      if (Math.abs(rect.left - own.left) < distance) [best, distance] = [i, Math.abs(rect.left - own.left)];
    }
    return best;
  }

  document.addEventListener("keydown", (event) => {
    const item = focused();
    if (!item || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape") return show(null);
    const items = [...item.parentElement.children], at = items.indexOf(item), last = items.length - 1;
    const isText = item.matches(".response>*"), clamp = (i) => Math.max(0, Math.min(last, i));
    const side = (step) => (event.shiftKey && isText ? jump(items, at, step) : clamp(at + step));
    const moves = {ArrowRight: () => side(1), ArrowLeft: () => side(-1), Home: () => 0, End: () => last};
    if (isText) Object.assign(moves, {ArrowDown: () => across(items, at, 1), ArrowUp: () => across(items, at, -1)});
    if (!(event.key in moves)) return;
    event.preventDefault();
    focus(items[moves[event.key]()]);
  });

  for (const button of document.querySelectorAll("[data-jump]")) {
    button.addEventListener("click", () => {
      const items = [...button.closest("[data-response]").querySelector(".response").children];
      const current = items.findIndex((item) => item.tabIndex === 0), step = Number(button.dataset.jump);
      const isFirst = step > 0 && current === 0 && isStrong(items[0]) && shown !== items[0];
      focus(items[isFirst ? 0 : jump(items, current, step)]);
    });
  }
})();
