//! Images on the host: decoding, cropping and resampling as the reference's tools do it.

mod resample;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};

pub use resample::{center_crop, resize_bicubic_pillow, resize_box};

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be opened or read.
    #[error("cannot read image {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The bytes are not a PNG or JPEG image, or are damaged.
    #[error("{path} is not a readable PNG or JPEG image: {problem}; replace it or take it out of the folder")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// An RGB image, 8 bits a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Rows top to bottom, pixels left to right, R G B: `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

impl Image {
    /// Reads a PNG or JPEG file. The content decides which it is, not the name. As Pillow's
    /// `convert("RGB")`: grey becomes three equal channels, and transparency is dropped.
    ///
    /// # Errors
    /// The file cannot be read, or is no sound image.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let bytes = std::fs::read(path).map_err(|source| ImageError::Io { path: path.to_owned(), source })?;
        Self::decode(path, &bytes)
    }

    /// Decodes a PNG or JPEG file in memory; `path` is for messages.
    ///
    /// # Errors
    /// The bytes are no sound image.
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Self, ImageError> {
        Self::from_bytes(bytes).map_err(|problem| ImageError::Format { path: path.to_owned(), problem })
    }

    /// Decodes a PNG or JPEG file in memory.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let decoded = image::load_from_memory(bytes).map_err(|e| e.to_string())?.into_rgb8();
        let (width, height) = (decoded.width() as usize, decoded.height() as usize);
        Ok(Self { width, height, pixels: decoded.into_raw() })
    }

    /// Mirrors it left to right.
    pub fn mirror(&mut self) {
        for row in self.pixels.chunks_exact_mut(3 * self.width.max(1)) {
            row.as_chunks_mut::<3>().0.reverse();
        }
    }
}

/// Images of one size as one tensor [N, 3, H, W] in [-1, 1] (p / 127.5 - 1). No images, or images
/// of several sizes, are a programming error and panic.
pub fn to_tensor(images: &[Image], device: &Device) -> Tensor<4> {
    let (width, height) = (images[0].width, images[0].height);
    let mut values = Vec::with_capacity(images.len() * 3 * width * height);
    for image in images {
        assert_eq!((image.width, image.height), (width, height), "images of several sizes in one batch");
        for channel in 0..3 {
            values.extend(image.pixels.iter().skip(channel).step_by(3).map(|&p| f32::from(p) / 127.5 - 1.0));
        }
    }
    Tensor::from_data(TensorData::new(values, [images.len(), 3, height, width]), device)
}

/// A tensor [N, 3, H, W] in [-1, 1] as images: clamped, rounded to the nearest of 256 levels.
pub fn from_tensor(images: Tensor<4>) -> Vec<Image> {
    in_levels(images, |v| ((v + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8)
}

/// The same, down to the next level: what the reference's `generate.py` does for evaluators (ADM's and SiT's samplers
/// round). On average half a level darker.
pub fn truncated(images: Tensor<4>) -> Vec<Image> {
    in_levels(images, |v| (255.0 * ((v + 1.0) / 2.0)).clamp(0.0, 255.0) as u8)
}

fn in_levels(images: Tensor<4>, level: fn(f32) -> u8) -> Vec<Image> {
    let [_, channels, height, width] = images.dims();
    assert_eq!(channels, 3, "an RGB image has three channels");
    let data = images.into_data().convert::<f32>();
    let values = data.as_slice::<f32>().expect("converted to f32 above");
    let plane = width * height;
    values
        .chunks_exact(3 * plane)
        .map(|planes| {
            let pixels = (0..3 * plane).map(|i| level(planes[i % 3 * plane + i / 3])).collect();
            Image { width, height, pixels }
        })
        .collect()
}

/// Mean squared difference of two images of one size, in squared levels of 0..=255.
pub fn mean_squared_error(a: &Image, b: &Image) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height), "images of different sizes");
    let sum: u64 = a.pixels.iter().zip(&b.pixels).map(|(&x, &y)| u64::from(x.abs_diff(y)).pow(2)).sum();
    sum as f64 / a.pixels.len() as f64
}

/// Peak signal-to-noise ratio in dB of a mean squared error of 8-bit levels.
pub fn psnr(mean_squared_error: f64) -> f64 {
    10.0 * (255.0f64 * 255.0 / mean_squared_error).log10()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder};
    use proptest::prelude::*;

    #[test]
    fn evaluators_get_levels_cut_off() {
        // 0.7 and 254.9 of 255, and beyond both ends.
        let values = [0.7f32, 254.9, -3.0, 300.0].map(|level| level / 127.5 - 1.0);
        let tensor =
            Tensor::<1>::from_data(values, &Device::flex()).reshape([1, 1, 1, 4]).repeat(&[1, 3, 1, 1]);
        let levels = |images: Vec<Image>| images[0].pixels.iter().copied().step_by(3).collect::<Vec<u8>>();
        assert_eq!(levels(truncated(tensor.clone())), [0, 254, 0, 255]);
        assert_eq!(levels(from_tensor(tensor)), [1, 255, 0, 255]);
    }

    fn png(width: u32, height: u32, pixels: &[u8], colour: ExtendedColorType) -> Vec<u8> {
        let mut bytes = vec![];
        image::codecs::png::PngEncoder::new(&mut bytes)
            .write_image(pixels, width, height, colour)
            .expect("an image in memory");
        bytes
    }

    #[test]
    fn a_png_is_read_back_and_transparency_is_dropped() {
        let pixels = [1, 2, 3, 0, 250, 251, 252, 255];
        let bytes = png(2, 1, &pixels, ExtendedColorType::Rgba8);
        let image = Image::decode(Path::new("a.png"), &bytes).expect("a PNG");
        assert_eq!(image, Image { width: 2, height: 1, pixels: vec![1, 2, 3, 250, 251, 252] });
    }

    #[test]
    fn a_broken_file_is_named() {
        let bytes = png(8, 8, &[7; 192], ExtendedColorType::Rgb8);
        for broken in [&b"not an image"[..], &bytes[..bytes.len() / 2], &[]] {
            let error = Image::decode(Path::new("x/broken.png"), broken).expect_err("no image").to_string();
            assert!(error.contains("x/broken.png"), "{error}");
        }
        let error = Image::open(Path::new("no/such.png")).expect_err("no file").to_string();
        assert!(error.contains("no/such.png"), "{error}");
    }

    #[test]
    fn tensors_and_images_go_there_and_back() {
        let images: Vec<Image> = (0..2)
            .map(|n| Image { width: 5, height: 3, pixels: (0..45).map(|i| (i * 5 + n * 17) as u8).collect() })
            .collect();
        let tensor = to_tensor(&images, &Device::flex());
        assert_eq!(tensor.dims(), [2, 3, 3, 5]);
        assert_eq!(from_tensor(tensor), images);
    }

    #[test]
    fn psnr_of_one_level_is_48_db() {
        let a = Image { width: 1, height: 1, pixels: vec![10, 20, 30] };
        let b = Image { width: 1, height: 1, pixels: vec![11, 19, 31] };
        assert!((psnr(mean_squared_error(&a, &b)) - 48.1308).abs() < 1e-4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn damaged_files_are_errors_or_images(at in 0usize..200, value: u8, cut in 0usize..200) {
            let mut bytes = png(8, 8, &[7; 192], ExtendedColorType::Rgb8);
            let length = bytes.len();
            bytes[at % length] = value;
            bytes.truncate(length - cut % length);
            if let Ok(image) = Image::decode(Path::new("a.png"), &bytes) {
                prop_assert_eq!(image.pixels.len(), image.width * image.height * 3);
            }
        }
    }
}
