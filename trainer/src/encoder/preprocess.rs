//! From images to an encoder's input, as the reference's `preprocess_raw_image` does it: scale to
//! [0, 1], normalise by the encoder's own statistics, then resize by 224/256 where the encoder was
//! trained at 224 pixels.

use burn::tensor::{Device, Tensor, TensorData};

use super::EncoderError;
use super::resample::{Bicubic, plain_taps};
use crate::images::Image;

/// What an encoder wants done to an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocess {
    /// Channel means, of values in [0, 1].
    pub mean: [f32; 3],
    /// Channel standard deviations, of values in [0, 1].
    pub std: [f32; 3],
    /// The input's size over the image's, as a fraction; `None` leaves the image's size.
    pub resize: Option<(usize, usize)>,
}

impl Preprocess {
    /// DINOv2: ImageNet's statistics, 256 -> 224.
    pub const DINOV2: Self =
        Self { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], resize: Some((224, 256)) };

    /// The encoder's input size for images of `resolution` pixels, if it is a whole number.
    pub fn input_size(&self, resolution: usize) -> Option<usize> {
        let Some((to, from)) = self.resize else { return Some(resolution) };
        let scaled = resolution * to;
        (scaled.is_multiple_of(from) && scaled > 0).then(|| scaled / from)
    }

    /// [`Preprocess::apply`] for one image on the host, without a tensor: writes [3, S, S] to `out`. For
    /// loader threads, which do it for every image.
    ///
    /// # Errors
    /// As for [`Preprocess::apply`].
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn apply_to(&self, image: &Image, out: &mut [f32]) -> Result<(), EncoderError> {
        let (width, height) = (image.width, image.height);
        if height != width {
            return Err(EncoderError::NotSquare { height, width });
        }
        let size = self.input_size(height).ok_or(EncoderError::Fraction { resolution: height })?;
        assert_eq!(out.len(), 3 * size * size, "the buffer for an input");
        let taps: Vec<_> = (0..size).map(|i| plain_taps(i, height, size)).collect();
        let mut plane = vec![0.0f32; height * height];
        let mut wide = vec![0.0f32; height * size];
        for (channel, out) in out.chunks_exact_mut(size * size).enumerate() {
            let level = |p: u8| (f32::from(p) / 255.0 - self.mean[channel]) / self.std[channel];
            let levels: [f32; 256] = std::array::from_fn(|p| level(p as u8));
            let resized = size != height;
            let normalised = if resized { &mut plane[..] } else { &mut *out };
            for (to, pixel) in normalised.iter_mut().zip(image.pixels.as_chunks::<3>().0) {
                *to = levels[usize::from(pixel[channel])];
            }
            if !resized {
                continue;
            }
            for (to, from) in wide.chunks_exact_mut(size).zip(plane.chunks_exact(height)) {
                for (to, taps) in to.iter_mut().zip(&taps) {
                    *to = taps.iter().map(|&(at, weight)| from[at] * weight).sum();
                }
            }
            for (to, taps) in out.chunks_exact_mut(size).zip(&taps) {
                to.fill(0.0);
                for &(row, weight) in taps {
                    for (to, from) in to.iter_mut().zip(&wide[row * size..][..size]) {
                        *to += from * weight;
                    }
                }
            }
        }
        Ok(())
    }

    /// [N, 3, R, R] in 0..255 -> normalised [N, 3, S, S], S = `input_size(R)`.
    ///
    /// # Errors
    /// The images are not square, or `R` scales to no whole number of pixels.
    pub fn apply(&self, images: Tensor<4>) -> Result<Tensor<4>, EncoderError> {
        let [_, _, height, width] = images.dims();
        if height != width {
            return Err(EncoderError::NotSquare { height, width });
        }
        let size = self.input_size(height).ok_or(EncoderError::Fraction { resolution: height })?;
        let device = images.device();
        let channel = |values: [f32; 3]| Tensor::<1>::from_data(values, &device).reshape([1, 3, 1, 1]);
        let normalised = (images / 255.0 - channel(self.mean)) / channel(self.std);
        Ok(Bicubic::Plain.resize(normalised, size, size))
    }
}

/// Images of one size as a tensor [N, 3, R, R] of values 0..255.
///
/// # Errors
/// The list is empty, or the sizes differ.
pub fn to_tensor(images: &[Image], device: &Device) -> Result<Tensor<4>, EncoderError> {
    let first = images.first().ok_or(EncoderError::NoImages)?;
    let (width, height) = (first.width, first.height);
    let plane = width * height;
    let mut values = vec![0.0f32; images.len() * 3 * plane];
    for (number, (image, out)) in images.iter().zip(values.chunks_exact_mut(3 * plane)).enumerate() {
        if (image.width, image.height) != (width, height) {
            return Err(EncoderError::MixedSizes {
                number,
                found: (image.width, image.height),
                first: (width, height),
            });
        }
        for (i, pixel) in image.pixels.as_chunks::<3>().0.iter().enumerate() {
            for (channel, &value) in pixel.iter().enumerate() {
                out[channel * plane + i] = f32::from(value);
            }
        }
    }
    Ok(Tensor::from_data(TensorData::new(values, [images.len(), 3, height, width]), device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn the_host_form_is_the_tensor_form(seed: u64, eighths in 1usize..12, resize: bool) {
            let side = eighths * 8;
            let preprocess = Preprocess { resize: resize.then_some((224, 256)), ..Preprocess::DINOV2 };
            let pixels = (0..3 * side * side).map(|i| ((i as u64 * 37).wrapping_add(seed).wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            let image = Image { width: side, height: side, pixels };
            let device = Device::flex();
            let plain = preprocess.apply(to_tensor(std::slice::from_ref(&image), &device).unwrap()).unwrap();
            let plain = plain.into_data().try_to_vec::<f32>().unwrap();
            let mut host = vec![9.0; plain.len()];
            preprocess.apply_to(&image, &mut host).unwrap();
            let worst = host.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            prop_assert!(worst < 2e-5, "{worst}");
        }
    }
}
