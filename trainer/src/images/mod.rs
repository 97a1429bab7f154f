//! Images on the host: decoding, cropping and resampling as the reference's tools do it.

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
