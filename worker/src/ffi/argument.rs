//! What kernels are given, on a GPU and in its stand-in.

use tch::Tensor;

/// A value that a kernel is given.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument<'a> {
    /// Where the elements of a contiguous tensor lie, or those of one whose kernel is told of its gaps.
    Elements(&'a Tensor),
    /// No tensor.
    Null,
    /// `float`
    F32(f32),
    /// `int`
    I32(i32),
    /// `long long`
    I64(i64),
}

impl Argument<'_> {
    /// As it lies in memory, in the first bytes of eight.
    fn bits(self) -> u64 {
        match self {
            Self::Elements(tensor) => tensor.data_ptr() as u64,
            Self::Null => 0,
            Self::F32(value) => u64::from(value.to_bits()),
            Self::I32(value) => u64::from(value.cast_unsigned()),
            Self::I64(value) => value.cast_unsigned(),
        }
    }
}

const _: () = assert!(cfg!(target_endian = "little"), "the first bytes of eight are the low ones");

/// The arguments of a launch as C takes them: the place of each.
pub(super) struct Packed {
    /// What the places are in.
    _values: Vec<u64>,
    places: Vec<*mut u64>,
}

impl Packed {
    pub fn new(arguments: &[Argument<'_>]) -> Self {
        let mut values: Vec<u64> = arguments.iter().map(|argument| argument.bits()).collect();
        let places = values.iter_mut().map(|value| &raw mut *value).collect();
        Self { _values: values, places }
    }

    /// They are good for as long as this lives.
    pub fn places(&mut self) -> *mut *mut u64 {
        self.places.as_mut_ptr()
    }
}
