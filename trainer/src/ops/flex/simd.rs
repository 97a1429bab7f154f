//! Element-wise kernels compiled several times, for the widest vectors that the running CPU has.

/// A kernel whose body is written once, for any [`Level`]. `run` and all that it calls in its loops
/// must be `#[inline(always)]`, so that each level compiles it with its own instructions.
pub(super) trait Kernel {
    /// Runs the kernel.
    fn run<L: Level>(self);
}

/// What differs between instruction sets in the source; vector width is the compiler's.
pub(super) trait Level {
    /// a * b + c, in one rounding where the CPU has that.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// CPUs with a fused multiply-add.
struct Fma;

/// All others.
struct Baseline;

impl Level for Fma {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Level for Baseline {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Runs a kernel at the best level of this CPU.
#[inline]
pub(super) fn run(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("fma")
        {
            // SAFETY: the CPU has the features that `avx512` is compiled for.
            return unsafe { avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has the features that `avx2` is compiled for.
            return unsafe { avx2(kernel) };
        }
        kernel.run::<Baseline>()
    }
    #[cfg(target_arch = "aarch64")]
    kernel.run::<Fma>();
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    kernel.run::<Baseline>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]
fn avx512(kernel: impl Kernel) {
    kernel.run::<Fma>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(kernel: impl Kernel) {
    kernel.run::<Fma>();
}

/// e^x within 2 units in the last place for x in [-87, 88]; beyond, the value at that end. NaN stays
/// NaN. Cody-Waite range reduction and the polynomial of Cephes' expf.
#[inline(always)]
pub(super) fn exp<L: Level>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits of the float.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Written so that NaN fails both comparisons and goes on.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = L::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = L::mul_add(n, -LN2_LOW, L::mul_add(n, -LN2_HIGH, x));
    let p = L::mul_add(1.987_569_2e-4, r, 1.398_2e-3);
    let p = L::mul_add(p, r, 8.333_452e-3);
    let p = L::mul_add(p, r, 4.166_579_6e-2);
    let p = L::mul_add(p, r, 1.666_666_5e-1);
    let p = L::mul_add(p, r, 0.5);
    let y = L::mul_add(p, r * r, r) + 1.0;
    y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

const LANES: usize = 32;

/// The sum of f over equally long slices, in an order that depends on their length alone: lanes
/// within pieces of 8192, pieces in float64.
#[inline(always)]
pub(super) fn sum<const N: usize>(slices: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f64 {
    let len = slices[0].len();
    let mut total = 0.0;
    let mut start = 0;
    while start < len {
        let end = (start + 8192).min(len);
        total += f64::from(sum_piece(slices.map(|s| &s[start..end]), &f));
        start = end;
    }
    total
}

#[inline(always)]
fn sum_piece<const N: usize>(slices: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let len = slices[0].len();
    let parts = slices.map(|s| s[..len].as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for i in 0..len / LANES {
        let chunks = parts.map(|(whole, _)| &whole[i]);
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(chunks.map(|c| c[j]));
        }
    }
    for j in 0..len % LANES {
        lanes[j] += f(parts.map(|(_, rest)| rest[j]));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest element; NaN only if all are.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = if x > *lane { x } else { *lane };
    }
    lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}
