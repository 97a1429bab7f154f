//! Bilinear scaling as TensorFlow 1 does it (`ResizeBilinear` without aligned corners): pixel centres are not taken
//! into account, so that output pixel i lies at i * input / output. Fréchet Inception distances are defined by it.

use crate::images::Image;

/// Where an output pixel lies: the pixel before, the one after, and how far it is towards that.
type Place = (usize, usize, f32);

fn places(input: usize, output: usize) -> Vec<Place> {
    let scale = input as f32 / output as f32;
    (0..output)
        .map(|i| {
            let at = i as f32 * scale;
            let before = (at as usize).min(input - 1);
            (before, (before + 1).min(input - 1), at - before as f32)
        })
        .collect()
}

/// The planes R, G and B of an image scaled to `side` x `side`, [3, side, side] flattened, values (p - 128) / 128.
pub(super) fn planes(image: &Image, side: usize) -> Vec<f32> {
    let (columns, rows) = (places(image.width, side), places(image.height, side));
    let mut out = Vec::with_capacity(3 * side * side);
    for channel in 0..3 {
        let pixel = |y: usize, x: usize| f32::from(image.pixels[3 * (y * image.width + x) + channel]);
        for &(above, below, down) in &rows {
            out.extend(columns.iter().map(|&(left, right, along)| {
                let between = |y| pixel(y, left) + (pixel(y, right) - pixel(y, left)) * along;
                let (upper, lower) = (between(above), between(below));
                (upper + (lower - upper) * down - 128.0) / 128.0
            }));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_lie_where_tensorflow_puts_them() {
        // A row of 2 to 4: 0, 0.5, 1, and the last beyond the last pixel.
        let image = Image { width: 2, height: 1, pixels: vec![0, 128, 64, 128, 0, 64] };
        let out = planes(&image, 4);
        let level = |plane: usize| -> Vec<f32> {
            out[16 * plane..16 * plane + 4].iter().map(|v| v * 128.0 + 128.0).collect()
        };
        assert_eq!(level(0), [0.0, 64.0, 128.0, 128.0]);
        assert_eq!(level(1), [128.0, 64.0, 0.0, 0.0]);
        assert_eq!(out[..4], out[12..16], "all rows are the one row");
        // A size that stays is left alone.
        let same = planes(&Image { width: 2, height: 2, pixels: (0..12).collect() }, 2);
        assert_eq!(same[..4], [0.0f32, 3.0, 6.0, 9.0].map(|p| (p - 128.0) / 128.0));
    }
}
