//! 3x3 convolution, stride 1, padding 1, as nine matrix products over shifted views of the padded
//! image: no patches are copied. A row of a padded plane has W + 2 elements; products run over whole
//! padded rows, and their last two columns are dropped.

use std::mem::MaybeUninit;

use super::{Matrix, each, multiply_add, vector};

/// Sizes of a convolution over images [samples, inputs, height, width].
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub samples: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub height: usize,
    pub width: usize,
}

impl Sizes {
    fn pixels(self) -> usize {
        self.height * self.width
    }

    /// Elements of a padded row.
    fn row(self) -> usize {
        self.width + 2
    }

    /// Elements of a padded plane.
    fn plane(self) -> usize {
        (self.height + 2) * self.row()
    }

    /// Positions of a product: the rows of the output, at the padded width.
    fn positions(self) -> usize {
        self.height * self.row()
    }

    fn work(self) -> usize {
        self.samples * self.pixels() * self.inputs * self.outputs * 9
    }
}

/// The planes of an image with a border of zeros. Two more elements follow, which the dropped columns
/// of the last row read.
fn padded(image: &[f32], sizes: Sizes) -> Vec<f32> {
    let channels = image.len() / sizes.pixels();
    let mut out = vec![0.0; channels * sizes.plane() + 2];
    for (plane, source) in out.chunks_exact_mut(sizes.plane()).zip(image.chunks_exact(sizes.pixels())) {
        let rows = plane.chunks_exact_mut(sizes.row()).skip(1);
        for (row, source) in rows.zip(source.chunks_exact(sizes.width)) {
            row[1..=sizes.width].copy_from_slice(source);
        }
    }
    out
}

/// out = x (*) weight + bias for x [samples, inputs, height, width]. The matrix `tap(k)` is [inputs,
/// outputs], the weights of the k-th of the nine positions.
///
/// # Safety
/// The matrices of `tap` have that size, are initialised, and nothing writes them meanwhile.
pub(super) unsafe fn correlate(
    sizes: Sizes,
    x: &[f32],
    tap: impl Fn(usize) -> Matrix + Sync + Send,
    bias: Option<&[f32]>,
    out: &mut [MaybeUninit<f32>],
) {
    let Sizes { samples, inputs, outputs, .. } = sizes;
    let positions = sizes.positions();
    let parallel = samples == 1 && sizes.work() >= 9 * 192 * 192 * 192;
    let images = x.chunks(inputs * sizes.pixels()).zip(out.chunks_mut(outputs * sizes.pixels()));
    each(images.collect(), sizes.work(), |(x, out)| {
        let x = padded(x, sizes);
        // SAFETY: the first product initialises all of the sums, which are positions x outputs, planes
        // one after another. The last element that tap k reads lies at most two beyond the last plane,
        // where `padded` has room.
        let sums = unsafe {
            vector(positions * outputs, |sums| {
                let sums = Matrix { first: sums.as_mut_ptr().cast(), rows: 1, columns: positions as isize };
                for k in 0..9 {
                    let shift = k / 3 * sizes.row() + k % 3;
                    let first = x[shift..].as_ptr().cast_mut();
                    let view = Matrix { first, rows: 1, columns: sizes.plane() as isize };
                    multiply_add([positions, outputs, inputs], sums, view, tap(k), k > 0, parallel);
                }
            })
        };
        for (i, (out, sums)) in
            out.chunks_exact_mut(sizes.pixels()).zip(sums.chunks_exact(positions)).enumerate()
        {
            let bias = bias.map_or(0.0, |bias| bias[i]);
            for (out, sums) in out.chunks_exact_mut(sizes.width).zip(sums.chunks_exact(sizes.row())) {
                for (out, sum) in out.iter_mut().zip(sums) {
                    out.write(sum + bias);
                }
            }
        }
    });
}

/// The planes of an image as rows of a matrix [plane's elements, channels].
fn channels_last(planes: &[f32], length: usize) -> Vec<f32> {
    /// Elements of a plane that are turned at a time: one cache line each.
    const BLOCK: usize = 16;
    let channels = planes.len() / length;
    let mut out = vec![0.0; channels * length];
    for (start, block) in (0..length).step_by(BLOCK).zip(out.chunks_mut(BLOCK * channels)) {
        for (channel, plane) in planes.chunks_exact(length).enumerate() {
            for (row, &x) in block.chunks_exact_mut(channels).zip(&plane[start..]) {
                row[channel] = x;
            }
        }
    }
    out
}

/// The gradient by the weights, for each sample: [samples, 3 (y), outputs, 3 (x), inputs].
pub(super) fn weight_gradients(sizes: Sizes, x: &[f32], grad: &[f32]) -> Vec<f32> {
    let Sizes { samples, inputs, outputs, .. } = sizes;
    let positions = sizes.positions();
    let part = 9 * inputs * outputs;
    let mut by = vec![0.0; samples * part];
    let images = (x.chunks(inputs * sizes.pixels()).zip(grad.chunks(outputs * sizes.pixels())))
        .zip(by.chunks_mut(part));
    each(images.collect(), sizes.work(), |((x, grad), by)| {
        // Rows of the padded image; a window of three of them is three times as many columns.
        let mut x = padded(x, sizes);
        x.truncate(inputs * sizes.plane());
        let mut x = channels_last(&x, sizes.plane());
        x.resize(x.len() + 2 * inputs, 0.0);
        // The gradient at the padded width, zero in the dropped columns.
        let mut wide = vec![0.0; outputs * positions];
        for (row, source) in wide.chunks_exact_mut(sizes.row()).zip(grad.chunks_exact(sizes.width)) {
            row[..sizes.width].copy_from_slice(source);
        }
        let wide = channels_last(&wide, positions);
        let wide = Matrix { first: wide.as_ptr().cast_mut(), rows: outputs as isize, columns: 1 };
        for (y, by) in by.chunks_exact_mut(3 * inputs * outputs).enumerate() {
            let first = x[y * sizes.row() * inputs..].as_ptr().cast_mut();
            let windows = Matrix { first, rows: 1, columns: inputs as isize };
            let by = Matrix { first: by.as_mut_ptr(), rows: 1, columns: 3 * inputs as isize };
            // SAFETY: [3 inputs, positions] windows end two pixels beyond the image at most, where x
            // was lengthened; [positions, outputs] is all of the gradient; the result is this part.
            unsafe { multiply_add([3 * inputs, outputs, positions], by, windows, wide, false, false) };
        }
    });
    by
}
