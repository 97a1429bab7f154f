//! Alignment targets on another grid than the model's tokens.

use burn::tensor::{Tensor, TensorData};

/// Resamples features [N, T, D] of a square grid of T tokens to a square grid of `tokens` tokens, as
/// PyTorch's `interpolate(mode="bilinear", align_corners=False)` does over the grid. T and `tokens`
/// must be squares.
pub fn resample_tokens(features: Tensor<3>, tokens: usize) -> Tensor<3> {
    let [n, from, _] = features.dims();
    if from == tokens {
        return features;
    }
    let (from_side, to_side) = (from.isqrt(), tokens.isqrt());
    assert!(
        from_side * from_side == from && to_side * to_side == tokens,
        "grids of {from} and {tokens} tokens"
    );
    let axis = bilinear(from_side, to_side);
    // One matrix for both axes: [tokens, T].
    let mut matrix = vec![0.0f32; tokens * from];
    for row in 0..to_side {
        for column in 0..to_side {
            let out = &mut matrix[(row * to_side + column) * from..][..from];
            for y in 0..from_side {
                for x in 0..from_side {
                    out[y * from_side + x] = axis[row * from_side + y] * axis[column * from_side + x];
                }
            }
        }
    }
    let matrix = Tensor::<2>::from_data(TensorData::new(matrix, [tokens, from]), &features.device());
    matrix.unsqueeze::<3>().expand([n, tokens, from]).matmul(features)
}

/// Weights [to, from] of linear interpolation along an axis, pixel centres at half-integers.
fn bilinear(from: usize, to: usize) -> Vec<f32> {
    let mut weights = vec![0.0; to * from];
    for i in 0..to {
        let position = ((i as f32 + 0.5) * from as f32 / to as f32 - 0.5).max(0.0);
        let low = (position as usize).min(from - 1);
        let high = (low + 1).min(from - 1);
        let fraction = position - low as f32;
        weights[i * from + low] += 1.0 - fraction;
        weights[i * from + high] += fraction;
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn resample(values: Vec<f32>, from: usize, to: usize) -> Vec<f32> {
        let width = values.len() / from;
        let features = Tensor::<3>::from_data(TensorData::new(values, [1, from, width]), &Device::flex());
        resample_tokens(features, to).into_data().try_to_vec().expect("f32")
    }

    /// PyTorch: interpolate([[0, 1], [2, 3]], size=(4, 4), mode="bilinear", align_corners=False).
    #[test]
    fn enlarges_as_pytorch_does() {
        let expected =
            [0.0, 0.25, 0.75, 1.0, 0.5, 0.75, 1.25, 1.5, 1.5, 1.75, 2.25, 2.5, 2.0, 2.25, 2.75, 3.0];
        let ours = resample(vec![0.0, 1.0, 2.0, 3.0], 4, 16);
        for (a, b) in ours.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{ours:?}");
        }
    }

    #[test]
    fn keeps_each_feature_to_itself_and_constants_constant() {
        let features: Vec<f32> = (0..9).flat_map(|i| [7.0, i as f32]).collect();
        let ours = resample(features, 9, 4);
        assert!(ours.chunks(2).all(|token| (token[0] - 7.0).abs() < 1e-6), "{ours:?}");
        // Centres of a 2 x 2 grid lie a quarter in: rows 0.25 and 1.75 of 3.
        assert!((ours[1] - (0.25 * 3.0 + 0.25)).abs() < 1e-5, "{ours:?}");
        assert!((ours[7] - (1.75 * 3.0 + 1.75)).abs() < 1e-5, "{ours:?}");
    }
}
