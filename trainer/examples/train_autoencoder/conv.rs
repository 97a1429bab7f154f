//! 3x3 convolutions of one image, forwards and backwards, for the training program: images this
//! small and channels this few spend most of a general convolution in rearranging. Planes are
//! padded by one pixel, and 16 neighbouring pixels make one vector.

use std::sync::LazyLock;

/// Pixels in a vector. The side of every plane is a multiple of it.
const LANES: usize = 16;
/// Output channels that are computed together.
const BLOCK: usize = 8;
/// Output channels whose weights' gradients are computed together.
const GRADIENT_BLOCK: usize = 4;
/// Weights of one pair of channels.
const TAPS: usize = 9;

type Vector = [f32; LANES];

/// Channels of square planes: [channels, side, side].
#[derive(Clone)]
pub struct Planes {
    pub channels: usize,
    pub side: usize,
    pub data: Vec<f32>,
}

/// The same with a border of one zero: [channels, side + 2, side + 2].
pub struct Padded {
    channels: usize,
    side: usize,
    data: Vec<f32>,
}

impl Planes {
    pub fn zeros(channels: usize, side: usize) -> Self {
        Self { channels, side, data: vec![0.0; channels * side * side] }
    }

    pub fn padded(&self) -> Padded {
        let (side, stride) = (self.side, self.side + 2);
        let mut data = vec![0.0; self.channels * stride * stride];
        for (row, from) in self.data.chunks_exact(side).enumerate() {
            let (channel, y) = (row / side, row % side);
            let begin = (channel * stride + y + 1) * stride + 1;
            data[begin..begin + side].copy_from_slice(from);
        }
        Padded { channels: self.channels, side, data }
    }

    pub fn relu(mut self) -> Self {
        self.data.iter_mut().for_each(|v| *v = v.max(0.0));
        self
    }

    pub fn add(mut self, other: &Padded) -> Self {
        self.each_with(other, |v, o| *v += o);
        self
    }

    /// Sets to zero where a ReLU gave zero.
    pub fn masked(mut self, relu: &Padded) -> Self {
        self.each_with(relu, |v, o| {
            if o <= 0.0 {
                *v = 0.0;
            }
        });
        self
    }

    fn each_with(&mut self, other: &Padded, f: impl Fn(&mut f32, f32)) {
        assert_eq!((self.channels, self.side), (other.channels, other.side));
        let (side, stride) = (self.side, self.side + 2);
        for (row, values) in self.data.chunks_exact_mut(side).enumerate() {
            let (channel, y) = (row / side, row % side);
            let begin = (channel * stride + y + 1) * stride + 1;
            values.iter_mut().zip(&other.data[begin..begin + side]).for_each(|(v, &o)| f(v, o));
        }
    }

    /// Every pixel doubled in width and height.
    pub fn doubled(&self) -> Self {
        let mut out = Self::zeros(self.channels, 2 * self.side);
        for (i, v) in out.data.iter_mut().enumerate() {
            *v = self.data[self.half(i)];
        }
        out
    }

    /// The gradient of [`Planes::doubled`]: sums of two by two.
    pub fn summed(&self) -> Self {
        let mut out = Self::zeros(self.channels, self.side / 2);
        for (i, v) in self.data.iter().enumerate() {
            let to = out.half(i);
            out.data[to] += v;
        }
        out
    }

    /// Every second pixel of every second row.
    pub fn subsampled(&self) -> Self {
        let (side, half) = (self.side, self.side / 2);
        let mut out = Self::zeros(self.channels, half);
        for (i, v) in out.data.iter_mut().enumerate() {
            let (row, x) = (i / half, i % half);
            *v = self.data[2 * row * side + 2 * x];
        }
        out
    }

    /// The gradient of [`Planes::subsampled`]: zeros between.
    pub fn spread(&self) -> Self {
        let mut out = Self::zeros(self.channels, 2 * self.side);
        for (i, v) in self.data.iter().enumerate() {
            let (row, x) = (i / self.side, i % self.side);
            out.data[2 * row * 2 * self.side + 2 * x] = *v;
        }
        out
    }

    /// Index here of the pixel that covers pixel `i` of planes twice as wide.
    fn half(&self, i: usize) -> usize {
        let wide = 2 * self.side;
        let (row, x) = (i / wide, i % wide);
        row / 2 * self.side + x / 2
    }
}

/// The weights of a convolution, arranged for [`Packed::apply`].
pub struct Packed {
    inputs: usize,
    outputs: usize,
    /// Blocks of [`BLOCK`] outputs: [inputs * TAPS] of [BLOCK].
    blocks: Vec<[f32; BLOCK]>,
    /// The outputs left over: [inputs * TAPS] of one, each.
    rest: Vec<[f32; 1]>,
}

impl Packed {
    /// From PyTorch's [outputs, inputs, 3, 3].
    pub fn forward(weight: &[f32], inputs: usize, outputs: usize) -> Self {
        Self::new(inputs, outputs, |o, i, tap| weight[(o * inputs + i) * TAPS + tap])
    }

    /// For the gradient of the inputs: [outputs, inputs, 3, 3] turned round.
    pub fn backward(weight: &[f32], inputs: usize, outputs: usize) -> Self {
        Self::new(outputs, inputs, |o, i, tap| weight[(i * inputs + o) * TAPS + TAPS - 1 - tap])
    }

    fn new(inputs: usize, outputs: usize, weight: impl Fn(usize, usize, usize) -> f32) -> Self {
        let whole = outputs / BLOCK * BLOCK;
        let taps = || (0..inputs).flat_map(|i| (0..TAPS).map(move |tap| (i, tap)));
        let (mut blocks, mut rest) = (vec![], vec![]);
        for first in (0..whole).step_by(BLOCK) {
            blocks.extend(taps().map(|(i, tap)| std::array::from_fn(|o| weight(first + o, i, tap))));
        }
        for output in whole..outputs {
            rest.extend(taps().map(|(i, tap)| [weight(output, i, tap)]));
        }
        Self { inputs, outputs, blocks, rest }
    }

    /// The convolution, with stride 1.
    pub fn apply(&self, x: &Padded, bias: Option<&[f32]>) -> Planes {
        assert_eq!((x.channels, x.side % LANES), (self.inputs, 0));
        let mut out = Planes::zeros(self.outputs, x.side);
        if *AVX512 {
            // SAFETY: the processor has AVX-512F, as asked just above.
            unsafe { apply_avx512(self, x, &mut out) }
        } else {
            apply_any::<false>(self, x, &mut out);
        }
        if let Some(bias) = bias {
            for (plane, b) in out.data.chunks_exact_mut(x.side * x.side).zip(bias) {
                plane.iter_mut().for_each(|v| *v += b);
            }
        }
        out
    }
}

static AVX512: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
});

/// Adds the gradient of the weights, [outputs, inputs, 3, 3], of a convolution of `x` whose outputs
/// have gradient `gradient`.
pub fn weight_gradient(x: &Padded, gradient: &Planes, out: &mut [f32]) {
    assert_eq!((x.side, out.len()), (gradient.side, x.channels * gradient.channels * TAPS));
    if *AVX512 {
        // SAFETY: the processor has AVX-512F, as asked just above.
        unsafe { weight_gradient_avx512(x, gradient, out) }
    } else {
        weight_gradient_any::<false>(x, gradient, out);
    }
}

#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx512f"))]
fn apply_avx512(packed: &Packed, x: &Padded, out: &mut Planes) {
    apply_any::<true>(packed, x, out);
}

#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx512f"))]
fn weight_gradient_avx512(x: &Padded, gradient: &Planes, out: &mut [f32]) {
    weight_gradient_any::<true>(x, gradient, out);
}

#[inline(always)]
fn apply_any<const FUSED: bool>(packed: &Packed, x: &Padded, out: &mut Planes) {
    let plane = x.side * x.side;
    let taps = packed.inputs * TAPS;
    for (block, weights) in packed.blocks.chunks_exact(taps).enumerate() {
        apply_block::<FUSED, BLOCK>(weights, x, &mut out.data[block * BLOCK * plane..]);
    }
    let whole = packed.outputs / BLOCK * BLOCK;
    for (output, weights) in packed.rest.chunks_exact(taps).enumerate() {
        apply_block::<FUSED, 1>(weights, x, &mut out.data[(whole + output) * plane..]);
    }
}

/// `B` output channels, two rows of 16 pixels at a time.
#[inline(always)]
fn apply_block<const FUSED: bool, const B: usize>(weights: &[[f32; B]], x: &Padded, out: &mut [f32]) {
    let (side, stride) = (x.side, x.side + 2);
    for y in (0..side).step_by(2) {
        for left in (0..side).step_by(LANES) {
            let mut sums = [[[0.0; LANES]; 2]; B];
            for (channel, taps) in weights.as_chunks::<TAPS>().0.iter().enumerate() {
                let begin = (channel * stride + y) * stride + left;
                for (tap, weights) in taps.iter().enumerate() {
                    let at = begin + tap / 3 * stride + tap % 3;
                    let rows = [vector(&x.data, at), vector(&x.data, at + stride)];
                    for (sums, &w) in sums.iter_mut().zip(weights) {
                        for (sum, row) in sums.iter_mut().zip(rows) {
                            *sum = multiply_add::<FUSED>(row, &[w; LANES], sum);
                        }
                    }
                }
            }
            for (output, rows) in sums.iter().enumerate() {
                for (row, values) in rows.iter().enumerate() {
                    let to = (output * side + y + row) * side + left;
                    out[to..to + LANES].copy_from_slice(values);
                }
            }
        }
    }
}

#[inline(always)]
fn weight_gradient_any<const FUSED: bool>(x: &Padded, gradient: &Planes, out: &mut [f32]) {
    let plane = x.side * x.side;
    let per_output = x.channels * TAPS;
    let whole = gradient.channels / GRADIENT_BLOCK * GRADIENT_BLOCK;
    for first in (0..whole).step_by(GRADIENT_BLOCK) {
        let gradients = &gradient.data[first * plane..];
        weight_block::<FUSED, GRADIENT_BLOCK>(x, gradients, &mut out[first * per_output..]);
    }
    for output in whole..gradient.channels {
        weight_block::<FUSED, 1>(x, &gradient.data[output * plane..], &mut out[output * per_output..]);
    }
}

/// The gradients of three neighbouring weights of `B` output channels at a time, over all pixels.
#[inline(always)]
fn weight_block<const FUSED: bool, const B: usize>(x: &Padded, gradient: &[f32], out: &mut [f32]) {
    let (side, stride) = (x.side, x.side + 2);
    let per_output = x.channels * TAPS;
    for channel in 0..x.channels {
        for ky in 0..3 {
            let mut sums = [[[0.0; LANES]; 3]; B];
            for y in 0..side {
                for left in (0..side).step_by(LANES) {
                    let at = (channel * stride + y + ky) * stride + left;
                    let inputs = [vector(&x.data, at), vector(&x.data, at + 1), vector(&x.data, at + 2)];
                    let gradients: [&Vector; B] =
                        std::array::from_fn(|output| vector(gradient, (output * side + y) * side + left));
                    for (sums, g) in sums.iter_mut().zip(gradients) {
                        for (sum, input) in sums.iter_mut().zip(inputs) {
                            *sum = multiply_add::<FUSED>(input, g, sum);
                        }
                    }
                }
            }
            for (output, sums) in sums.iter().enumerate() {
                let to = output * per_output + channel * TAPS + ky * 3;
                for (out, sum) in out[to..to + 3].iter_mut().zip(sums) {
                    *out += sum.iter().sum::<f32>();
                }
            }
        }
    }
}

#[inline(always)]
fn vector(data: &[f32], at: usize) -> &Vector {
    data[at..at + LANES].as_array().expect("as many as asked for")
}

#[inline(always)]
fn multiply_add<const FUSED: bool>(a: &Vector, b: &Vector, c: &Vector) -> Vector {
    std::array::from_fn(|i| if FUSED { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
}
