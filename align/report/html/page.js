"use strict";
// Filters the answers by text, and shows the first few until asked for all. Reads text only, and writes a number: nothing from the data ever becomes markup.
const box = document.getElementById("filter");
if (box) {
  const FIRST = 10;
  const count = document.getElementById("filter-count");
  const all = document.getElementById("show-all");
  let limit = FIRST;
  const cards = Array.from(document.querySelectorAll(".asked"), (card) => [card, card.textContent.toLowerCase()]);
  const apply = () => {
    const wanted = box.value.trim().toLowerCase();
    let found = 0;
    for (const [card, text] of cards) {
      const hit = text.includes(wanted);
      found += hit ? 1 : 0;
      card.hidden = !hit || found > limit;
    }
    all.hidden = found <= limit;
    count.textContent = found > limit ? `${limit} of ${found}` : `${found} of ${cards.length}`;
  };
  all.addEventListener("click", () => {
    limit = Infinity;
    apply();
  });
  box.addEventListener("input", apply);
  document.getElementById("filter-row").hidden = false;
  apply();
}
// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
