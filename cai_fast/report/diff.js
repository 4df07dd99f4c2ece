// What changed between two texts, by words: a longest common subsequence, with common ends cut off first.
const WORD = /[\p{L}\p{N}_'’]+\s*|[^\p{L}\p{N}_'’\s]\s*|\s+/gu;
const CELLS = 4e6; // of the table; above that the middle counts as replaced

// [[kind, text], ...] with kind "=" (in both), "-" (in the first only), "+" (in the second only).
function diffWords(before, after) {
  const a = before.match(WORD) ?? [], b = after.match(WORD) ?? [];
  const same = (i, j) => a[i].trim() === b[j].trim();
  let start = 0;
  while (start < a.length && start < b.length && same(start, start)) start++;
  let tail = 0;
  while (tail < Math.min(a.length, b.length) - start && same(a.length - 1 - tail, b.length - 1 - tail)) tail++;
  const n = a.length - tail, m = b.length - tail;
  const parts = [];
  const add = (kind, text) => {
    const last = parts[parts.length - 1];
    if (last && last[0] === kind) last[1] += text;
    else parts.push([kind, text]);
  };
  for (let j = 0; j < start; j++) add("=", b[j]);
  for (const [kind, text] of middle(a.slice(start, n), b.slice(start, m))) add(kind, text);
  for (let j = m; j < b.length; j++) add("=", b[j]);
  return parts;
}

function middle(a, b) {
  if (a.length * b.length > CELLS) return [["-", a.join("")], ["+", b.join("")]];
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width); // of the rest from (i, j) on
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i * width + j] = a[i].trim() === b[j].trim()
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  const parts = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i].trim() === b[j].trim()) parts.push(["=", b[j]]), i++, j++;
    else if (j >= b.length || (i < a.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) parts.push(["-", a[i++]]);
    else parts.push(["+", b[j++]]);
  }
  return parts;
}
