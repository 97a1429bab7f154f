//! Layer normalisation, with and without a gain and a shift.

use std::mem::MaybeUninit;

use super::simd::{self, Kernel, Level};

/// The mean and 1 / sqrt(variance + epsilon) of a row.
#[inline(always)]
fn statistics(row: &[f32], epsilon: f32) -> (f32, f32) {
    let count = row.len() as f64;
    let mean = (simd::sum([row], |[x]| x) / count) as f32;
    let variance = simd::sum([row], |[x]| (x - mean) * (x - mean)) / count;
    (mean, (1.0 / (variance + f64::from(epsilon)).sqrt()) as f32)
}

/// y = (x - mean) / sqrt(variance + epsilon), row by row.
pub(super) struct Normalise<'a> {
    pub x: &'a [f32],
    pub y: &'a mut [MaybeUninit<f32>],
    pub width: usize,
    pub epsilon: f32,
}

impl Kernel for Normalise<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for (y, x) in self.y.chunks_exact_mut(self.width).zip(self.x.chunks_exact(self.width)) {
            let (mean, scale) = statistics(x, self.epsilon);
            for (y, &x) in y.iter_mut().zip(x) {
                y.write((x - mean) * scale);
            }
        }
    }
}

/// grad, by the output, to the gradient by x.
pub(super) struct NormaliseBackward<'a> {
    pub x: &'a [f32],
    pub grad: &'a mut [f32],
    pub width: usize,
    pub epsilon: f32,
}

impl Kernel for NormaliseBackward<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        let count = self.width as f64;
        for (grad, x) in self.grad.chunks_exact_mut(self.width).zip(self.x.chunks_exact(self.width)) {
            let (mean, scale) = statistics(x, self.epsilon);
            let grad_mean = (simd::sum([grad], |[g]| g) / count) as f32;
            let along = (simd::sum([grad, x], |[g, x]| g * ((x - mean) * scale)) / count) as f32;
            for (grad, &x) in grad.iter_mut().zip(x) {
                *grad = scale * (*grad - grad_mean - (x - mean) * scale * along);
            }
        }
    }
}

/// y = normalised x * (unit + gain) + shift, gain and shift repeated over rows.
pub(super) struct Modulate<'a> {
    pub x: &'a [f32],
    pub gain: &'a [f32],
    pub shift: &'a [f32],
    pub y: &'a mut [MaybeUninit<f32>],
    pub unit: f32,
    pub epsilon: f32,
}

impl Kernel for Modulate<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        let width = self.gain.len();
        for (y, x) in self.y.chunks_exact_mut(width).zip(self.x.chunks_exact(width)) {
            let (mean, scale) = statistics(x, self.epsilon);
            for (((y, &x), &gain), &shift) in y.iter_mut().zip(x).zip(self.gain).zip(self.shift) {
                y.write(L::mul_add((x - mean) * scale, self.unit + gain, shift));
            }
        }
    }
}

/// grad, by the output of [`Modulate`], to the gradient by x; those by gain and shift are added to
/// `by_gain` and `by_shift`.
pub(super) struct ModulateBackward<'a> {
    pub x: &'a [f32],
    pub gain: &'a [f32],
    pub grad: &'a mut [f32],
    pub by_gain: &'a mut [f32],
    pub by_shift: &'a mut [f32],
    pub unit: f32,
    pub epsilon: f32,
}

impl Kernel for ModulateBackward<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        let width = self.gain.len();
        let count = width as f64;
        let unit = self.unit;
        for (grad, x) in self.grad.chunks_exact_mut(width).zip(self.x.chunks_exact(width)) {
            let (mean, scale) = statistics(x, self.epsilon);
            let sums = self.by_gain.iter_mut().zip(self.by_shift.iter_mut());
            for (((grad, &x), &gain), (by_gain, by_shift)) in grad.iter_mut().zip(x).zip(self.gain).zip(sums)
            {
                *by_gain = L::mul_add(*grad, (x - mean) * scale, *by_gain);
                *by_shift += *grad;
                *grad *= unit + gain;
            }
            let grad_mean = (simd::sum([grad], |[g]| g) / count) as f32;
            let along = (simd::sum([grad, x], |[g, x]| g * ((x - mean) * scale)) / count) as f32;
            for (grad, &x) in grad.iter_mut().zip(x) {
                *grad = scale * (*grad - grad_mean - (x - mean) * scale * along);
            }
        }
    }
}
