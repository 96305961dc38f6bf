//! Generation with early exit, one token at a time (LOOPLM §6).
//!
//! Keys and values are kept for every loop step and layer: T·L entries a token. A token that has left the loop at step
//! m has none beyond m. In the exact mode ([`Cache::Full`]) it is taken through a later step only when a token after it
//! goes there, with all that wait at that step in one pass: so leaving early saves what nobody needs, and the logits are
//! those of the plain computation. The other modes keep one entry a layer, as the paper tries while decoding:
//!
//! ```text
//! full       K, V of (loop step, layer)            exact; T·L entries
//! last       of the last loop step computed        L entries
//! averaged   mean over the loop steps computed     L entries
//! first      of the first                          L entries; the paper finds that it ruins the model
//! ```

use std::cell::RefCell;

use anello_configs::random::Stream;
use tch::{Kind, Tensor};

use crate::model::{Angles, Model, Rotary, Tokens, attention, spread};
use crate::objective::log_exit;

/// When a token leaves the loop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Leave {
    /// At the first step m with Σ_{t<=m} p(t) >= q, 0 ..= 1.
    Mass(f64),
    /// After so many loop steps.
    Step(u32),
    /// At the first step whose hidden state is nearer than this to the one before: ‖h(t) − h(t−1)‖.
    Near(f64),
    /// Never before the last; the logits are Σ p(t)·logits(t).
    Weighted,
}

/// Which keys and values later tokens attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Those of their own loop step: exact.
    Full,
    /// One a layer: of the last loop step that was computed.
    Last,
    /// One a layer: the mean over those that were computed.
    Averaged,
    /// One a layer: of the first.
    First,
}

/// How to generate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Loop steps at most (T); may be more than the model was trained with.
    pub loops: u32,
    /// When a token leaves.
    pub leave: Leave,
    /// What later tokens see of it.
    pub cache: Cache,
    /// 0 takes the most probable token.
    pub temperature: f64,
    /// Draws from the most probable tokens whose mass reaches this, 0 ..= 1.
    pub top_p: f64,
    /// Of the draws: the same seed draws the same.
    pub seed: u64,
}

/// A generated token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub id: u32,
    /// Loop step at which the token before it left, where this one was predicted: 1..=T.
    pub exit: u32,
    /// Its probability among all tokens, before temperature.
    pub probability: f64,
}

/// One text being written.
#[derive(Debug)]
pub struct Generator<'m> {
    model: &'m Model,
    rotary: Rotary,
    options: Options,
    /// Tokens taken in.
    len: i64,
    /// Tokens whose prediction was drawn.
    drawn: u64,
    /// By loop step (one alone when the cache is shared): by layer, keys and values `[m, g, k]`.
    kept: Vec<Vec<Option<(Tensor, Tensor)>>>,
    /// By loop step: h of tokens that are through it and not through the next, `[p, d]`.
    waiting: Vec<Option<Tensor>>,
}

/// Some tokens in one loop step.
struct Pass<'a> {
    angles: Angles,
    /// By layer: what they attend to besides themselves, and at the end themselves too.
    kept: RefCell<&'a mut Vec<Option<(Tensor, Tensor)>>>,
    /// Their own, when they are not to stay.
    own: Option<RefCell<Vec<(Tensor, Tensor)>>>,
}

impl Tokens for Pass<'_> {
    fn angles(&self) -> &Angles {
        &self.angles
    }

    fn attend(&self, index: usize, q_nhk: &Tensor, k_ngk: &Tensor, v_ngk: &Tensor) -> Tensor {
        let mut kept = self.kept.borrow_mut();
        let (k, v) = match &kept[index] {
            Some((k, v)) => (Tensor::cat(&[k, k_ngk], 0), Tensor::cat(&[v, v_ngk], 0)),
            None => (k_ngk.shallow_clone(), v_ngk.shallow_clone()),
        };
        let (n, m, heads) = (q_nhk.size()[0], k.size()[0], q_nhk.size()[1]);
        let rows = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
        let (keys, values) = (rows(&spread(&k, heads)), rows(&spread(&v, heads)));
        // Row i of n is token m - n + i: it sees all before it, and itself.
        let mask = (n > 1).then(|| Tensor::ones([n, m], (Kind::Bool, q_nhk.device())).tril(m - n));
        let mixed = attention(&rows(q_nhk), &keys, &values, mask.as_ref(), false);
        match &self.own {
            None => kept[index] = Some((k, v)),
            Some(own) => own.borrow_mut().push((k_ngk.shallow_clone(), v_ngk.shallow_clone())),
        }
        mixed.squeeze_dim(0).transpose(0, 1)
    }
}

impl<'m> Generator<'m> {
    /// A generator of texts of up to `length` tokens, prompt included, with RoPE base `rope_base`. Panics when
    /// `options.loops` is 0.
    pub fn new(model: &'m Model, rope_base: f64, length: usize, options: Options) -> Self {
        assert!(options.loops > 0, "at least one loop step");
        let rotary = Rotary::new(rope_base, model.head_size(), length as i64, model.lm_head.value.device());
        let layers = model.layers.len();
        let steps = if options.cache == Cache::Full { options.loops as usize } else { 1 };
        let none = |count: usize| (0..count).map(|_| None).collect::<Vec<_>>();
        Self {
            model,
            rotary,
            options,
            len: 0,
            drawn: 0,
            kept: (0..steps).map(|_| none(layers)).collect(),
            waiting: (0..options.loops).map(|_| None).collect(),
        }
    }

    /// Takes in `ids` (at least one), and draws the token that follows. Panics past the length given.
    pub fn next(&mut self, ids: &[u32]) -> Sampled {
        assert!(!ids.is_empty(), "a token follows another");
        let (logits_v, exit) = tch::no_grad(|| match self.options.cache {
            Cache::Full => self.exactly(ids),
            _ => self.sharing(ids),
        });
        self.drawn += 1;
        self.draw(&logits_v, exit)
    }

    fn embed(&mut self, ids: &[u32]) -> Tensor {
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        self.len += ids.len() as i64;
        self.model.embed_nd(&Tensor::from_slice(&ids).to_device(self.model.lm_head.value.device()))
    }

    /// The layers once over the last `n` tokens, whose states are `h_nd`.
    fn step(
        &mut self,
        step: usize,
        h_nd: Tensor,
        own: Option<RefCell<Vec<(Tensor, Tensor)>>>,
    ) -> (Tensor, Vec<(Tensor, Tensor)>) {
        let n = h_nd.size()[0];
        let positions = Tensor::arange_start(self.len - n, self.len, (Kind::Int64, h_nd.device()));
        let angles = Angles::at(&self.rotary, &positions, self.model.kind());
        let pass = Pass { angles, kept: RefCell::new(&mut self.kept[step]), own };
        let h_nd = (0..self.model.layers.len()).fold(h_nd, |h, l| self.model.layer_nd(l, &h, &pass));
        (h_nd, pass.own.map(RefCell::into_inner).unwrap_or_default())
    }

    /// Logits after the last of `ids`, `[v]`, and the loop step that they are of.
    fn exactly(&mut self, ids: &[u32]) -> (Tensor, u32) {
        let mut h = self.embed(ids);
        let mut path = Vec::new();
        for step in 0..self.options.loops as usize {
            // Those that left here before go on now, since one is here that must see them.
            if let Some(before) = step.checked_sub(1) {
                h = self.waiting[before].take().expect("the step before has left its states");
            }
            (h, _) = self.step(step, h, None);
            path.push(h.narrow(0, h.size()[0] - 1, 1));
            self.waiting[step] = Some(match self.waiting[step].take() {
                Some(earlier) => Tensor::cat(&[&earlier, &h], 0),
                None => h.shallow_clone(),
            });
            if self.leaves(&path) {
                break;
            }
        }
        // Nobody goes on from the last loop step.
        self.waiting[self.options.loops as usize - 1] = None;
        (self.logits(&path), path.len() as u32)
    }

    /// As [`Self::exactly`] with one entry a layer for all loop steps.
    fn sharing(&mut self, ids: &[u32]) -> (Tensor, u32) {
        // A prompt needs all loop steps, each over its own keys and values.
        let prompt = self.kept[0].iter().all(Option::is_none);
        let mut h = self.embed(ids);
        let (mut path, mut computed) = (Vec::new(), Vec::<Vec<(Tensor, Tensor)>>::new());
        let mut exit = None;
        for _ in 0..self.options.loops {
            let own;
            (h, own) = self.step(0, h, Some(RefCell::new(Vec::new())));
            computed.push(own);
            if exit.is_none() {
                path.push(h.narrow(0, h.size()[0] - 1, 1));
                exit = self.leaves(&path).then_some(path.len());
            }
            if exit.is_some() && !prompt {
                break;
            }
        }
        let mean = |layer: usize, which: fn(&(Tensor, Tensor)) -> &Tensor| {
            let all: Vec<&Tensor> = computed.iter().map(|step| which(&step[layer])).collect();
            match self.options.cache {
                Cache::First => all[0].shallow_clone(),
                Cache::Averaged => Tensor::stack(&all, 0).mean_dim(0i64, false, all[0].kind()),
                Cache::Last | Cache::Full => all[all.len() - 1].shallow_clone(),
            }
        };
        let added: Vec<_> =
            (0..self.model.layers.len()).map(|l| (mean(l, |(k, _)| k), mean(l, |(_, v)| v))).collect();
        for (kept, (k, v)) in self.kept[0].iter_mut().zip(added) {
            *kept = Some(match kept.take() {
                Some((keys, values)) => (Tensor::cat(&[keys, k], 0), Tensor::cat(&[values, v], 0)),
                None => (k, v),
            });
        }
        (self.logits(&path), path.len() as u32)
    }

    /// Whether a token whose states so far are `path` (`[1, d]` each) goes no further.
    fn leaves(&self, path: &[Tensor]) -> bool {
        let step = path.len();
        if step as u32 == self.options.loops {
            return true;
        }
        match self.options.leave {
            Leave::Step(last) => step as u32 >= last,
            Leave::Mass(q) => self.exit_mass(path)[..step].iter().sum::<f64>() >= q,
            Leave::Near(distance) => {
                step > 1
                    && (&path[step - 1] - &path[step - 2]).to_kind(Kind::Double).norm().double_value(&[])
                        < distance
            }
            Leave::Weighted => false,
        }
    }

    /// p(t) of the steps of `path`; of the rest of the loop there is one more entry, when it is not at its end.
    fn exit_mass(&self, path: &[Tensor]) -> Vec<f64> {
        let more = (path.len() as u32) < self.options.loops;
        let states: Vec<&Tensor> = path.iter().chain(more.then(|| &path[path.len() - 1])).collect();
        let p = log_exit(&self.model.gate_logits(&Tensor::stack(&states, 0))).exp().reshape([-1]);
        Vec::<f64>::try_from(p.to_kind(Kind::Double)).expect("a vector of f64")
    }

    fn logits(&self, path: &[Tensor]) -> Tensor {
        if self.options.leave != Leave::Weighted {
            return self.model.logits(&path[path.len() - 1]).reshape([-1]);
        }
        let p = Tensor::from_slice(&self.exit_mass(path)).to_kind(self.model.wide()).unsqueeze(1);
        let p = p.to_device(path[0].device());
        (self.model.logits(&Tensor::cat(path, 0)) * p).sum_dim_intlist(0i64, false, self.model.wide())
    }

    fn draw(&self, logits_v: &Tensor, exit: u32) -> Sampled {
        let probabilities = logits_v.softmax(-1, Kind::Double);
        let Options { temperature, top_p, seed, .. } = self.options;
        let id = if temperature <= 0.0 {
            logits_v.argmax(0, false).int64_value(&[])
        } else {
            let tempered = (logits_v / temperature).softmax(-1, Kind::Double);
            let (sorted, order) = tempered.sort_stable(true, 0, true);
            let masses = Vec::<f64>::try_from(&sorted).expect("a vector of f64");
            let order = Vec::<i64>::try_from(&order).expect("a vector of i64");
            order[nucleus(&masses, top_p, Stream::new(seed, "sample", &[self.drawn]).unit_at(0))]
        };
        Sampled { id: id as u32, exit, probability: probabilities.double_value(&[id]) }
    }
}

/// Which of `masses`, falling, the draw `unit` in 0..1 takes, of the first of them that make up `top_p`.
fn nucleus(masses: &[f64], top_p: f64, unit: f64) -> usize {
    let mut total = 0.0;
    let kept = masses.iter().position(|mass| {
        total += mass;
        total >= top_p
    });
    let kept = kept.map_or(masses.len(), |last| last + 1);
    let mut left = unit * masses[..kept].iter().sum::<f64>();
    for (at, mass) in masses[..kept].iter().enumerate() {
        left -= mass;
        if left < 0.0 {
            return at;
        }
    }
    kept - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_takes_from_the_nucleus_in_proportion() {
        let masses = [0.5, 0.25, 0.125, 0.125];
        let drawn = |top_p, unit| nucleus(&masses, top_p, unit);
        assert_eq!(
            [0.0, 0.49, 0.5, 0.74, 0.75, 0.874, 0.875, 0.999].map(|unit| drawn(1.0, unit)),
            [0, 0, 1, 1, 2, 2, 3, 3]
        );
        assert_eq!([0.0, 0.66, 0.67, 0.999].map(|unit| drawn(0.75, unit)), [0, 0, 1, 1]);
        assert_eq!([0.0, 0.999].map(|unit| drawn(0.0, unit)), [0, 0]);
    }
}
