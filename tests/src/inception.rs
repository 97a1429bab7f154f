//! Weights of Inception v3 by a formula: the published ones are 95 MB. `tests/comparisons/inception.py` has the same
//! formula, and what torch-fidelity computes with them is in the golden case of kind `inception`.

use repa_trainer::evaluate::Inception;
use repa_trainer::weights::{Dtype, RawTensor, Weights};

/// A value in 0 to 1 for each place of a tensor: SplitMix64 from FNV-1a of its name.
fn unit(name: &str) -> impl Fn(u64) -> f32 {
    let state = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    move |place| {
        let z = state.wrapping_add((place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    }
}

/// The formula's weights: kernels in +-sqrt(6 / inputs of an output), gains and variances in 0.5 to 1.5, the rest in
/// +-0.5.
pub fn weights() -> Weights {
    let mut weights = Weights::default();
    for entry in Inception::layout().entries() {
        let unit = unit(&entry.name);
        let inputs: usize = entry.shape[1..].iter().product();
        let bound = (6.0 / inputs as f64).sqrt() as f32;
        let spread = ["bn.weight", "running_var"].iter().any(|part| entry.name.ends_with(part));
        let value = |place: usize| match unit(place as u64) {
            u if spread => u + 0.5,
            u if entry.shape.len() > 1 => (2.0 * u - 1.0) * bound,
            u => u - 0.5,
        };
        let bytes = (0..entry.len()).flat_map(|place| value(place).to_le_bytes()).collect();
        let tensor = RawTensor { dtype: Dtype::F32, shape: entry.shape.clone(), bytes };
        weights.tensors.insert(entry.name.clone(), tensor);
    }
    weights
}
