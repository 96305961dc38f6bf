'use strict';
// The coordinator's page: jobs, a job, two jobs side by side. Every text goes in as text, never as markup.
(() => {
  const main = document.getElementById('main');
  const tip = document.getElementById('tip');
  const live = document.getElementById('live');
  const POINTS = 800;
  /** `?live=0` shows how it is once, and follows nothing. */
  const follows = new URLSearchParams(location.search).get('live') !== '0';

  // Elements.
  const el = (name, parent, { text, ...attributes } = {}) => {
    const element = document.createElement(name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const svg = (name, parent, { text, ...attributes } = {}) => {
    const element = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const section = (parent, title) => {
    const box = el('section', parent, { 'aria-label': title });
    el('h2', box, { text: title });
    return box;
  };

  // Numbers and times.
  const grouped = v => String(Math.round(v)).replace(/\B(?=(\d{3})+$)/g, '\u2009');
  const scaled = v => {
    for (const [unit, size] of [['T', 1e12], ['B', 1e9], ['M', 1e6], ['K', 1e3]]) {
      if (Math.abs(v) >= size) return Number((v / size).toPrecision(3)) + ' ' + unit;
    }
    return String(Number(v.toPrecision(3)));
  };
  const orDash = (v, show) => v === null || v === undefined || !Number.isFinite(v) ? '–' : show(v);
  const nats = v => orDash(v, x => x.toFixed(3));
  const percent = v => orDash(v, x => (100 * x).toFixed(1) + ' %');
  const seconds = v => orDash(v, x => x < 1 ? (x * 1000).toFixed(0) + ' ms' : x.toFixed(2) + ' s');
  const duration = v => orDash(v, x => {
    const [d, h, m] = [Math.floor(x / 86400), Math.floor(x / 3600) % 24, Math.floor(x / 60) % 60];
    if (d > 0) return `${d} d ${h} h`;
    if (h > 0) return `${h} h ${m} min`;
    return m > 0 ? `${m} min ${Math.floor(x % 60)} s` : `${x.toFixed(x < 10 ? 1 : 0)} s`;
  });
  const utc = ms => new Date(ms).toISOString().slice(0, 19).replace('T', ' ');

  // The server.
  const token = () => sessionStorage.getItem('anello-token');
  const headers = () => token() ? { Authorization: 'Bearer ' + token() } : {};
  class Refused extends Error {
    constructor(status, text) { super(text); this.status = status; }
  }
  const ask = async (path, options = {}) => {
    const response = await fetch('api/v1/' + path, { ...options, headers: headers() });
    const body = await response.json().catch(() => ({}));
    if (!response.ok) throw new Refused(response.status, body.error || response.statusText);
    return body;
  };
  const path = name => 'jobs/' + encodeURIComponent(name);

  const say = (text, state = '') => {
    if (live.textContent !== text) live.textContent = text;
    live.className = 'live ' + state;
  };

  /** Asks a person; the answer, or null. */
  const dialog = ({ title, text, action, label, value = '', kind = 'text', danger }) => new Promise(resolve => {
    const at = id => document.getElementById(id);
    at('ask-title').textContent = title;
    at('ask-text').textContent = text;
    at('ask-do').textContent = action;
    at('ask-do').classList.toggle('danger', !!danger);
    at('ask-label').hidden = !label;
    at('ask-label').firstElementChild.textContent = label || '';
    const input = at('ask-input');
    Object.assign(input, { type: kind, value });
    const box = at('ask');
    box.onclose = () => resolve(box.returnValue === 'yes' ? input.value : null);
    box.returnValue = 'no';
    // Return in the field means the action, not the way back.
    input.onkeydown = event => {
      if (event.key !== 'Enter') return;
      event.preventDefault();
      box.close('yes');
    };
    box.showModal();
  });

  /** What is shown in place of a page that cannot be. */
  const trouble = async error => {
    if (error.status === 401) {
      const given = await dialog({
        title: 'Who are you?', text: 'This coordinator wants a token. It stays in this tab.', action: 'Go on', label: 'Token', kind: 'password',
      });
      if (given) sessionStorage.setItem('anello-token', given.trim()); else sessionStorage.removeItem('anello-token');
      if (given) { route(); return; }
    }
    main.replaceChildren();
    el('h1', main, { text: error.status === 404 ? 'There is nothing here' : 'This cannot be shown now' });
    el('p', main, { class: 'why bad', role: 'alert', text: error.message });
    const again = el('button', main, { text: 'Try again', type: 'button' });
    again.onclick = () => route();
    say('not connected', 'off');
  };

  const chip = (parent, phase) => el('span', parent, { class: 'chip ' + phase, text: phase });
  const bar = (parent, job) => {
    const done = job.total_steps ? (job.step || 0) / job.total_steps : 0;
    const box = el('div', parent, {
      class: 'progress', role: 'progressbar', 'aria-label': 'progress of ' + job.name, 'aria-valuemin': 0, 'aria-valuemax': job.total_steps, 'aria-valuenow': job.step || 0,
    });
    el('i', box).style.width = (100 * done).toFixed(2) + '%';
    return box;
  };
  const table = (parent, titles, { caption, left = 1 } = {}) => {
    const wide = el('div', parent, { class: 'wide', tabindex: 0, role: 'region', 'aria-label': caption });
    const box = el('table', wide);
    const row = el('tr', el('thead', box));
    titles.forEach((title, at) => el('th', row, { scope: 'col', text: title, class: at < left ? 'left' : '' }));
    return el('tbody', box);
  };

  // All jobs.
  const list = async () => {
    const draw = ({ jobs }) => {
      const open = document.activeElement?.dataset?.job;
      main.replaceChildren();
      el('h1', main, { text: 'Jobs' });
      if (jobs.length === 0) {
        const box = el('p', main, { class: 'empty' });
        box.append('There are no jobs yet. ');
        el('code', box, { text: 'anello submit tiny' });
        box.append(' puts one here.');
        return;
      }
      const count = phase => jobs.filter(job => job.phase === phase).length;
      const told = ['running', 'queued', 'paused', 'completed', 'failed'].filter(count).map(phase => `${count(phase)} ${phase}`);
      el('p', main, { class: 'status', text: told.join(' · ') });
      const body = table(main, ['job', 'phase', 'progress', 'step', 'loss', 'tokens/s', 'workers', ''], { caption: 'Jobs', left: 3 });
      for (const job of jobs) {
        const row = el('tr', body);
        const name = el('th', row, { scope: 'row', class: 'left' });
        el('a', name, { href: '#/jobs/' + encodeURIComponent(job.name), text: job.name, 'data-job': job.name });
        chip(el('td', row, { class: 'left' }), job.phase);
        bar(el('td', row, { class: 'left' }), job);
        el('td', row, { text: `${orDash(job.step, grouped)} / ${grouped(job.total_steps)}` });
        el('td', row, { text: nats(job.loss) });
        el('td', row, { text: orDash(job.tokens_per_s, scaled) });
        el('td', row, { text: job.over ? '–' : `${job.workers} / ${job.desired}` });
        el('td', row, { class: 'grow', text: job.reason || job.waits_for || '' });
      }
      if (open) main.querySelector(`[data-job="${CSS.escape(open)}"]`)?.focus();
      if (jobs.length > 1) {
        const form = el('form', main, { class: 'compare' });
        const choose = (label, at) => {
          el('label', form, { text: label, for: 'compare-' + at });
          const box = el('select', form, { id: 'compare-' + at });
          jobs.forEach((job, i) => { el('option', box, { value: job.name, text: job.name }).selected = i === at; });
          return box;
        };
        const [a, b] = [choose('Compare', 0), choose('with', 1)];
        el('button', form, { text: 'Show', type: 'submit' });
        form.onsubmit = event => {
          event.preventDefault();
          location.hash = `#/compare/${encodeURIComponent(a.value)}/${encodeURIComponent(b.value)}`;
        };
      }
    };
    const mine = visit;
    const first = await ask('jobs');
    if (mine !== visit) return;
    draw(first);
    say(follows ? 'live' : 'as it was', follows ? 'on' : '');
    // Whoever chooses two jobs is not interrupted.
    if (follows) every(2000, async () => {
      const now = await ask('jobs');
      if (mine === visit && document.activeElement?.tagName !== 'SELECT') draw(now);
    });
  };

  /** A moving average of what is there, within a stage. */
  const smooth = (values, stage) => {
    const reach = Math.floor(values.length / 60), sums = [0], counts = [0];
    values.forEach((v, at) => { sums.push(sums[at] + (v ?? 0)); counts.push(counts[at] + (v === null ? 0 : 1)); });
    let from = 0, to = 0;
    return values.map((_, at) => {
      if (stage[at] !== stage[from]) from = at;
      if (to <= at) { to = at + 1; while (to < values.length && stage[to] === stage[at]) to++; }
      const [a, b] = [Math.max(from, at - reach), Math.min(to, at + reach + 1)];
      return counts[b] > counts[a] ? (sums[b] - sums[a]) / (counts[b] - counts[a]) : null;
    });
  };

  /** What the charts are drawn from. */
  const chartData = (metrics, config, checkpoints) => {
    const { figures, stage, stages, tokens, step, stride } = metrics;
    const soft = values => smooth(values, stage);
    const parts = [];
    stage.forEach((of, at) => {
      const known = config.stages.find(s => s.name === stages[of]);
      if (at === 0 || of !== stage[at - 1]) parts.push({ name: stages[of], from: at ? tokens[at - 1] : known ? known.tokens_before : 0, to: tokens[at] });
      parts[parts.length - 1].to = tokens[at];
    });
    const share = name => soft(figures[name].mean.map((v, at) => v === null || !figures.seconds.mean[at] ? null : v / figures.seconds.mean[at]));
    const time = {};
    for (const name of ['compute', 'reduce', 'update', 'data', 'checkpoint']) time[name] = share(name + '_seconds');
    time.other = time.compute.map((_, at) => Math.max(0, 1 - ['compute', 'reduce', 'update', 'data', 'checkpoint'].reduce((sum, name) => sum + (time[name][at] ?? 0), 0)));
    const marks = [];
    for (const { step: of, kept } of checkpoints) {
      const at = step.findIndex(s => s + 1 >= of);
      if (at >= 0) marks.push([of, tokens[at], kept]);
    }
    return {
      stride, tokens, step, stages: parts, time, loops: metrics.loop_loss.length,
      loop: metrics.loop_loss.map(l => l.mean), loopSmooth: metrics.loop_loss.map(l => soft(l.mean)),
      loopLow: stride > 1 ? metrics.loop_loss.map(l => l.min) : null, loopHigh: stride > 1 ? metrics.loop_loss.map(l => l.max) : null,
      exit: metrics.exit.map(soft), depth: soft(figures.depth.mean), entropy: soft(figures.entropy.mean), lr: figures.lr.mean,
      norm: figures.grad_norm.mean, normSmooth: soft(figures.grad_norm.mean), normLow: figures.grad_norm.min, normHigh: figures.grad_norm.max,
      speed: figures.tokens_per_s.mean, speedSmooth: soft(figures.tokens_per_s.mean), speedLow: figures.tokens_per_s.min, speedHigh: figures.tokens_per_s.max,
      checkpoints: marks, skipped: metrics.skipped, lnV: Math.log(config.vocab), clip: config.clip,
    };
  };

  /** Adds points that came; whether they fit. */
  const append = (metrics, more) => {
    const last = metrics.step[metrics.step.length - 1] ?? -1;
    if (more.step.length === 0 || more.step[more.step.length - 1] <= last) return true;
    if (more.step[0] <= last || more.loop_loss.length !== metrics.loop_loss.length || metrics.step.length + more.step.length > 2 * POINTS) return false;
    const names = more.stages.map(name => {
      if (!metrics.stages.includes(name)) metrics.stages.push(name);
      return metrics.stages.indexOf(name);
    });
    metrics.step.push(...more.step);
    metrics.tokens.push(...more.tokens);
    metrics.stage.push(...more.stage.map(of => names[of]));
    metrics.skipped.push(...more.skipped);
    metrics.rows += more.rows;
    const bands = [...Object.keys(metrics.figures).map(name => [metrics.figures[name], more.figures[name]]), ...metrics.loop_loss.map((band, t) => [band, more.loop_loss[t]])];
    for (const [band, of] of bands) {
      band.mean.push(...of.mean);
      if (band.min) { band.min.push(...(of.min || of.mean)); band.max.push(...(of.max || of.mean)); }
    }
    metrics.exit.forEach((column, t) => column.push(...more.exit[t]));
    return true;
  };

  const COSTS = { data: '--data', checkpoint: '--checkpoint', recovery: '--bad', recomputed: '--reduce', other: '--other', paused: '--line' };
  const MEANING = {
    data: 'waiting for data', checkpoint: 'waiting for checkpoints', recovery: 'rings that re-formed', recomputed: 'steps done again', other: 'starting, and the rest', paused: 'paused',
  };

  // One job.
  const job = async name => {
    const mine = visit;
    const [first, config, metrics, events] = await Promise.all([
      ask(path(name)), ask(path(name) + '/config'), ask(`${path(name)}/metrics?points=${POINTS}`), ask(path(name) + '/events?limit=300'),
    ]);
    const { role } = await ask('jobs');
    if (mine !== visit) return;
    let detail = first, figures = metrics;
    main.replaceChildren();
    const title = el('div', main, { class: 'title' });
    el('h1', title, { text: name });
    const phase = el('span', title);
    const acts = el('div', title, { class: 'acts' });
    const why = el('p', main, { class: 'why', role: 'status' });
    const progress = el('div', main);
    const tiles = el('section', main, { class: 'tiles', 'aria-label': 'Now' });
    const recipe = section(main, 'Stages');
    const charts = section(main, 'Figures');
    const box = el('div', charts, { class: 'charts' });
    const key = el('p', charts, { class: 'key' });
    const time = section(main, 'Time of the job');
    const ring = section(main, 'Ring');
    const two = el('div', main, { class: 'two' });
    const checkpoints = section(two, 'Checkpoints');
    const log = section(two, 'Events');
    const lines = el('ol', log, { class: 'events', tabindex: 0, 'aria-label': 'Events, the newest first' });
    const rest = el('details', main);
    el('summary', rest, { text: 'Config and environment' });
    const facts = el('dl', rest);
    for (const [term, text] of [['run folder', detail.job.run], ['where', config.environment || '–'], ['config', config.digest]]) {
      el('dt', facts, { text: term });
      el('dd', facts, { text });
    }
    el('pre', rest, { text: config.toml, tabindex: 0, 'aria-label': 'The config' });

    const drawn = anelloCharts(box, tip, key, chartData(figures, config, detail.checkpoints));
    const redraw = () => drawn.update(chartData(figures, config, detail.checkpoints));

    const act = (label, action, options = {}) => {
      const button = el('button', acts, { text: label, type: 'button', class: options.danger ? 'danger' : '' });
      button.onclick = async () => {
        const answer = await dialog({ title: `${label} ${name}?`, action: label, ...options });
        if (answer === null) return;
        try {
          const body = action === 'scale' ? JSON.stringify({ workers: Number(answer) }) : undefined;
          await ask(`${path(name)}/${action}`, { method: 'POST', body });
          say(`${name}: ${options.said || `${label.toLowerCase()} is recorded`}`, 'on');
        } catch (error) {
          say(error.message, 'off');
        }
      };
    };
    let offered = '';
    const offer = () => {
      const wanted = role !== 'operator' || detail.job.over ? '' : detail.job.phase;
      if (wanted === offered) return;
      offered = wanted;
      acts.replaceChildren();
      if (!wanted) return;
      if (wanted === 'paused' || wanted === 'pausing') act('Resume', 'resume', { text: 'It goes back into the queue and on from its newest checkpoint.' });
      else act('Pause', 'pause', { text: 'It takes a checkpoint and stops until it is resumed. No step is lost.' });
      if (wanted !== 'paused') act('Checkpoint now', 'checkpoint', { text: 'The ring takes a checkpoint at its next step, beside those of its config, and goes on. The result is the same bits.', said: 'a checkpoint is asked for' });
      act('Scale', 'scale', { text: 'The ring holds at a step, and goes on with so many workers. The result is the same bits.', label: 'Workers', kind: 'number', value: String(detail.job.desired) });
      act('Cancel', 'cancel', { text: 'It stops for good. What is in its run folder stays.', danger: true });
    };

    const tile = (title, value, note, bad) => {
      const box = el('div', tiles, { class: 'tile' });
      el('span', box, { text: title });
      el('b', box, { text: value });
      el('small', box, { text: note, class: bad ? 'bad' : '' });
    };
    const last = (values, back = 1) => values && values.length >= back ? values[values.length - back] : null;
    const drawNow = () => {
      const { job } = detail;
      document.title = `${name}, ${job.phase} · Anello`;
      phase.replaceChildren();
      chip(phase, job.phase);
      why.textContent = job.reason || (job.waits_for ? 'waits for ' + job.waits_for : '');
      why.hidden = why.textContent === '';
      why.className = job.reason ? 'why bad' : 'why';
      progress.replaceChildren();
      bar(progress, job);
      tiles.replaceChildren();
      const done = (job.step || 0) / job.total_steps, tokens = last(figures.tokens);
      const planned = config.stages.reduce((sum, stage) => sum + stage.tokens, 0);
      tile('step', orDash(job.step, grouped), `of ${grouped(job.total_steps)}, ${percent(done)}`);
      tile('tokens', orDash(tokens, scaled), `of ${scaled(planned)}`);
      const losses = figures.loop_loss.map(band => last(band.mean)).filter(v => v !== null);
      tile('loss of the last loop step', nats(losses[losses.length - 1]), losses.length > 1 ? `L(1) ${nats(losses[0])}` : 'nats a token');
      tile('expected depth', orDash(last(figures.figures.depth.mean), v => v.toFixed(2)), `of ${losses.length || '–'} loop steps`);
      const left = job.tokens_per_s && tokens !== null ? (planned - tokens) / job.tokens_per_s : null;
      tile('tokens a second', orDash(job.tokens_per_s, scaled), job.over || left === null || left <= 0 ? ' ' : `${duration(left)} to go`);
      tile('goodput', detail.time ? percent(detail.time.goodput) : '–', detail.time ? `${percent(detail.time.effective)} in steps` : 'not known yet');
      if (!job.over) tile('workers', `${job.workers}`, `of ${job.desired} wanted`, job.workers < job.min);
      const newest = detail.checkpoints.filter(c => c.kept).pop();
      tile('newest checkpoint', newest ? grouped(newest.step) : '–', newest && newest.unix_ms ? utc(newest.unix_ms) : ' ');
      offer();
    };

    const drawRecipe = () => {
      recipe.querySelector('.recipe')?.remove();
      const frame = el('figure', recipe, { class: 'recipe full' });
      const width = frame.clientWidth - 32 || 900, height = 66;
      const total = config.stages.reduce((sum, stage) => sum + stage.tokens, 0);
      const now = last(figures.tokens) || 0;
      const picture = svg('svg', frame, { viewBox: `0 0 ${width} ${height}`, height, role: 'img' });
      const told = [];
      for (const stage of config.stages) {
        const x = width * stage.tokens_before / total, w = Math.max(1, width * stage.tokens / total);
        const share = Math.min(1, Math.max(0, (now - stage.tokens_before) / stage.tokens));
        told.push(`${stage.name}: ${scaled(stage.tokens)} tokens, ${percent(share)} done`);
        const block = svg('g', picture);
        svg('title', block, { text: told[told.length - 1] + `, T = ${stage.loops}, ${stage.layers} layers, sequences of ${grouped(stage.sequence)}` });
        svg('rect', block, { class: 'stage', x, y: 4, width: w, height: 40 });
        if (share > 0) svg('rect', block, { class: 'done', x, y: 4, width: w * share, height: 40 });
        if (w > 7.4 * stage.name.length + 12) svg('text', block, { class: 'name', x: x + 7, y: 21, text: stage.name });
        const note = `${scaled(stage.tokens)}, T = ${stage.loops}`;
        if (w > 6.6 * note.length + 12) svg('text', block, { x: x + 7, y: 37, text: note });
      }
      picture.setAttribute('aria-label', told.join('; '));
      if (!detail.job.over) {
        const x = Math.min(width - 1, width * now / total);
        svg('line', picture, { class: 'now', x1: x, x2: x, y1: 0, y2: 48 });
        const side = x > width - 80 ? 'end' : x < 80 ? 'start' : 'middle';
        svg('text', picture, { class: 'here', x, y: 62, 'text-anchor': side, text: `now, ${scaled(now)} tokens` });
      }
    };

    const drawTime = () => {
      time.querySelectorAll(':scope > :not(h2)').forEach(old => old.remove());
      if (!detail.time) {
        el('p', time, { class: 'note', text: 'This process has not seen the job train, so it keeps no account of its time.' });
        return;
      }
      const { wall_s, productive_s, lost_s } = detail.time;
      const parts = [['productive', productive_s, '--good', 'training'], ...Object.keys(COSTS).map(cause => [cause, lost_s[cause] || 0, COSTS[cause], MEANING[cause]])].filter(([, v]) => v > 0);
      const all = parts.reduce((sum, [, v]) => sum + v, 0) || 1;
      const strip = el('div', time, { class: 'lost', role: 'img', 'aria-label': parts.map(([, v, , text]) => `${text} ${percent(v / all)}`).join(', ') });
      const legend = el('ul', time, { class: 'legend' });
      for (const [, v, color, text] of parts) {
        const piece = el('i', strip);
        piece.style.width = (100 * v / all) + '%';
        piece.style.background = css(color);
        const item = el('li', legend);
        el('i', item).style.background = css(color);
        item.append(text);
        el('b', item, { text: `${duration(v)}, ${percent(v / all)}` });
      }
      el('p', time, { class: 'note', text: `Of ${duration(wall_s)} since this process took the job up.` });
    };

    const drawRing = () => {
      ring.querySelectorAll(':scope > :not(h2)').forEach(old => old.remove());
      const { workers, lanes, generation } = detail;
      if (workers.length === 0) {
        el('p', ring, { class: 'note', text: detail.job.over ? 'It is over: nobody trains it.' : 'No worker is here. A run of one process has no ring.' });
        return;
      }
      el('p', ring, { class: 'note', text: `Generation ${generation ?? '–'}, ${lanes} lanes. Who serves which changes no bit.` });
      const body = table(ring, ['worker', 'machine', 'lanes', 'does', 'holds step', 'a step', 'where it goes'], { caption: 'Ring', left: 4 });
      for (const worker of workers) {
        const row = el('tr', body);
        el('th', row, { scope: 'row', class: 'left mono', text: worker.worker.slice(0, 8), title: worker.worker });
        el('td', row, { class: 'left', text: worker.machine || '–' });
        const cell = el('td', row, { class: 'left' });
        const member = worker.first_lane !== null && worker.end_lane > worker.first_lane;
        const words = member ? `lanes ${worker.first_lane} to ${worker.end_lane - 1} of ${lanes}` : 'no lanes';
        const picture = svg('svg', cell, { class: 'lanes', viewBox: `0 0 ${lanes * 10} 16`, preserveAspectRatio: 'none', role: 'img', 'aria-label': words });
        svg('title', picture, { text: words });
        const gap = lanes > 64 ? 0 : 1;
        const width = lanes > 64 ? [[0, lanes, false], ...(member ? [[worker.first_lane, worker.end_lane, true]] : [])]
          : Array.from({ length: lanes }, (_, lane) => [lane, lane + 1, member && lane >= worker.first_lane && lane < worker.end_lane]);
        for (const [from, to, own] of width) {
          const idle = worker.activity === 'training' ? '' : ' idle';
          svg('rect', picture, { class: own ? 'own' + idle : 'all', x: from * 10 + gap, y: 0, width: (to - from) * 10 - 2 * gap, height: 16 });
        }
        const does = el('td', row, { class: 'left', text: worker.activity });
        if (worker.slow !== null) el('span', does, { class: 'slow', text: ` · ${worker.slow.toFixed(1)} × slow` });
        el('td', row, { text: orDash(worker.holds, grouped) });
        el('td', row, { text: seconds(worker.seconds?.step) });
        const where = el('td', row);
        if (worker.seconds) {
          const names = ['compute', 'reduce', 'update', 'data', 'checkpoint'];
          const strip = el('div', where, { class: 'spent', role: 'img', 'aria-label': names.map(n => `${n} ${seconds(worker.seconds[n])}`).join(', ') });
          for (const name of names) {
            const piece = el('i', strip, { title: `${name} ${seconds(worker.seconds[name])}` });
            piece.style.width = (100 * worker.seconds[name] / (worker.seconds.step || 1)) + '%';
            piece.style.background = css('--' + name);
          }
        }
      }
      const legend = el('ul', ring, { class: 'legend' });
      for (const name of ['compute', 'reduce', 'update', 'data', 'checkpoint']) {
        const item = el('li', legend);
        el('i', item).style.background = css('--' + name);
        item.append(name);
      }
    };

    const drawCheckpoints = () => {
      checkpoints.querySelectorAll(':scope > :not(h2)').forEach(old => old.remove());
      if (detail.checkpoints.length === 0) {
        el('p', checkpoints, { class: 'note', text: 'There is none yet.' });
        return;
      }
      const body = table(checkpoints, ['step', 'when, UTC', 'weights', ''], { caption: 'Checkpoints', left: 3 });
      checkpoints.lastElementChild.classList.add('scroll');
      for (const c of [...detail.checkpoints].reverse()) {
        const row = el('tr', body);
        el('th', row, { scope: 'row', class: 'left', text: grouped(c.step) });
        el('td', row, { class: 'left', text: c.unix_ms ? utc(c.unix_ms) : '–' });
        el('td', row, { class: 'left mono', text: c.weights ? c.weights.slice(0, 12) : '–', title: c.weights || '' });
        el('td', row, { text: c.kept ? '' : 'removed' });
      }
    };

    const line = event => {
      const item = document.createElement('li');
      if (event.bad) item.className = 'bad';
      el('time', item, { datetime: new Date(event.unix_ms).toISOString(), text: utc(event.unix_ms) });
      item.append(event.text);
      return item;
    };
    events.events.forEach(event => lines.prepend(line(event)));
    let newest = events.next;

    drawNow(); drawRecipe(); drawTime(); drawRing(); drawCheckpoints();
    say(follows ? 'live' : 'as it was', follows ? 'on' : '');
    leaves.push(() => drawn.remove());
    const resized = () => drawRecipe();
    addEventListener('resize', resized);
    leaves.push(() => removeEventListener('resize', resized));
    if (!follows || detail.job.over) {
      if (detail.job.over) say('it is over');
      return;
    }

    const whole = async () => {
      const [now, rows] = await Promise.all([ask(path(name)), ask(`${path(name)}/metrics?points=${POINTS}`)]);
      if (mine !== visit) return;
      detail = now; figures = rows;
      drawNow(); drawRecipe(); drawTime(); drawRing(); drawCheckpoints(); redraw();
    };
    stream(`${path(name)}/stream`, {
      job: now => {
        // The store is not listed for every word: what was kept is kept until we ask.
        const kept = new Set(detail.checkpoints.filter(c => c.kept).map(c => c.step));
        const known = detail.checkpoints[detail.checkpoints.length - 1]?.step ?? -1;
        const fresh = now.checkpoints.some(c => c.step > known);
        now.checkpoints.forEach(c => { c.kept = kept.has(c.step) || c.step > known; });
        detail = { ...now, checkpoints: fresh ? now.checkpoints : detail.checkpoints };
        drawNow(); drawTime(); drawRing();
        if (fresh) { drawCheckpoints(); redraw(); }
      },
      rows: more => {
        if (append(figures, more)) { drawNow(); drawRecipe(); redraw(); } else whole().catch(() => {});
      },
      record: event => {
        if (event.number <= newest) return;
        newest = event.number;
        lines.prepend(line(event));
        while (lines.children.length > 600) lines.lastElementChild.remove();
      },
      again: () => whole().catch(() => {}),
      over: () => whole().then(() => say('it is over')).catch(() => {}),
    });
    every(20000, whole);
  };

  /** Two jobs, by the tokens that they were trained on. */
  const compare = async (a, b) => {
    const of = async name => {
      const [detail, config, metrics] = await Promise.all([ask(path(name)), ask(path(name) + '/config'), ask(`${path(name)}/metrics?points=${POINTS}`)]);
      return { name, detail, config, metrics };
    };
    const mine = visit;
    const runs = await Promise.all([of(a), of(b)]);
    if (mine !== visit) return;
    main.replaceChildren();
    el('h1', main, { text: `${a} and ${b}` });
    const same = runs[0].config.digest === runs[1].config.digest;
    el('p', main, { class: 'status', text: same ? 'The same config: their figures are the same bits, but for the times.' : 'Their configs differ.' });
    // One axis for both: the points of each, and what the other has there.
    const tokens = [...new Set(runs.flatMap(run => run.metrics.tokens))].sort((x, y) => x - y);
    const at = (run, values) => {
      const own = run.metrics.tokens;
      let i = 0;
      return tokens.map(t => {
        while (i < own.length - 1 && own[i + 1] <= t) i++;
        if (own.length === 0 || t < own[0] || t > own[own.length - 1] || values[i] === null) return null;
        const next = Math.min(i + 1, own.length - 1);
        if (next === i || own[i] === t || values[next] === null) return values[i];
        return values[i] + (values[next] - values[i]) * (t - own[i]) / (own[next] - own[i]);
      });
    };
    const colors = [() => css('--t1'), () => css('--accent')];
    const lastLoop = metrics => metrics.step.map((_, at) => metrics.loop_loss.reduce((last, band) => band.mean[at] ?? last, null));
    const series = pick => runs.map((run, i) => ({ name: run.name, values: at(run, smooth(pick(run.metrics), run.metrics.stage)), color: colors[i] }));
    const longer = runs[0].metrics.tokens.length >= runs[1].metrics.tokens.length ? runs[0] : runs[1];
    const data = {
      ...chartData(longer.metrics, longer.config, []), tokens, loops: 2, checkpoints: [], skipped: [],
      step: at(longer, longer.metrics.step).map(v => Math.round(v ?? longer.metrics.step[longer.metrics.step.length - 1])),
    };
    const box = el('div', main, { class: 'charts' });
    const drawn = anelloCharts(box, tip, null, data, (_, { range, fixed, rate, rateTick, small, scaled }) => {
      const chart = (title, note, pick, format, tick, more = {}) => {
        const lines = series(pick);
        return { title, note, series: lines, domain: range(lines.map(line => line.values), 3), format, tick, ...more };
      };
      return [
        chart('Loss of the last loop step', 'nats a token, moving average within a stage', lastLoop, fixed(3), small, { full: true, height: 320 }),
        chart('Objective', 'nats a token', m => m.figures.loss.mean, fixed(3), small),
        chart('Expected depth', 'loop steps', m => m.figures.depth.mean, fixed(2), small),
        chart('Gradient norm', 'before the clip', m => m.figures.grad_norm.mean, small, small),
        chart('Learning rate', 'of each update', m => m.figures.lr.mean, rate, rateTick),
        chart('Throughput', 'tokens a second', m => m.figures.tokens_per_s.mean, scaled, scaled),
      ];
    });
    leaves.push(() => drawn.remove());
    const body = table(section(main, 'Side by side'), ['', a, b], { caption: 'Side by side' });
    const row = (title, show) => {
      const line = el('tr', body);
      el('th', line, { scope: 'row', text: title });
      runs.forEach(run => el('td', line, { text: show(run) }));
    };
    const end = values => values.length ? values[values.length - 1] : null;
    row('phase', run => run.detail.job.phase);
    row('step', run => `${orDash(run.detail.job.step, grouped)} of ${grouped(run.detail.job.total_steps)}`);
    row('tokens', run => orDash(end(run.metrics.tokens), scaled));
    row('loss of the last loop step', run => nats(end(lastLoop(run.metrics))));
    row('objective', run => nats(end(run.metrics.figures.loss.mean)));
    row('expected depth', run => orDash(end(run.metrics.figures.depth.mean), v => v.toFixed(2)));
    row('tokens a second', run => orDash(run.detail.job.tokens_per_s, scaled));
    row('goodput', run => run.detail.time ? percent(run.detail.time.goodput) : '–');
    const lines = run => run.config.toml.split('\n').filter(line => line.trim());
    const only = (one, other) => { const known = new Set(lines(other)); return lines(one).filter(line => !known.has(line)); };
    const differ = section(main, 'Where the configs differ');
    if (same || (only(runs[0], runs[1]).length === 0 && only(runs[1], runs[0]).length === 0)) el('p', differ, { class: 'note', text: 'Nowhere.' });
    else {
      const two = el('div', differ, { class: 'two' });
      runs.forEach((run, i) => {
        const side = el('div', two);
        el('p', side, { class: 'note', text: `Lines that only ${run.name} has` });
        el('pre', side, { text: only(run, runs[1 - i]).join('\n') || '–', tabindex: 0, 'aria-label': `Lines that only ${run.name} has` });
      });
    }
    say('as it was');
  };

  // Following: by fetch, since an EventSource cannot show a token.
  const stream = async (path, hear) => {
    const mine = visit;
    let over = false, pause = 500;
    while (mine === visit && !over) {
      const stop = new AbortController();
      leaves.push(() => stop.abort());
      try {
        const response = await fetch('api/v1/' + path, { headers: headers(), signal: stop.signal });
        if (!response.ok) throw new Refused(response.status, response.statusText);
        say('live', 'on');
        if (pause > 500) hear.again();
        pause = 500;
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let text = '';
        for (;;) {
          const { value, done } = await reader.read();
          if (done || mine !== visit) break;
          text += value;
          const words = text.split('\n\n');
          text = words.pop();
          for (const word of words) {
            const kind = /^event: (.*)$/m.exec(word), data = /^data: (.*)$/m.exec(word);
            if (!kind || !data) continue;
            const value = JSON.parse(data[1]);
            if (kind[1] === 'job' && value.job.over) over = true;
            hear[kind[1]]?.(value);
          }
        }
      } catch (error) {
        if (mine !== visit) return;
        if (error.status === 401) { trouble(error); return; }
      }
      if (mine !== visit) return;
      if (over) { hear.over(); return; }
      say('connecting again', 'off');
      pause = Math.min(pause * 2, 10000);
      await new Promise(resolve => setTimeout(resolve, pause));
    }
  };
  const every = (ms, act) => {
    const mine = visit;
    const timer = setInterval(() => {
      if (document.hidden || mine !== visit) return;
      act().then(() => { if (mine === visit && live.classList.contains('off')) say('live', 'on'); }).catch(() => { if (mine === visit) say('connecting again', 'off'); });
    }, ms);
    leaves.push(() => clearInterval(timer));
  };

  // Where we are.
  let visit = 0, leaves = [];
  const crumbs = document.getElementById('crumbs');
  const route = async () => {
    visit += 1;
    const mine = visit;
    leaves.forEach(leave => leave());
    leaves = [];
    const parts = location.hash.replace(/^#\/?/, '').split('/').map(decodeURIComponent);
    crumbs.replaceChildren();
    const [page, a, b] = parts;
    document.title = 'Anello';
    el('a', crumbs, { href: '#/', text: 'Jobs' });
    if (page === 'jobs' && a) el('span', crumbs, { text: '/ ' + a, 'aria-current': 'page' });
    if (page === 'compare') el('span', crumbs, { text: `/ ${a} and ${b}`, 'aria-current': 'page' });
    say('reading');
    try {
      if (page === 'jobs' && a) await job(a);
      else if (page === 'compare' && a && b) await compare(a, b);
      else await list();
    } catch (error) {
      if (mine === visit) await trouble(error);
    }
  };
  addEventListener('hashchange', () => { route().then(() => main.focus({ preventScroll: true })); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => route());
  document.querySelector('.skip').onclick = event => { event.preventDefault(); main.focus(); };
  route();
})();
