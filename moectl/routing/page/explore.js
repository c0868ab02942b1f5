// Text from files goes into the page through textContent alone.
const data = JSON.parse(document.getElementById('routing').textContent);
const percent = share => +(100 * share).toPrecision(3) + '%';
const make = (tag, words = '', attributes = {}) => {
  const node = document.createElement(tag);
  node.textContent = words;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
const bytes = text => Uint8Array.from(atob(text), character => character.charCodeAt(0));
const numbers = text => new Int16Array(bytes(text).buffer);

for (const root of document.querySelectorAll('[data-stream]')) explore(root, data.streams[root.dataset.stream]);

function explore(root, stream) {
  const find = selector => root.querySelector(selector);
  const scrub = find('.scrub input');
  const pickLayer = find('.pick select.layer'), pickExpert = find('.pick select.expert-number');
  const sample = find('.sample'), legend = find('.legend'), told = find('.told'), card = find('.expert');
  let layer = 0, expert = 0, alone = null, at = null;

  const text = stream.text && {
    pieces: stream.text.documents.flatMap(document => document.pieces),
    ids: stream.text.ids.map(numbers),
    weights: stream.text.weights.map(each => each && bytes(each)),
  };
  const spans = [], bounds = [];
  if (text) {
    let place = 0;
    for (const document of stream.text.documents) {
      const own = [place, place + document.pieces.length];
      sample.append(make('span', document.name, {class: 'document'}));
      for (const piece of document.pieces) {
        const span = make('span', piece, {'data-at': place++});
        spans.push(span);
        bounds.push(own);
        sample.append(span);
      }
    }
  }
  const chosen = (place, rank = 0) => text.ids[layer][place * stream.topk[layer] + rank];

  function show(number) {
    layer = Math.max(0, Math.min(stream.layers.length - 1, number));
    scrub.value = layer;
    find('.scrub output').textContent = 'layer ' + stream.layers[layer];
    // A layer that was not drawn shows the nearest that was.
    for (const group of root.querySelectorAll('.layered')) {
      const drawn = [...group.children].map(child => +child.dataset.layer);
      const nearest = drawn.reduce((best, each) => Math.abs(each - layer) < Math.abs(best - layer) ? each : best);
      for (const child of group.children) child.hidden = +child.dataset.layer !== nearest;
    }
    colour();
  }

  function colour() {
    if (!text) return;
    const used = new Map();
    for (let place = 0; place < spans.length; place++) used.set(chosen(place), (used.get(chosen(place)) || 0) + 1);
    const order = [...used].filter(([id]) => id >= 0).sort((a, b) => b[1] - a[1]).slice(0, data.palette.length);
    // The expert whose page is open has a colour too, however seldom it is.
    if (used.has(expert) && !order.some(([id]) => id === expert)) order[order.length - 1] = [expert, used.get(expert)];
    const ink = new Map(order.map(([id], rank) => [id, data.palette[rank]]));
    legend.replaceChildren(...order.map(([id, count]) => {
      const button = make('button', `expert ${id} · ${percent(count / spans.length)}`, {'aria-pressed': id === alone});
      button.style.borderLeftColor = ink.get(id);
      button.addEventListener('click', () => { alone = alone === id ? null : id; colour(); });
      return button;
    }));
    spans.forEach((span, place) => {
      const id = chosen(place), mine = ink.get(id) || '#9aa0a6', faded = alone !== null && id !== alone;
      span.style.backgroundColor = faded || id < 0 ? '' : mine + (ink.has(id) ? '4d' : '1a');
      span.style.borderBottomColor = faded || id < 0 ? 'transparent' : mine;
      span.style.color = faded ? '#9aa0a6' : '';
    });
    tell(at);
  }

  function tell(place) {
    if (!text || place === null || !spans[place]) return;
    if (at !== null) spans[at].classList.remove('at');
    at = place;
    spans[at].classList.add('at');
    const k = stream.topk[layer], weight = text.weights[layer];
    const parts = [];
    for (let rank = 0; rank < k; rank++) {
      const id = chosen(at, rank);
      if (id >= 0) parts.push(`expert ${id}` + (weight ? ` (${percent(weight[at * k + rank] / 255)} of the weight)` : ''));
    }
    told.textContent = `${JSON.stringify(text.pieces[at])}, layer ${stream.layers[layer]}: ` + (parts.join(', ') || 'no expert');
  }

  function open(ofLayer, number) {
    layer = ofLayer;
    expert = Math.min(number, stream.experts[layer] - 1);
    show(layer);
    if (pickExpert.length !== stream.experts[layer])
      pickExpert.replaceChildren(...Array.from({length: stream.experts[layer]}, (_, id) => make('option', id, {value: id})));
    pickLayer.value = layer;
    pickExpert.value = expert;
    const load = stream.load[layer][expert], fair = stream.topk[layer] / stream.experts[layer];
    const label = `layer ${stream.layers[layer]}, expert ${expert}`;
    find('.expert-title').textContent = load
      ? `Expert ${expert} of layer ${stream.layers[layer]} serves ${percent(load)} of the tokens, ${(load / fair).toPrecision(2)} times its share`
      : `Expert ${expert} of layer ${stream.layers[layer]} was not seen`;
    card.replaceChildren();
    const share = stream.share[layer];
    if (share) card.append(column('By domain, of its tokens (95%)', stream.domains.map((name, domain) => {
      const [value, low, high] = share.map(each => each[domain][expert]);
      return [name, `${percent(value)}  (${percent(low)} to ${percent(high)})`];
    }).concat([['chance', percent(fair)]])));
    const words = stream.words[layer];
    const spelled = id => (data.tokens[id] ?? `#${id}`).replaceAll(' ', '␣');
    if (words) card.append(column('Tokens whose first choice it is', words[expert].map(
      ([id, part, count]) => [make('code', spelled(id)), `${percent(part)} of ${count}`])
      .concat(words[expert].length ? [['of all tokens', percent(stream.first[layer][expert])]] : []), 'None often enough.'));
    // Of the other places of a token, every other expert would have its part by its load.
    const left = stream.topk[layer] - load, byLoads = stream.load[layer].map(each => stream.mates[layer] * each / left);
    const lists = [['partners', 'Chosen together with', 'by loads', byLoads],
      ['next', 'Then, in the next layer', 'of all tokens', stream.first[layer + 1]]];
    for (const [field, heading, without, chance] of lists) {
      const list = stream[field][layer];
      if (list) card.append(column(heading, list[expert].map(
        ([id, part]) => [`expert ${id}`, `${percent(part)}  (${without} ${percent(chance[id])})`]), 'Nothing.'));
    }
    if (text) card.append(column('In the text, by weight', contexts(), 'Nowhere in the sample.'));
    card.setAttribute('aria-label', label);
  }

  function column(heading, entries, empty = '') {
    const box = make('section'), list = make('ol');
    for (const [name, value] of entries) {
      const item = make('li');
      item.append(name, make('span', value));
      list.append(item);
    }
    box.append(make('h4', heading), entries.length ? list : make('p', empty, {class: 'note'}));
    return box;
  }

  function contexts() {
    const k = stream.topk[layer], found = [];
    for (let place = 0; place < spans.length; place++)
      for (let rank = 0; rank < k; rank++)
        if (chosen(place, rank) === expert) found.push([place, text.weights[layer] ? text.weights[layer][place * k + rank] : k - rank]);
    const visible = words => words.replace(/\s/g, character => character === '\n' ? '⏎' : ' ');
    return found.sort((a, b) => b[1] - a[1]).slice(0, 8).map(([place]) => {
      const line = make('span', '', {class: 'around'}), [start, end] = bounds[place];
      line.append(visible(text.pieces.slice(Math.max(start, place - 24), place).join('').slice(-22)),
        make('mark', visible(text.pieces[place])),
        visible(text.pieces.slice(place + 1, Math.min(end, place + 25)).join('').slice(0, 22)));
      return [line, ''];
    });
  }

  function pointed(event) {
    const cells = event.target.closest('.cells');
    if (!cells) return null;
    const drawing = cells.ownerSVGElement, place = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(drawing.getScreenCTM().inverse());
    const {left, top, width, height} = cells.dataset;
    const ofLayer = Math.floor((place.y - top) / height), column = Math.floor((place.x - left) / width);
    if (!stream.load[ofLayer]) return null;
    const order = cells.closest('.by-load')
      ? [...stream.load[ofLayer].keys()].sort((a, b) => stream.load[ofLayer][b] - stream.load[ofLayer][a])
      : [...stream.load[ofLayer].keys()];
    const number = order[column * stream.pooled];
    return number === undefined ? null : [ofLayer, number];
  }

  const map = find('.map');
  map.addEventListener('click', event => {
    const cell = pointed(event);
    if (cell) { open(...cell); find('.expert-page').scrollIntoView({block: 'nearest'}); }
  });
  map.addEventListener('mousemove', event => {
    const cell = pointed(event);
    find('.map-told').textContent = cell
      ? `Layer ${stream.layers[cell[0]]}, expert ${cell[1]}: ${percent(stream.load[cell[0]][cell[1]])} of the tokens`
      : 'Point at a cell; click for the page of its expert.';
  });
  find('.order').addEventListener('click', event => {
    for (const view of map.children) view.hidden = !view.hidden;
    event.target.setAttribute('aria-pressed', map.children[0].hidden);
  });
  scrub.addEventListener('input', () => open(+scrub.value, expert));
  pickLayer.addEventListener('change', () => open(+pickLayer.value, expert));
  pickExpert.addEventListener('change', () => open(layer, +pickExpert.value));
  if (text) {
    const pointAt = event => event.target.dataset.at !== undefined && tell(+event.target.dataset.at);
    sample.addEventListener('mouseover', pointAt);
    sample.addEventListener('click', pointAt);
    sample.addEventListener('keydown', event => {
      const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (by) { event.preventDefault(); tell(Math.max(0, Math.min(spans.length - 1, (at ?? -1) + by))); }
    });
  }
  for (const node of root.querySelectorAll('.scripted')) node.hidden = !text && node.classList.contains('text');
  open(stream.start[0], stream.start[1]);
}
