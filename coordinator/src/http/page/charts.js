'use strict';
// Draws the charts of a run, in a report and on the coordinator's page. Every text goes in as text, never as markup.
//
// `box` takes the figures, `tip` shows values, `key` explains marks. `data` is what `series.rs` of the report makes; a series
// may have `low` and `high` beside `raw`, the extremes of each point's steps. `define` names other charts than those of a run.
// Returns `update(data)`, and `numbers` for whoever writes some beside the charts.
const anelloCharts = (box, tip, key, data, define) => {
  let n = data.tokens.length;

  const svgns = 'http://www.w3.org/2000/svg';
  const make = (name, attributes, parent, text) => {
    const element = document.createElementNS(svgns, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  };
  const html = (name, parent, text) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  };

  // Numbers.
  const grouped = v => String(Math.round(v)).replace(/\B(?=(\d{3})+$)/g, '\u2009');
  const scaled = v => {
    for (const [unit, size] of [['T', 1e12], ['B', 1e9], ['M', 1e6], ['K', 1e3]]) {
      if (Math.abs(v) >= size) return trim(v / size, 2) + ' ' + unit;
    }
    return trim(v, 2);
  };
  const trim = (v, digits) => String(Number(v.toFixed(digits)));
  const fixed = digits => v => v.toFixed(digits);
  const share = v => (100 * v).toFixed(v > 0 && v < 0.1 ? 1 : 0) + ' %';
  const rate = v => v === 0 ? '0' : v.toExponential(2).replace('e+', 'e');
  const rateTick = v => v === 0 ? '0' : Number(v.toPrecision(3)).toExponential().replace('e+', 'e');
  const small = v => Math.abs(v) >= 1000 ? scaled(v) : String(Number(v.toPrecision(3)));

  // Colours: loop steps go from warm to deep, rising in contrast, so that their order shows in any eye.
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const anchors = () => ['--t1', '--t2', '--t3', '--t4'].map(name => {
    const hex = css(name);
    return [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
  });
  const loopColor = t => {
    const stops = anchors();
    const at = data.loops > 1 ? t / (data.loops - 1) * (stops.length - 1) : stops.length - 1;
    const low = Math.min(Math.floor(at), stops.length - 2);
    const mixed = stops[low].map((v, i) => Math.round(v + (stops[low + 1][i] - v) * (at - low)));
    return `rgb(${mixed.join(' ')})`;
  };

  const ticks = (low, high, count) => {
    const raw = (high - low) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    const unit = [1, 2, 5, 10].find(m => m * power >= raw * 0.8) * power;
    const list = [];
    for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + unit * 1e-9; i++) list.push(i * unit);
    return list;
  };
  const finite = lists => lists.flat().filter(v => v !== null && Number.isFinite(v));
  /** Range of the values; a spike far beyond the rest runs out of the picture instead of flattening it. */
  const range = (lists, spike) => {
    const values = finite(lists).sort((a, b) => a - b);
    if (values.length === 0) return [0, 1];
    const usual = values[Math.floor((values.length - 1) * 0.98)];
    const low = values[0], high = Math.min(values[values.length - 1], spike ? usual * spike : Infinity);
    const pad = (high - low || Math.abs(high) || 1) * 0.05;
    return [low - pad, high + pad];
  };

  const runCharts = () => {
    const loopNames = Array.from({ length: data.loops }, (_, t) => `t = ${t + 1}`);
    const zeroTo = lists => [0, range(lists, 3)[1]];
    const each = data.stride === 1 ? 'thin: every step' : `thin: mean of ${data.stride} steps`;
    return [
      {
        title: 'Loss by loop step', note: `nats a token; ${each}, bold: moving average within a stage`, full: true, height: 340,
        series: loopNames.map((name, t) => ({ name, raw: data.loop[t], low: data.loopLow?.[t], high: data.loopHigh?.[t], values: data.loopSmooth[t], color: () => loopColor(t) })),
        domain: range([...data.loop, ...(data.loopHigh || []), [data.lnV]], 1.6), format: fixed(3), tick: small,
        refs: [{ y: data.lnV, text: 'ln V: knowing nothing' }], skips: true,
      },
      ...(data.heldOut || []).map(({ set, loop }) => ({
        title: `Held-out loss: ${set}`, note: 'nats a token, as last measured', full: true, height: 260,
        series: loop.map((values, t) => ({ name: `t = ${t + 1}`, values, color: () => loopColor(t) })),
        domain: range(loop), format: fixed(3), tick: small,
      })),
      {
        title: 'Where tokens exit', note: 'mean p(t) of each loop step', full: true, height: 260, stack: true,
        series: loopNames.map((name, t) => ({ name, values: data.exit[t], color: () => loopColor(t) })),
        domain: [0, 1], format: share, tick: share,
      },
      {
        title: 'Mean exit depth', note: 'Σ t · p(t), loop steps',
        series: [{ name: 'depth', values: data.depth, color: () => css('--accent') }],
        domain: [Math.min(1, data.loops), Math.max(data.loops, 2)], format: fixed(2), tick: small,
      },
      {
        title: 'Entropy of the exit distribution', note: 'nats; at ln T all loop steps are equally likely',
        series: [{ name: 'H(p)', values: data.entropy, color: () => css('--accent') }],
        domain: [0, Math.max(Math.log(Math.max(data.loops, 2)) * 1.06, range([data.entropy])[1])], format: fixed(3), tick: small,
        refs: [{ y: Math.log(Math.max(data.loops, 1)), text: 'ln T' }],
      },
      {
        title: 'Learning rate', note: 'of each update',
        series: [{ name: 'lr', values: data.lr, color: () => css('--accent') }],
        domain: [0, range([data.lr])[1]], format: rate, tick: rateTick,
      },
      {
        title: 'Gradient norm', note: 'global, before the clip',
        series: [{ name: 'norm', raw: data.norm, low: data.normLow, high: data.normHigh, values: data.normSmooth, color: () => css('--accent') }],
        domain: zeroTo([data.normHigh || data.norm]), format: small, tick: small, refs: [{ y: data.clip, text: 'clip' }],
      },
      {
        title: 'Throughput', note: 'tokens a second of wall clock',
        series: [{ name: 'tokens/s', raw: data.speed, low: data.speedLow, high: data.speedHigh, values: data.speedSmooth, color: () => css('--accent') }],
        domain: zeroTo([data.speed]), format: v => grouped(v), tick: scaled,
      },
      {
        title: 'Where the time went', note: 'share of each step', stack: true,
        series: ['compute', 'reduce', 'update', 'data', 'checkpoint', 'eval', 'other']
          .filter(name => data.time[name]?.some(v => v > 0))
          .map(name => ({ name, values: data.time[name], color: () => css('--' + name) })),
        domain: [0, 1], format: share, tick: share,
      },
    ];
  };

  define = define || runCharts;
  const numbers = { grouped, scaled, fixed, share, rate, rateTick, small, range, css, loopColor: t => loopColor(t) };
  let charts = n === 0 ? [] : define(data, numbers);
  const span = () => [data.stages.length ? data.stages[0].from : 0, data.tokens[n - 1]];
  let [start, end] = span();
  const stageAt = tokens => data.stages.find(s => tokens <= s.to) || data.stages[data.stages.length - 1];

  const frame = (chart, index) => {
    const figure = html('figure', box);
    if (chart.full) figure.className = 'full';
    const caption = html('figcaption', figure);
    html('b', caption, chart.title);
    chart.said = document.createTextNode(chart.note);
    caption.append(chart.said);
    chart.svg = make('svg', { role: 'img', tabindex: 0, 'aria-label': `${chart.title}, ${chart.note}` }, figure);
    chart.index = index;
    chart.svg.addEventListener('pointermove', event => {
      const bounds = chart.svg.getBoundingClientRect();
      point(chart, nearest((event.clientX - bounds.left - chart.left) / chart.plot), event.clientX, event.clientY);
    });
    chart.svg.addEventListener('pointerleave', () => leave());
    chart.svg.addEventListener('blur', () => leave());
    chart.svg.addEventListener('keydown', event => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
      if (!by) return;
      event.preventDefault();
      const at = Math.max(0, Math.min(n - 1, (current ?? n - 1) + by));
      const bounds = chart.svg.getBoundingClientRect();
      point(chart, at, bounds.left + chart.left + chart.plot * part(at), bounds.top + 60);
    });
  };

  const part = at => (data.tokens[at] - start) / (end - start || 1);
  const nearest = fraction => {
    const wanted = start + fraction * (end - start);
    let low = 0, high = n - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (data.tokens[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && wanted - data.tokens[low - 1] < data.tokens[low] - wanted ? low - 1 : low;
  };

  let current = null;
  const point = (chart, at, x, y) => {
    current = at;
    for (const other of charts) {
      const px = other.left + other.plot * part(at);
      other.cross.setAttribute('x1', px);
      other.cross.setAttribute('x2', px);
      other.cross.removeAttribute('visibility');
    }
    tip.replaceChildren();
    const skipped = data.skipped.some(([step]) => step <= data.step[at] && step > data.step[at] - data.stride);
    html('p', tip, `step ${grouped(data.step[at] + 1)} · ${scaled(data.tokens[at])} tokens · ${stageAt(data.tokens[at]).name}`
      + (skipped ? ' · skipped' : ''));
    const rows = chart.stack ? [...chart.series].reverse() : chart.series;
    for (const series of rows) {
      const value = series.values[at], raw = series.raw ? series.raw[at] : value;
      if (value === null && raw === null) continue;
      const row = html('div', tip), name = html('span', row);
      html('i', name).style.background = series.color();
      name.append(series.name);
      html('b', row, raw === null ? '–' : chart.format(raw));
    }
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, x + 18 + width > innerWidth - 8 ? x - width - 18 : x + 18) + 'px';
    tip.style.top = Math.max(8, Math.min(y + 14, innerHeight - height - 8)) + 'px';
  };
  const leave = () => {
    current = null;
    tip.hidden = true;
    for (const chart of charts) chart.cross.setAttribute('visibility', 'hidden');
  };

  /** Labels at their places, pushed apart where they would lie over one another. */
  const spread = (labels, low, high, gap) => {
    labels.sort((a, b) => a.y - b.y);
    labels.forEach((label, i) => { label.y = Math.max(label.y, i === 0 ? low : labels[i - 1].y + gap); });
    for (let i = labels.length - 1; i >= 0; i--) {
      labels[i].y = Math.min(labels[i].y, i === labels.length - 1 ? high : labels[i + 1].y - gap);
    }
  };

  const draw = chart => {
    const { svg } = chart;
    const width = svg.clientWidth || 600, height = chart.height || 220;
    const longest = Math.max(6, ...chart.series.map(series => label(chart, series)?.length ?? 0));
    const top = 24, bottom = 34, left = 52, right = 16 + 7.5 * longest;
    const plot = Math.max(width - left - right, 40), depth = height - top - bottom;
    Object.assign(chart, { left, plot });
    const [low, high] = chart.domain;
    const x = tokens => left + plot * (tokens - start) / (end - start || 1);
    const y = value => top + depth * (1 - (value - low) / (high - low || 1));
    svg.replaceChildren();
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    svg.setAttribute('height', height);
    const clip = make('clipPath', { id: `clip-${chart.index}` }, svg);
    make('rect', { x: left, y: top, width: plot, height: depth }, clip);

    data.stages.forEach((stage, i) => {
      const from = x(stage.from), wide = x(stage.to) - from;
      if (i % 2 === 0) make('rect', { class: 'band', x: from, y: top, width: wide, height: depth }, svg);
      if (wide > stage.name.length * 6.4 + 6) make('text', { x: from + 4, y: top - 8 }, svg, stage.name);
    });
    for (const tick of ticks(low, high, Math.floor(depth / 44))) {
      make('line', { class: 'grid', x1: left, x2: left + plot, y1: y(tick), y2: y(tick) }, svg);
      make('text', { x: left - 8, y: y(tick) + 4, 'text-anchor': 'end' }, svg, chart.tick(tick));
    }
    const across = ticks(start, end, Math.max(2, Math.floor(plot / 85)));
    for (const tick of across) {
      make('line', { class: 'axis', x1: x(tick), x2: x(tick), y1: top + depth, y2: top + depth + 5 }, svg);
      make('text', { x: x(tick), y: height - 8, 'text-anchor': 'middle' }, svg, scaled(tick));
    }
    make('text', { x: left + plot + 10, y: height - 8 }, svg, 'tokens');

    const labels = [];
    const inside = make('g', { 'clip-path': `url(#clip-${chart.index})` }, svg);
    if (chart.stack) stack(chart, inside, x, y, labels); else lines(chart, inside, x, y, labels);
    make('line', { class: 'axis', x1: left, x2: left + plot, y1: top + depth, y2: top + depth }, svg);
    for (const ref of chart.refs || []) {
      if (ref.y < low || ref.y > high) continue;
      make('line', { class: 'ref', x1: left, x2: left + plot, y1: y(ref.y), y2: y(ref.y) }, svg);
      make('text', { x: left + plot - 4, y: y(ref.y) - 5, 'text-anchor': 'end' }, svg, ref.text);
    }
    for (const [step, tokens, kept] of data.checkpoints) {
      const at = x(tokens), base = top + depth;
      const mark = make('path', { class: kept ? 'mark kept' : 'mark', d: `M${at - 4} ${base + 7}L${at} ${base + 1}L${at + 4} ${base + 7}Z` }, svg);
      make('title', {}, mark, `checkpoint ${step}${kept ? '' : ', since removed'}`);
    }
    if (chart.skips) {
      for (const [, tokens] of data.skipped) {
        const at = x(tokens);
        make('path', { class: 'skip', d: `M${at - 3} ${top + 3}l6 6m0 -6l-6 6` }, svg);
      }
    }
    spread(labels, top + 6, top + depth - 2, 15);
    for (const { y, text, color } of labels) {
      make('text', { class: 'end', x: left + plot + 7, y: y + 4 }, svg, text).style.fill = color;
    }
    chart.cross = make('line', { class: 'cross', y1: top, y2: top + depth, visibility: 'hidden' }, svg);
  };

  /** A path through the values, broken where there is none. */
  const path = (values, x, y) => {
    let text = '', pen = 'M';
    values.forEach((value, at) => {
      if (value === null) { pen = 'M'; return; }
      text += `${pen}${x(data.tokens[at]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = 'L';
    });
    return text;
  };
  /** What lies between the extremes, in pieces where there are some. */
  const between = (low, high, x, y) => {
    let text = '', from = 0;
    for (let at = 0; at <= n; at++) {
      if (at < n && low[at] !== null && high[at] !== null) continue;
      if (at > from) {
        const place = (values, i) => `${x(data.tokens[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
        const forth = [], back = [];
        for (let i = from; i < at; i++) { forth.push(place(high, i)); back.unshift(place(low, i)); }
        text += `M${forth.join('L')}L${back.join('L')}Z`;
      }
      from = at + 1;
    }
    return text;
  };
  /** What is written at the end of a series; null where it has no place. */
  const label = (chart, { name, values }) => {
    const last = chart.stack ? values[n - 1] : lastOf(values);
    if (last === null || (chart.stack && last < 0.004)) return null;
    if (chart.stack) return `${name}\u2002${share(last)}`;
    return chart.series.length > 1 ? `${name}\u2002${small(last)}` : chart.tick(Number(last.toPrecision(3)));
  };
  const lastOf = values => {
    for (let at = n - 1; at >= 0; at--) if (values[at] !== null) return values[at];
    return null;
  };
  const round = { fill: 'none', 'stroke-linejoin': 'round', 'stroke-linecap': 'round' };
  const lines = (chart, group, x, y, labels) => {
    for (const { low, high, color } of chart.series) {
      if (low && high) make('path', { d: between(low, high, x, y), fill: color(), opacity: 0.16 }, group);
    }
    for (const { raw, low, color } of chart.series) {
      if (raw && !low) make('path', { ...round, d: path(raw, x, y), stroke: color(), 'stroke-width': 1, opacity: 0.3 }, group);
    }
    for (const series of chart.series) {
      const { values, color } = series, text = label(chart, series);
      make('path', { ...round, d: path(values, x, y), stroke: color(), 'stroke-width': 2 }, group);
      if (text !== null) labels.push({ y: y(lastOf(values)), text, color: color() });
    }
  };
  const stack = (chart, group, x, y, labels) => {
    let below = new Array(n).fill(0);
    for (const series of chart.series) {
      const { values, color } = series, text = label(chart, series);
      const above = below.map((v, at) => v + (values[at] ?? 0));
      const forth = above.map((v, at) => `${x(data.tokens[at]).toFixed(1)} ${y(v).toFixed(1)}`);
      const back = below.map((v, at) => `${x(data.tokens[at]).toFixed(1)} ${y(v).toFixed(1)}`).reverse();
      make('path', { d: `M${forth.join('L')}L${back.join('L')}Z`, fill: color(), opacity: 0.85 }, group);
      make('path', { class: 'edge', d: `M${forth.join('L')}` }, group);
      if (text !== null) labels.push({ y: y(below[n - 1] + values[n - 1] / 2), text, color: color() });
      below = above;
    }
  };

  const explain = () => {
    if (!key) return;
    key.textContent = n === 0 ? '' : '▲ checkpoint (hollow: since removed by retention) · '
      + (data.skipped.length ? '✕ step that was not finite and was skipped · ' : '')
      + 'shaded bands: stages. Point at a chart, or focus it and use the arrow keys, to read values.';
  };
  const all = () => { charts.forEach(draw); leave(); };
  let waiting = 0;
  const again = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(all); };
  const begin = () => {
    box.replaceChildren();
    if (n === 0) box.textContent = 'No step has been logged yet.';
    charts.forEach(frame);
    explain();
    all();
  };
  addEventListener('resize', again);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', again);
  begin();
  return {
    numbers,
    update(next) {
      const first = n === 0 || next.tokens.length === 0;
      data = next;
      n = data.tokens.length;
      [start, end] = span();
      const now = n === 0 ? [] : define(data, numbers);
      if (first || now.length !== charts.length) {
        charts = now;
        begin();
        return;
      }
      // The figures stay, so that who reads one with the keyboard or the pointer is not thrown out.
      now.forEach((chart, index) => {
        chart.said = charts[index].said;
        chart.said.data = chart.note;
        Object.assign(charts[index], chart);
      });
      explain();
      const reads = current;
      charts.forEach(draw);
      if (reads === null) leave();
    },
    remove() {
      cancelAnimationFrame(waiting);
      removeEventListener('resize', again);
      box.replaceChildren();
      tip.hidden = true;
    },
  };
};
