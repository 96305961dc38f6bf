//! The words that a config uses for closed choices.

use std::fmt;

use crate::run::{Dtype, LaneShares, Loss, Mask, OnCorrupt, OnSpike, Recompute, Trains, Transport};

/// A closed choice with its words.
pub(crate) trait Named: Copy + PartialEq + 'static {
    const NAMES: &'static [(&'static str, Self)];
}

macro_rules! named {
    ($($kind:ident { $($word:literal => $variant:ident),+ $(,)? })+) => {$(
        impl Named for $kind {
            const NAMES: &'static [(&'static str, Self)] = &[$(($word, Self::$variant)),+];
        }

        impl $kind {
            /// The word that a config uses for it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    )+};
}

named! {
    Dtype { "fp32" => Fp32, "bf16" => Bf16 }
    Recompute { "none" => None, "layer" => Layer, "loop" => Loop }
    LaneShares { "balanced" => Balanced, "by-speed" => BySpeed }
    Transport { "tcp" => Tcp, "nccl" => Nccl }
    OnCorrupt { "fail" => Fail, "skip" => Skip }
    OnSpike { "off" => Off, "log" => Log, "skip" => Skip, "rollback" => Rollback }
    Mask { "document" => Document, "causal" => Causal }
    Trains { "all" => All, "gate" => Gate }
    Loss { "loop" => Loop, "gate" => Gate, "sft" => Sft }
}

/// The shape of a learning-rate curve, without its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Curve {
    Constant,
    Linear,
    Cosine,
    Wsd,
}

impl Named for Curve {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("constant", Self::Constant),
        ("linear", Self::Linear),
        ("cosine", Self::Cosine),
        ("wsd", Self::Wsd),
    ];
}

/// The closest of `candidates`, if it is close enough to have been meant: one slip in three letters, where a swap of
/// neighbours is one slip.
pub(crate) fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(slips, candidate)| *slips <= (candidate.chars().count() / 3).max(1))
        .min_by_key(|(slips, _)| *slips)
        .map(|(_, candidate)| candidate)
}

/// Letters, digits, `-` and `_`: what names of runs, stages and sources are made of.
pub(crate) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 64
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// What [`is_name`] accepts, in words.
pub(crate) const A_NAME: &str = "1 to 64 letters, digits, `-` and `_`";
