//! The one family of generators: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).
//!
//! A value is a pure function of (seed, purpose, position): there is no state to carry, so a generator's place in a
//! checkpoint is an integer that the checkpoint has anyway. Purposes are streams named by a string and integers.

/// Philox4x32-10: 128 bits from a 64-bit key and a 128-bit counter.
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    let ([mut k0, mut k1], mut c) = (key, counter);
    for round in 0..10 {
        if round > 0 {
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        let (p0, p1) = (M0 * u64::from(c[0]), M1 * u64::from(c[2]));
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
    }
    c
}

/// A stream of random values addressed by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    lane: u64,
}

impl Stream {
    /// The stream of `purpose` (with the integers `place` that tell its instances apart) under the run's `seed`.
    ///
    /// The key is the seed; the purpose and place are hashed (BLAKE3) into the high half of the counter.
    pub fn new(seed: u64, purpose: &str, place: &[u64]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(purpose.len() as u64).to_le_bytes());
        hasher.update(purpose.as_bytes());
        for part in place {
            hasher.update(&part.to_le_bytes());
        }
        let digest = hasher.finalize();
        let lane = u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"));
        Self { key: [seed as u32, (seed >> 32) as u32], lane }
    }

    fn block(&self, index: u64) -> [u32; 4] {
        philox4x32(self.key, [index as u32, (index >> 32) as u32, self.lane as u32, (self.lane >> 32) as u32])
    }

    /// 64 random bits at `position`.
    pub fn u64_at(&self, position: u64) -> u64 {
        let block = self.block(position >> 1);
        let half = (position & 1) as usize * 2;
        u64::from(block[half]) | u64::from(block[half + 1]) << 32
    }

    /// A uniform value in [0, 1) at `position`, with 53 bits.
    pub fn unit_at(&self, position: u64) -> f64 {
        (self.u64_at(position) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A uniform value in `0..bound` at `position` (multiply-shift; the bias is below `bound` / 2^64).
    pub fn below_at(&self, position: u64, bound: u64) -> u64 {
        assert!(bound > 0, "a bound is at least 1");
        ((u128::from(self.u64_at(position)) * u128::from(bound)) >> 64) as u64
    }

    /// Four standard normal values at block `index`: Box–Muller on 32-bit uniforms in f64, with `libm`'s functions,
    /// which are the same on every machine.
    pub fn normals_at(&self, index: u64) -> [f32; 4] {
        let bits = self.block(index);
        let pair = |a: u32, b: u32| {
            let radius = libm::sqrt(-2.0 * libm::log((f64::from(a) + 0.5) / 4_294_967_296.0));
            let (sin, cos) = libm::sincos(std::f64::consts::TAU * (f64::from(b) / 4_294_967_296.0));
            [(radius * cos) as f32, (radius * sin) as f32]
        };
        let ([a, b], [c, d]) = (pair(bits[0], bits[1]), pair(bits[2], bits[3]));
        [a, b, c, d]
    }
}

/// A seeded permutation of `0..len` that needs no memory: a four-round Feistel network over the next even power of
/// two, walking its cycle until the value is in range (at most 4 rounds of walking on average).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permutation {
    stream: Stream,
    len: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..len` that `stream` determines.
    pub fn new(stream: Stream, len: u64) -> Self {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        Self { stream, len, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Where `index` goes. Panics unless `index < len`.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.len, "index {index} is outside 0..{}", self.len);
        let mask = (1u64 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for round in 0..4u64 {
                let mixed = self.stream.u64_at(round << 32 | right) & mask;
                (left, right) = (right, left ^ mixed);
            }
            value = left << self.half_bits | right;
            if value < self.len {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the Random123 distribution (`kat_vectors`).
    #[test]
    fn philox_matches_the_published_vectors() {
        assert_eq!(philox4x32([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_permutation_hits_every_place_once() {
        for len in [1u64, 2, 3, 5, 16, 17, 1000, 4097] {
            let permutation = Permutation::new(Stream::new(7, "test", &[len]), len);
            let mut seen = vec![false; len as usize];
            (0..len).for_each(|i| assert!(!std::mem::replace(&mut seen[permutation.at(i) as usize], true)));
        }
    }

    #[test]
    fn permutations_of_other_seeds_differ_and_are_not_the_identity() {
        let of = |seed| {
            let p = Permutation::new(Stream::new(seed, "test", &[]), 1000);
            (0..1000).map(|i| p.at(i)).collect::<Vec<_>>()
        };
        assert_ne!(of(1), of(2));
        let fixed = of(1).iter().enumerate().filter(|(i, v)| *i as u64 == **v).count();
        assert!(fixed < 12, "{fixed} of 1000 places are fixed; about 1 is expected");
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let stream = Stream::new(3, "normals", &[]);
        let values: Vec<f64> = (0..25_000).flat_map(|i| stream.normals_at(i)).map(f64::from).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.015 && (var - 1.0).abs() < 0.02, "mean {mean}, variance {var}");
    }
}
