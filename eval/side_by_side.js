"use strict";
(() => {
  const MOST_CELLS = 4_000_000; // of the table of a difference; beyond it lines are compared
  const one = (id) => document.getElementById(id);
  const prompts = [...document.querySelectorAll(".prompt")];
  const boxes = [...document.querySelectorAll("input.side")];
  const original = new Map(
    [...document.querySelectorAll(".reply")].map((node) => [node, node.textContent]));

  // --- filter

  const isWanted = (prompt, shown) => {
    const role = one("role").value;
    const state = one("state").value;
    const words = one("find").value.trim().toLowerCase();
    const cards = [...prompt.querySelectorAll(".card")].filter((card) => shown.has(card.dataset.side));
    if (role && prompt.dataset.role !== role) return false;
    if (state === "failed" && !cards.some((card) => Number(card.dataset.failed) > 0)) return false;
    if (state === "apart" && new Set(cards.map((card) => card.dataset.passed)).size < 2) return false;
    const text = () => [prompt.querySelector("h3"), ...cards].map((it) => it.textContent).join("\n");
    return !words || text().toLowerCase().includes(words);
  };

  const filter = () => {
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    for (const card of document.querySelectorAll(".card")) card.hidden = !shown.has(card.dataset.side);
    one("board").style.setProperty("--sides", Math.max(1, shown.size));
    for (const prompt of prompts) prompt.hidden = !isWanted(prompt, shown);
    const left = prompts.filter((prompt) => !prompt.hidden).length;
    one("count").textContent = `${left} of ${prompts.length} prompts`;
    one("nothing").hidden = left > 0;
  };

  // --- word differences

  const pieces = (text, pattern) => text.match(pattern) || [];

  // For each piece whether it is common to both: the longest common subsequence.
  const common = (first, second) => {
    const width = second.length + 1;
    const table = new Uint16Array((first.length + 1) * width);
    for (let i = first.length - 1; i >= 0; i--) {
      for (let j = second.length - 1; j >= 0; j--) {
        table[i * width + j] = first[i] === second[j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
      }
    }
    const inFirst = new Array(first.length).fill(false);
    const inSecond = new Array(second.length).fill(false);
    let i = 0;
    let j = 0;
    while (i < first.length && j < second.length) {
      if (first[i] === second[j]) {
        inFirst[i++] = inSecond[j++] = true;
      } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) {
        i++;
      } else {
        j++;
      }
    }
    return [inFirst, inSecond];
  };

  const split = (first, second) => {
    const words = [first, second].map((text) => pieces(text, /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu));
    if (words[0].length * words[1].length <= MOST_CELLS) return words;
    return [first, second].map((text) => pieces(text, /[^\n]*\n|[^\n]+$/g).slice(0, 2000));
  };

  const mark = (node, parts, isCommon, name) => {
    node.textContent = "";
    let at = 0;
    while (at < parts.length) {
      const same = isCommon[at];
      let end = at;
      while (end < parts.length && isCommon[end] === same) end++;
      const text = parts.slice(at, end).join("");
      if (same) {
        node.append(text);
      } else {
        const marked = document.createElement(name);
        marked.textContent = text;
        node.append(marked);
      }
      at = end;
    }
  };

  const replyOf = (prompt, side) => prompt.querySelector(`.card[data-side="${side}"] .reply`);

  const compare = () => {
    for (const [node, text] of original) node.textContent = text;
    const from = one("from").value;
    const to = one("to").value;
    if (from === "" || to === "" || from === to) return;
    for (const prompt of prompts) {
      const first = replyOf(prompt, from);
      const second = replyOf(prompt, to);
      if (!first || !second) continue;
      const parts = split(original.get(first), original.get(second));
      const [inFirst, inSecond] = common(parts[0], parts[1]);
      mark(first, parts[0], inFirst, "del");
      mark(second, parts[1], inSecond, "ins");
    }
  };

  const clear = () => {
    for (const id of ["role", "state", "find", "from", "to"]) one(id).value = "";
    for (const box of boxes) box.checked = true;
    filter();
    compare();
  };

  one("toolbar").hidden = false;
  one("toolbar").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["role", "state"]) one(id).addEventListener("change", filter);
  one("find").addEventListener("input", filter);
  for (const box of boxes) box.addEventListener("change", filter);
  for (const id of ["from", "to"]) one(id).addEventListener("change", compare);
  one("clear").addEventListener("click", clear);
  filter();
})();
