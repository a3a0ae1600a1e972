"use strict";
// Swaps the parts of a page that have changed, when the server says that there is something new. Without it, reload by hand.
(() => {
  const main = document.querySelector("main[data-page]");
  const live = document.getElementById("live");
  if (!main || !live || !window.EventSource) return;
  let seen = "", asking = false, again = false;

  function swap(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const parts = [...main.querySelectorAll("[data-part]")], found = [...fresh.querySelectorAll("main [data-part]")];
    const names = (list) => list.map((part) => part.dataset.part).join();
    if (names(parts) !== names(found)) {
      if (main.contains(document.activeElement) && document.activeElement !== main) return;
      main.replaceChildren(...fresh.querySelector("main").childNodes);
      return;
    }
    parts.forEach((part, place) => {
      const other = found[place];
      if (part.innerHTML === other.innerHTML && part.className === other.className) return;
      if (part.contains(document.activeElement)) return;  // nobody loses the place where they are
      const open = [...part.querySelectorAll("details")].map((each) => each.open);
      part.className = other.className;
      part.replaceChildren(...other.childNodes);
      part.querySelectorAll("details").forEach((each, number) => { each.open = open[number] || false; });
    });
    document.title = fresh.title;
  }

  async function refresh() {
    if (asking) { again = true; return; }
    asking = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store", redirect: "error" });
      if (answer.ok) swap(await answer.text());
    } catch { live.textContent = "Not live: reload the page."; }
    asking = false;
    if (again) { again = false; refresh(); }
  }

  const source = new EventSource("/live?page=" + encodeURIComponent(main.dataset.page));
  source.onmessage = (event) => {
    live.textContent = "Live.";
    if (seen && event.data !== seen) refresh();
    seen = event.data;
  };
  source.onerror = () => { live.textContent = "Not live at the moment: reload the page to see what is new."; };
  addEventListener("pagehide", () => source.close());
})();
