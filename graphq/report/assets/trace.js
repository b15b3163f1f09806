const sections = [...document.querySelectorAll("section")];
const buttons = [...document.querySelectorAll("nav button")];

function show(wanted) {
  const chosen = Math.max(0, Math.min(sections.length - 1, wanted));
  sections.forEach((s, i) => s.classList.toggle("on", i === chosen));
  buttons.forEach((b, i) => b.classList.toggle("on", i === chosen));
  location.hash = chosen;
}

buttons.forEach((b, i) => { b.onclick = () => show(i); });
document.onkeydown = (event) => {
  const now = sections.findIndex((s) => s.classList.contains("on"));
  if (event.key === "ArrowDown" || event.key === "ArrowRight") show(now + 1);
  if (event.key === "ArrowUp" || event.key === "ArrowLeft") show(now - 1);
};
show(parseInt(location.hash.slice(1)) || 0);
