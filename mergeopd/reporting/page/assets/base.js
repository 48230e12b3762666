"use strict";
// What every page has: its data, two themes, navigation, and a tip beside an element.
const page = (() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("page-data").textContent);

  const watchers = [];
  const onTheme = (watcher) => watchers.push(watcher);
  const changed = () => watchers.forEach((watcher) => watcher());
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", changed);
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = root.classList.contains("dark") || (dark.matches && !root.classList.contains("light"));
    root.classList.toggle("dark", !isDark);
    root.classList.toggle("light", isDark);
    changed();
  });

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const passing = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      const link = links.get(entry.target.id), bar = link.parentElement;
      link.setAttribute("aria-current", "true");
      bar.scrollLeft = link.offsetLeft - bar.clientWidth / 2;
    }
  }, {rootMargin: "-20% 0px -75% 0px"});
  links.forEach((_, id) => passing.observe(document.getElementById(id)));

  // Beside the lines of the element, where there is more room: above them or below them.
  const box = document.getElementById("tip");
  function move(element) {
    const rects = [...element.getClientRects()], size = box.getBoundingClientRect();
    const top = Math.min(...rects.map((rect) => rect.top)), bottom = Math.max(...rects.map((rect) => rect.bottom));
    const GAP = 6, above = top - GAP - size.height, below = bottom + GAP;
    const fits = below + size.height <= innerHeight;
    box.style.top = `${fits || innerHeight - bottom > top ? below : Math.max(0, above)}px`;
    box.style.left = `${Math.max(8, Math.min(rects[0].left, innerWidth - size.width - 8))}px`;
  }
  const tip = {
    move,
    show(element, ...content) {
      box.replaceChildren(...content);
      box.hidden = false;
      move(element);
    },
    hide() { box.hidden = true; },
  };
  return {root, data, onTheme, tip};
})();
