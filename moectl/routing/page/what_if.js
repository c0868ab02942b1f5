const counted = value => (+value.toPrecision(4)).toLocaleString('en', {maximumSignificantDigits: 6});

for (const box of document.querySelectorAll('.moving')) slide(box, JSON.parse(box.dataset.curve));

function slide(box, curve) {
  const input = box.querySelector('input'), marker = box.querySelector('.marker');
  const valued = value => value === null ? 'no value' : curve.percent ? percent(value) : counted(value);

  function move() {
    const at = +input.value;
    marker.setAttribute('transform', `translate(${curve.at[at]} 0)`);
    marker.setAttribute('visibility', 'visible');
    box.querySelector('output').textContent = counted(curve.x[at]);
    input.setAttribute('aria-valuetext', counted(curve.x[at]));
    box.querySelector('.told').textContent =
      curve.lines.map(([name, values]) => `${name}: ${valued(values[at])}`).join('; ');
  }

  input.addEventListener('input', move);
  for (const node of box.querySelectorAll('.scripted')) node.hidden = false;
  move();
}
