//! Causal attention of packed documents, compiled beforehand for GPUs of Hopper (`attention/attention.py`, by
//! `scripts/attention-kernels`): matrix units and asynchronous copies as NVRTC's C++ does not offer them without headers.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::{FAILED, Kernels, Target, dense, int};
use crate::ffi::argument::Argument::{self, Elements, F32, I32, Null};
use crate::ffi::gpu::Module;
use crate::ffi::node::with_backward;

/// The one compute capability that the code is for.
const CAPABILITY: (i32, i32) = (9, 0);

const TABLE: &str = include_str!("attention/kernels.json");

macro_rules! code {
    ($($name:literal)*) => {
        [$(($name, 64, include_bytes!(concat!("attention/", $name, "_64.cubin")).as_slice()),
           ($name, 128, include_bytes!(concat!("attention/", $name, "_128.cubin")).as_slice())),*]
    };
}

const CODE: [(&str, i64, &[u8]); 8] =
    code!["attention_forward" "attention_delta" "attention_of_queries" "attention_of_keys"];

/// A kernel, as the table has it.
#[derive(Clone, Copy, Debug, serde::Deserialize)]
struct Shape {
    head_size: i64,
    /// Tokens of a block.
    rows: usize,
    threads: u32,
    shared_bytes: u32,
}

#[derive(serde::Deserialize)]
struct Table {
    kernels: Vec<Entry>,
}

#[derive(serde::Deserialize)]
struct Entry {
    name: String,
    #[serde(flatten)]
    shape: Shape,
}

/// Every kernel with its code: name, shape, cubin.
fn compiled() -> impl Iterator<Item = (&'static str, Shape, &'static [u8])> {
    let table = serde_json::from_str::<Table>(TABLE).expect("the table was written by the script").kernels;
    CODE.into_iter().map(move |(name, head_size, code)| {
        let of = |entry: &&Entry| entry.name == name && entry.shape.head_size == head_size;
        let entry = table.iter().find(of).expect("the table has all kernels");
        (name, entry.shape, code)
    })
}

/// The kernels that a GPU has loaded, by name and head size.
#[derive(Debug)]
pub(super) struct Attention(BTreeMap<(&'static str, i64), (Shape, Module)>);

impl Attention {
    /// Loads them for `device`, of this compute capability; none where they are for others.
    ///
    /// # Errors
    /// In words: what the driver says of them.
    pub fn load(device: Device, capability: (i32, i32)) -> Result<Option<Self>, String> {
        if capability != CAPABILITY {
            return Ok(None);
        }
        let load = |(name, shape, code): (&'static str, Shape, &[u8])| {
            Module::load(device, code).map(|module| ((name, shape.head_size), (shape, module)))
        };
        compiled().map(load).collect::<Result<_, _>>().map(|loaded| Some(Self(loaded)))
    }

    fn has(&self, head_size: i64) -> bool {
        self.0.keys().any(|&(_, of)| of == head_size)
    }

    /// One kernel over `n` tokens of `heads` heads. Triton's kernels take two more pointers, to scratch memory that these do not use.
    fn launch(&self, name: &'static str, (n, heads, head_size): (i64, i64, i64), arguments: &[Argument<'_>]) {
        let (shape, module) =
            self.0.get(&(name, head_size)).expect("who asks has asked whether there are such");
        let blocks = (n as usize).div_ceil(shape.rows) as u32;
        let arguments: Vec<_> = arguments.iter().copied().chain([Null, Null]).collect();
        if blocks > 0 {
            module
                .launch(name, [blocks, heads as u32], shape.threads, shape.shared_bytes, &arguments)
                .unwrap_or_else(|cause| panic!("{FAILED}: {cause}"));
        }
    }
}

/// Where the document of each token begins and where it ends, `[n]` of int32 each.
#[derive(Debug)]
pub(crate) struct Spans {
    pub starts: Tensor,
    pub ends: Tensor,
}

impl Spans {
    /// Those of documents that begin at `starts` and of which the last one ends with the `tokens`.
    pub fn new(starts: &[u32], tokens: usize, upload: impl Fn(&[i32]) -> Tensor) -> Self {
        let ends = starts.iter().skip(1).copied().chain([tokens as u32]);
        let (mut of_starts, mut of_ends) = (Vec::new(), Vec::new());
        for (&start, end) in starts.iter().zip(ends) {
            let tokens = (end - start) as usize;
            of_starts.extend(std::iter::repeat_n(start as i32, tokens));
            of_ends.extend(std::iter::repeat_n(end as i32, tokens));
        }
        Self { starts: upload(&of_starts), ends: upload(&of_ends) }
    }
}

impl Kernels {
    fn attention_kernels(&self) -> Option<&Attention> {
        match &*self.0 {
            Target::Gpu(_, attention) => attention.as_ref(),
            #[cfg(test)]
            Target::Emulated(_) => None,
        }
    }

    /// Whether [`Kernels::attention`] is for heads like these: bf16 of 64 or 128 elements, as many of keys as of queries, on Hopper.
    pub(crate) fn attends(&self, kind: Kind, head_size: i64, heads: i64, kv_heads: i64) -> bool {
        let has = |attention: &Attention| attention.has(head_size);
        kind == Kind::BFloat16 && heads == kv_heads && self.attention_kernels().is_some_and(has)
    }

    /// RoPE and causal attention within documents: of `[queries | keys | values]`, `[n, 3·heads, k]`, to `[n, heads, k]`, with a graph when
    /// one is recorded. cos and sin are `[n, 1, k/2]`.
    pub(crate) fn attention(
        &self,
        qkv: &Tensor,
        cos_n1k: &Tensor,
        sin_n1k: &Tensor,
        spans: &Spans,
    ) -> Tensor {
        let [n, all, k] = qkv.size()[..] else {
            panic!("attention is of [n, 3 heads, k], not of {:?}", qkv.size())
        };
        let h = all / 3;
        assert!(n * all * k < i64::from(i32::MAX), "rows are counted in int32");
        let (scale, _) = scales(k);
        let (o, lse, rotated, values) = tch::no_grad(|| {
            let qkv = dense(qkv, Kind::BFloat16, &[n, all, k]);
            let rotated = self.rotated(&qkv.narrow(1, 0, 2 * h), cos_n1k, sin_n1k);
            let o = Tensor::empty([n, h, k], (Kind::BFloat16, qkv.device()));
            let lse = Tensor::empty([h, n], (Kind::Float, qkv.device()));
            let [q, key, v] = [rotated.narrow(1, 0, h), rotated.narrow(1, h, h), qkv.narrow(1, 2 * h, h)];
            self.of_attention().launch(
                "attention_forward",
                (n, h, k),
                &[
                    Elements(&o),
                    Elements(&lse),
                    Elements(&q),
                    Elements(&key),
                    Elements(&v),
                    Elements(&spans.starts),
                    I32(int(n)),
                    I32(int(2 * h * k)),
                    I32(int(2 * h * k)),
                    I32(int(3 * h * k)),
                    I32(int(h * k)),
                    F32(scale),
                ],
            );
            (o, lse, rotated, qkv)
        });
        let kernels = self.clone();
        let backward = move |g: &Tensor, saved: &[Tensor]| Vec::from([kernels.attention_backward(g, saved)]);
        let saved = [&rotated, &values, &o, &lse, cos_n1k, sin_n1k, &spans.starts, &spans.ends];
        with_backward(&o, &[qkv], &saved, Box::new(backward)).expect(FAILED)
    }

    fn of_attention(&self) -> &Attention {
        self.attention_kernels().expect("who asks has asked whether there are such")
    }

    /// The gradient of `[queries | keys | values]`, in one tensor, from that of the output and what the forward saved.
    fn attention_backward(&self, g: &Tensor, saved: &[Tensor]) -> Tensor {
        let [rotated, qkv, o, lse, cos, sin, starts, ends] = saved else { unreachable!("eight were saved") };
        let [n, h, k] = o.size()[..] else { unreachable!("it was saved as [n, heads, k]") };
        let (scale, factor) = scales(k);
        let g = dense(g, Kind::BFloat16, &[n, h, k]);
        let delta = lse.empty_like();
        let (attention, sizes) = (self.of_attention(), (n, h, k));
        let [one, two, three] = [1, 2, 3].map(|rows| I32(int(rows * h * k)));
        let tokens = I32(int(n));
        attention.launch(
            "attention_delta",
            sizes,
            &[Elements(&delta), Elements(o), Elements(&g), tokens, one, one],
        );
        let of_qkv = qkv.empty_like();
        let [of_q, of_k, of_v] = [0, 1, 2].map(|part| of_qkv.narrow(1, part * h, h));
        let [q, key, v] = [rotated.narrow(1, 0, h), rotated.narrow(1, h, h), qkv.narrow(1, 2 * h, h)];
        let inputs =
            [Elements(&g), Elements(&q), Elements(&key), Elements(&v), Elements(lse), Elements(&delta)];
        let given = [one, two, two, three, F32(scale), F32(factor)];
        let of_queries = [&[Elements(&of_q)], &inputs[..], &[Elements(starts), tokens, three], &given];
        attention.launch("attention_of_queries", sizes, &of_queries.concat());
        let of_keys = [
            &[Elements(&of_k), Elements(&of_v)],
            &inputs[..],
            &[Elements(ends), tokens, three, three],
            &given,
        ];
        attention.launch("attention_of_keys", sizes, &of_keys.concat());
        self.rotate_back(&of_qkv.narrow(1, 0, 2 * h), cos, sin);
        of_qkv
    }
}

/// What products of queries and keys are multiplied by, for powers of 2 and of e.
fn scales(head_size: i64) -> (f32, f32) {
    let factor = (head_size as f64).sqrt().recip();
    ((factor * std::f64::consts::LOG2_E) as f32, factor as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_kernel_and_the_code_is_that_of_hopper() {
        let table: Table = serde_json::from_str(TABLE).unwrap();
        assert_eq!(table.kernels.len(), CODE.len());
        for (name, shape, code) in compiled() {
            assert!(shape.rows.is_power_of_two() && shape.threads.is_multiple_of(32), "{name}: {shape:?}");
            assert!(shape.shared_bytes <= 227 << 10, "{name}: {shape:?}");
            assert_eq!(&code[..4], b"\x7fELF");
            assert!(code.windows(name.len()).any(|window| window == name.as_bytes()), "{name}");
        }
        assert!(Attention::load(Device::Cuda(0), (8, 0)).unwrap().is_none());
    }

    #[test]
    fn spans_are_those_of_the_documents() {
        let spans = Spans::new(&[0, 1, 4], 6, Tensor::from_slice);
        let values = |x: &Tensor| Vec::<i32>::try_from(x).unwrap();
        assert_eq!(values(&spans.starts), [0, 1, 1, 1, 4, 4]);
        assert_eq!(values(&spans.ends), [1, 4, 4, 4, 6, 6]);
    }
}
