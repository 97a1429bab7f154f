//! Resampling as Pillow 13 does it (`Resample.c`): separable, coefficients and sums in fixed point,
//! 8-bit values between the passes. Usually the horizontal pass comes first (earlier versions always
//! begin with it); [`vertical_first`] has the exception.

use std::ops::Range;

use super::Image;

/// Fraction bits of a coefficient: 32, less 8 for the value and 2 for coefficients beyond one.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// A resampling filter: Pillow's `BOX` or `BICUBIC` (a = -0.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filter {
    Box,
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Box => 0.5,
            Filter::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        match self {
            Filter::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Filter::Bicubic => {
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
        }
    }
}

/// Pillow's `resize((width, height), BICUBIC)`, to the bit.
pub fn resize_bicubic_pillow(image: &Image, width: usize, height: usize) -> Image {
    resize(image, [width, height], Filter::Bicubic, [0..width, 0..height])
}

/// Pillow's `resize((width, height), BOX)`, to the bit.
pub fn resize_box(image: &Image, width: usize, height: usize) -> Image {
    resize(image, [width, height], Filter::Box, [0..width, 0..height])
}

/// ADM's centre crop (`center_crop_arr` of `guided_diffusion/image_datasets.py`): halved by `BOX`
/// while the shorter side is at least twice `size`, then resized by `BICUBIC` so that it is `size`,
/// then cropped from the middle to `size` x `size`. An empty image, or a `size` of 0, is a
/// programming error and panics.
pub fn center_crop(image: &Image, size: usize) -> Image {
    assert!(size > 0 && image.width > 0 && image.height > 0, "nothing to crop to or from");
    let mut halved = None::<Image>;
    loop {
        let image = halved.as_ref().unwrap_or(image);
        if image.width.min(image.height) < 2 * size {
            break;
        }
        halved = Some(resize_box(image, image.width / 2, image.height / 2));
    }
    let image = halved.as_ref().unwrap_or(image);
    let scale = size as f64 / image.width.min(image.height) as f64;
    // Python's round takes halves to the even neighbour.
    let scaled = |side: usize| (side as f64 * scale).round_ties_even() as usize;
    let (width, height) = (scaled(image.width), scaled(image.height));
    let middle = |side: usize| (side - size) / 2..(side - size) / 2 + size;
    // Only the crop is computed: a very long image would grow to its length times `scale`.
    resize(image, [width, height], Filter::Bicubic, [middle(width), middle(height)])
}

/// The part `window` (columns, rows) of the image resampled to `size` (width, height).
fn resize(image: &Image, size: [usize; 2], filter: Filter, window: [Range<usize>; 2]) -> Image {
    let [columns, rows] = window;
    // Pillow skips a pass that does not change the size.
    let pass = |input: usize, output: usize, window: &Range<usize>| {
        if input == output {
            window.clone().map(|at| Taps { first: at, weights: vec![1 << PRECISION_BITS] }).collect()
        } else {
            taps(input, output, filter, window.clone())
        }
    };
    let horizontal: Vec<Taps> = pass(image.width, size[0], &columns);
    let vertical: Vec<Taps> = pass(image.height, size[1], &rows);
    let whole = Plane { width: image.width, left: 0, top: 0, pixels: &image.pixels };
    let pixels = if vertical_first([image.width, image.height], size) {
        let needed = extent(&horizontal);
        let between = pass_vertical(&whole, needed.clone(), &vertical);
        let between = Plane { width: needed.len(), left: needed.start, top: 0, pixels: &between };
        pass_horizontal(&between, 0..rows.len(), &horizontal)
    } else {
        let needed = extent(&vertical);
        let between = pass_horizontal(&whole, needed.clone(), &horizontal);
        let between = Plane { width: columns.len(), left: 0, top: needed.start, pixels: &between };
        pass_vertical(&between, 0..columns.len(), &vertical)
    };
    Image { width: columns.len(), height: rows.len(), pixels }
}

/// Whether Pillow 13 takes the vertical pass first when it resizes `from` (width, height) to `to`:
/// where that takes away more than twice as many rows as the other takes away columns. This was
/// read off Pillow's results: it held in all 388 of 400 random cases in which the order shows.
fn vertical_first(from: [usize; 2], to: [usize; 2]) -> bool {
    let removed = |axis: usize| from[axis] as i64 - to[axis] as i64;
    removed(1) > 0 && removed(1) > 2 * removed(0)
}

/// The part of an image that a pass needs: its left upper pixel is the image's (left, top).
struct Plane<'a> {
    width: usize,
    left: usize,
    top: usize,
    pixels: &'a [u8],
}

/// The input positions from the first that any output needs to the last.
fn extent(taps: &[Taps]) -> Range<usize> {
    let first = taps.iter().map(|t| t.first).min().unwrap_or(0);
    first..taps.iter().map(|t| t.first + t.weights.len()).max().unwrap_or(first)
}

/// The rows `rows`, each resampled.
fn pass_horizontal(from: &Plane, rows: Range<usize>, taps: &[Taps]) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len() * taps.len() * 3);
    for row in rows {
        let row = &from.pixels[(row - from.top) * from.width * 3..][..from.width * 3];
        for taps in taps {
            let pixels = &row[(taps.first - from.left) * 3..];
            out.extend((0..3).map(|channel| taps.sum(pixels, channel, 3)));
        }
    }
    out
}

/// The columns `columns`, each resampled.
fn pass_vertical(from: &Plane, columns: Range<usize>, taps: &[Taps]) -> Vec<u8> {
    let mut out = Vec::with_capacity(columns.len() * taps.len() * 3);
    for taps in taps {
        let rows = &from.pixels[(taps.first - from.top) * from.width * 3..];
        let values = (columns.start - from.left) * 3..(columns.end - from.left) * 3;
        out.extend(values.map(|at| taps.sum(rows, at, from.width * 3)));
    }
    out
}

/// The input pixels that one output pixel is made of.
struct Taps {
    first: usize,
    /// Fixed-point, [`PRECISION_BITS`] after the point.
    weights: Vec<i32>,
}

impl Taps {
    /// Over values that begin with these pixels' and are `step` apart, at `offset` within a pixel.
    fn sum(&self, line: &[u8], offset: usize, step: usize) -> u8 {
        let half = 1i64 << (PRECISION_BITS - 1);
        let sum: i64 = self
            .weights
            .iter()
            .enumerate()
            .map(|(i, &w)| i64::from(w) * i64::from(line[offset + i * step]))
            .sum();
        ((sum + half) >> PRECISION_BITS).clamp(0, 255) as u8
    }
}

/// Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc`.
fn taps(input: usize, output: usize, filter: Filter, window: Range<usize>) -> Vec<Taps> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    window
        .map(|at| {
            let centre = (at as f64 + 0.5) * scale;
            // The casts cut towards zero, and to zero below it, as Pillow's do.
            let first = ((centre - support + 0.5) as usize).min(input - 1);
            let end = ((centre + support + 0.5) as usize).clamp(first + 1, input);
            let weights: Vec<f64> =
                (first..end).map(|i| filter.at((i as f64 - centre + 0.5) * (1.0 / stretch))).collect();
            let total: f64 = weights.iter().sum();
            let fixed = |w: &f64| {
                let w = if total == 0.0 { *w } else { w / total } * f64::from(1 << PRECISION_BITS);
                (w + 0.5f64.copysign(w)) as i32
            };
            Taps { first, weights: weights.iter().map(fixed).collect() }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(width: usize, height: usize) -> Image {
        let pixels = (0..width * height * 3).map(|i| ((i * 2_654_435_761) >> 11) as u8).collect();
        Image { width, height, pixels }
    }

    #[test]
    fn halving_by_box_takes_means_of_four() {
        let image = Image { width: 2, height: 2, pixels: vec![0, 10, 20, 4, 10, 21, 8, 10, 20, 12, 10, 21] };
        assert_eq!(resize_box(&image, 1, 1).pixels, vec![6, 10, 21]);
    }

    #[test]
    fn a_flat_image_stays_flat() {
        let flat = Image { width: 37, height: 23, pixels: vec![201; 37 * 23 * 3] };
        assert!(resize_bicubic_pillow(&flat, 64, 11).pixels.iter().all(|&p| p == 201));
        assert!(center_crop(&flat, 9).pixels.iter().all(|&p| p == 201));
    }

    /// As Pillow 13's results show it.
    #[test]
    fn the_order_of_the_passes_is_pillows() {
        assert!(vertical_first([70, 150], [35, 75]) && !vertical_first([70, 140], [35, 70]));
        assert!(vertical_first([60, 90], [80, 89]) && !vertical_first([60, 90], [80, 98]));
    }

    #[test]
    fn the_same_size_is_a_copy() {
        let image = noise(31, 17);
        assert_eq!(resize_bicubic_pillow(&image, 31, 17), image);
    }

    #[test]
    fn the_crop_of_a_wide_image_is_its_middle() {
        let image = noise(50, 20);
        let crop = center_crop(&image, 20);
        for row in 0..20 {
            let from = (row * 50 + 15) * 3;
            assert_eq!(crop.pixels[row * 60..(row + 1) * 60], image.pixels[from..from + 60]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn odd_sizes_give_the_size_asked_for(width in 1usize..200, height in 1usize..200, size in 1usize..80) {
            let crop = center_crop(&noise(width, height), size);
            prop_assert_eq!((crop.width, crop.height, crop.pixels.len()), (size, size, size * size * 3));
        }

        #[test]
        fn a_crop_is_cut_from_the_whole(width in 1usize..60, height in 1usize..60, size in 40usize..60) {
            let image = noise(width, height);
            prop_assume!(width.min(height) < 2 * size);
            let scale = size as f64 / width.min(height) as f64;
            let scaled = |side: usize| (side as f64 * scale).round_ties_even() as usize;
            let whole = resize_bicubic_pillow(&image, scaled(width), scaled(height));
            let crop = center_crop(&image, size);
            let (left, top) = ((whole.width - size) / 2, (whole.height - size) / 2);
            for row in 0..size {
                let from = ((top + row) * whole.width + left) * 3;
                prop_assert_eq!(
                    &crop.pixels[row * size * 3..(row + 1) * size * 3],
                    &whole.pixels[from..from + size * 3]
                );
            }
        }
    }
}
