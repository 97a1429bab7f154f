//! GELU, SiLU and the gated residual.

use std::mem::MaybeUninit;

use super::simd::{self, Kernel, Level, exp};

/// sqrt(2/pi), and the cubic coefficient of the tanh approximation.
const SLOPE: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// y = gelu(x). 0.5 (1 + tanh(u)) is sigmoid(2u): one exponential and no cancellation.
pub(super) struct Gelu<'a> {
    pub x: &'a [f32],
    pub y: &'a mut [MaybeUninit<f32>],
}

impl Kernel for Gelu<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for (y, &x) in self.y.iter_mut().zip(self.x) {
            let u = x * L::mul_add(CUBIC * x, x, 1.0);
            y.write(x / (1.0 + exp::<L>(-2.0 * SLOPE * u)));
        }
    }
}

/// grad *= gelu'(x).
pub(super) struct GeluBackward<'a> {
    pub x: &'a [f32],
    pub grad: &'a mut [f32],
}

impl Kernel for GeluBackward<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for (grad, &x) in self.grad.iter_mut().zip(self.x) {
            let square = x * x;
            let e = exp::<L>(-2.0 * SLOPE * x * L::mul_add(CUBIC, square, 1.0));
            let s = 1.0 / (1.0 + e);
            // e s is 1 - s without its cancellation. Its product with x times the inner derivative
            // vanishes where x is large, but would be 0 * inf once the square overflows.
            let tail = e * s * s;
            let slope = 2.0 * SLOPE * x * L::mul_add(3.0 * CUBIC, square, 1.0);
            let bend = if tail > 1e-30 { tail * slope } else { tail };
            *grad *= s + bend;
        }
    }
}

/// y = x sigmoid(x).
pub(super) struct Swish<'a> {
    pub x: &'a [f32],
    pub y: &'a mut [MaybeUninit<f32>],
}

impl Kernel for Swish<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for (y, &x) in self.y.iter_mut().zip(self.x) {
            y.write(x / (1.0 + exp::<L>(-x)));
        }
    }
}

/// grad *= d/dx x sigmoid(x).
pub(super) struct SwishBackward<'a> {
    pub x: &'a [f32],
    pub grad: &'a mut [f32],
}

impl Kernel for SwishBackward<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for (grad, &x) in self.grad.iter_mut().zip(self.x) {
            let e = exp::<L>(-x);
            let s = 1.0 / (1.0 + e);
            *grad *= L::mul_add(e * s * s, x, s);
        }
    }
}

/// out = x + gate * y, the gate repeated over rows.
pub(super) struct GatedAdd<'a> {
    pub x: &'a [f32],
    pub y: &'a [f32],
    pub gate: &'a [f32],
    pub out: &'a mut [MaybeUninit<f32>],
}

impl Kernel for GatedAdd<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        let width = self.gate.len();
        let rows = self.x.chunks_exact(width).zip(self.y.chunks_exact(width));
        for (out, (x, y)) in self.out.chunks_exact_mut(width).zip(rows) {
            for (((out, &x), &y), &gate) in out.iter_mut().zip(x).zip(y).zip(self.gate) {
                out.write(L::mul_add(gate, y, x));
            }
        }
    }
}

/// by_y = gate * grad; by_gate += y * grad, summed over rows.
pub(super) struct GatedAddBackward<'a> {
    pub y: &'a [f32],
    pub gate: &'a [f32],
    pub grad: &'a [f32],
    pub by_y: &'a mut [MaybeUninit<f32>],
    pub by_gate: &'a mut [f32],
}

impl Kernel for GatedAddBackward<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        let width = self.gate.len();
        let rows = self.y.chunks_exact(width).zip(self.grad.chunks_exact(width));
        for (by_y, (y, grad)) in self.by_y.chunks_exact_mut(width).zip(rows) {
            let columns = self.by_gate.iter_mut().zip(self.gate);
            for (((by_y, &y), &grad), (by_gate, &gate)) in by_y.iter_mut().zip(y).zip(grad).zip(columns) {
                by_y.write(gate * grad);
                *by_gate = L::mul_add(y, grad, *by_gate);
            }
        }
    }
}

/// sums += rows of grad.
pub(super) struct SumRows<'a> {
    pub grad: &'a [f32],
    pub sums: &'a mut [f32],
}

impl Kernel for SumRows<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for row in self.grad.chunks_exact(self.sums.len()) {
            for (sum, &x) in self.sums.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }
}

/// sum += all values.
pub(super) struct AddSum<'a> {
    pub values: &'a [f32],
    pub sum: &'a mut f32,
}

impl Kernel for AddSum<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        *self.sum += simd::sum([self.values], |[x]| x) as f32;
    }
}

/// rows += bias.
pub(super) struct AddBias<'a> {
    pub bias: &'a [f32],
    pub rows: &'a mut [f32],
}

impl Kernel for AddBias<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for row in self.rows.chunks_exact_mut(self.bias.len()) {
            for (x, &bias) in row.iter_mut().zip(self.bias) {
                *x += bias;
            }
        }
    }
}

/// Each row of `scores` to its softmax.
pub(super) struct Softmax<'a> {
    pub scores: &'a mut [f32],
    pub width: usize,
}

impl Kernel for Softmax<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        for row in self.scores.chunks_exact_mut(self.width) {
            let max = simd::max(row);
            for x in row.iter_mut() {
                *x = exp::<L>(*x - max);
            }
            let scale = (1.0 / simd::sum([row], |[x]| x)) as f32;
            for x in row.iter_mut() {
                *x *= scale;
            }
        }
    }
}

/// Each row of `grad`, the gradient by a softmax's output p, to that by its input: p (grad - sum(p
/// grad)).
pub(super) struct SoftmaxBackward<'a> {
    pub probabilities: &'a [f32],
    pub grad: &'a mut [f32],
    pub width: usize,
}

impl Kernel for SoftmaxBackward<'_> {
    #[inline(always)]
    fn run<L: Level>(self) {
        let rows = self.grad.chunks_exact_mut(self.width).zip(self.probabilities.chunks_exact(self.width));
        for (grad, p) in rows {
            let mean = simd::sum([grad, p], |[g, p]| g * p) as f32;
            for (grad, &p) in grad.iter_mut().zip(p) {
                *grad = p * (*grad - mean);
            }
        }
    }
}
