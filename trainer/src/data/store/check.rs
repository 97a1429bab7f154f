//! What makes a sample fit to be stored, and what is kept of it beside its bytes: digest and sums.

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use xxhash_rust::xxh3::Xxh3;

use super::{Kind, Precision, Spread, StoreSpec, shard};

/// The stored arrays of one sample, seen one way: as it is, or mirrored.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Moments (mean ‖ spread, 2*C*h*w elements) or latents (C*h*w), not normalised.
    pub latent: &'a [f32],
    /// Features by encoder, in the order of the spec; [tokens, dim] each.
    pub features: &'a [Vec<f16>],
}

/// One sample to be stored.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// The class.
    pub label: u32,
    /// The sample as it is.
    pub view: View<'a>,
    /// Of the image mirrored left to right, where the store keeps flipped copies.
    pub flipped: Option<View<'a>>,
    /// The encoded image (PNG, JPEG) where the store keeps images; empty otherwise.
    pub image: &'a [u8],
}

impl<'a> Sample<'a> {
    /// The arrays that are stored, each with its encoder's number, `None` for the latent: in the
    /// order of the shard's fields.
    pub(super) fn arrays(&self) -> impl Iterator<Item = Array<'a>> {
        [Some(self.view), self.flipped].into_iter().flatten().flat_map(|view| {
            std::iter::once(Array::Latent(view.latent))
                .chain(view.features.iter().map(|f| Array::Features(f.as_slice())))
        })
    }
}

/// One array of a sample.
#[derive(Debug, Clone, Copy)]
pub(super) enum Array<'a> {
    Latent(&'a [f32]),
    Features(&'a [f16]),
}

/// What checking a sample gives: all that a shard keeps of it beside the arrays themselves. Making
/// it reads every byte, so it is done in parallel; writing is not.
#[derive(Debug, Clone)]
pub struct Checked {
    pub(super) digest: u64,
    /// Sums of the latent by channel; [C].
    pub(super) sums: Vec<f64>,
    /// Expected sums of squares by channel; [C].
    pub(super) squares: Vec<f64>,
    /// The latents, as it is and flipped, in float16 where the store keeps them so.
    pub(super) halves: Vec<Vec<f16>>,
}

impl Checked {
    /// Checks a sample against the spec.
    ///
    /// # Errors
    /// Why it is not fit to be stored: values that are not finite, negative standard deviations, a
    /// label or a shape other than the spec's.
    pub fn new(spec: &StoreSpec, sample: &Sample) -> Result<Self, String> {
        check_sample(spec, sample)?;
        let (sums, squares) = channel_sums(spec, sample.view.latent);
        let mut halves = Vec::new();
        let mut digest = SampleDigest::new(i64::from(sample.label));
        for array in sample.arrays() {
            match array {
                Array::Latent(values) if spec.precision == Precision::F32 => {
                    digest.update(bytemuck::cast_slice(values));
                }
                Array::Latent(values) => {
                    let mut half = vec![f16::ZERO; values.len()];
                    half.convert_from_f32_slice(values);
                    digest.update(shard::f16_bytes(&half));
                    halves.push(half);
                }
                Array::Features(values) => digest.update(shard::f16_bytes(values)),
            }
        }
        digest.update(sample.image);
        Ok(Self { digest: digest.finish(), sums, squares, halves })
    }
}

/// The digest of one sample: label, arrays and image, as stored.
pub(super) struct SampleDigest(Xxh3);

impl SampleDigest {
    pub(super) fn new(label: i64) -> Self {
        let mut hasher = Xxh3::new();
        hasher.update(&label.to_le_bytes());
        Self(hasher)
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn finish(&self) -> u64 {
        self.0.digest()
    }
}

fn check_sample(spec: &StoreSpec, sample: &Sample) -> Result<(), String> {
    if sample.label as usize >= spec.classes {
        return Err(format!("label {} is not below the number of classes, {}", sample.label, spec.classes));
    }
    check_view(spec, &sample.view)?;
    match (&sample.flipped, spec.flips) {
        (Some(view), true) => check_view(spec, view).map_err(|e| format!("flipped: {e}"))?,
        (None, false) => {}
        (Some(_), false) => return Err("a flipped copy for a store without".to_owned()),
        (None, true) => return Err("its flipped copy is missing".to_owned()),
    }
    if spec.images == sample.image.is_empty() {
        return Err(if spec.images { "its image is missing" } else { "an image for a store without" }.into());
    }
    Ok(())
}

fn check_view(spec: &StoreSpec, view: &View) -> Result<(), String> {
    if view.latent.len() != spec.stored_len() {
        return Err(format!("{} latent values where {} belong", view.latent.len(), spec.stored_len()));
    }
    if spec.precision == Precision::F16
        && let Some(x) = view.latent.iter().find(|x| x.is_finite() && x.abs() > f16::MAX.to_f32())
    {
        return Err(format!("the value {x} does not fit float16: store float32"));
    }
    check_latent(spec, view.latent)?;
    if view.features.len() != spec.encoders.len() {
        return Err(format!("features of {} encoders, not {}", view.features.len(), spec.encoders.len()));
    }
    for (features, encoder) in view.features.iter().zip(&spec.encoders) {
        let belongs = encoder.tokens * encoder.dim;
        if features.len() != belongs {
            return Err(format!("{} features of {} where {belongs} belong", features.len(), encoder.id));
        }
        check_features(&encoder.id, features)?;
    }
    Ok(())
}

/// Checks that latents are finite, and spreads what the spec says.
pub(super) fn check_latent(spec: &StoreSpec, latent: &[f32]) -> Result<(), String> {
    // First without leaving early, which vectorises; who is to blame is asked only of bad ones.
    if !latent.iter().fold(true, |fine, x| fine & x.is_finite())
        && let Some(i) = latent.iter().position(|x| !x.is_finite())
    {
        return Err(format!("latent value {i} is {}, not a finite number", latent[i]));
    }
    if spec.kind == Kind::Moments && spec.spread == Spread::Std {
        let spreads = &latent[spec.latent_len()..];
        if !spreads.iter().fold(true, |fine, &x| fine & (x >= 0.0))
            && let Some(i) = spreads.iter().position(|&x| x < 0.0)
        {
            return Err(format!(
                "standard deviation {i} is {}: below 0, so these look like log variances (spread = logvar)",
                spreads[i]
            ));
        }
    }
    Ok(())
}

/// Checks that features are finite.
pub(super) fn check_features(encoder: &str, features: &[f16]) -> Result<(), String> {
    // A float16 is finite unless all its exponent's bits are set.
    const EXPONENT: u16 = 0x7C00;
    let bits: &[u16] = features.reinterpret_cast();
    if bits.iter().fold(true, |fine, &x| fine & (x & EXPONENT != EXPONENT)) {
        return Ok(());
    }
    match features.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(format!("feature {i} of {encoder} is {}, not a finite float16", features[i])),
        None => Ok(()),
    }
}

/// Standard deviation of a stored log variance, held to diffusers' range.
pub(super) fn logvar_to_std(logvar: f32) -> f32 {
    libm::expf(0.5 * logvar.clamp(-30.0, 20.0))
}

/// Sums and expected sums of squares of a sample's latents, by channel.
fn channel_sums(spec: &StoreSpec, stored: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let plane = spec.height * spec.width;
    let (mean, spread) = stored.split_at(spec.latent_len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let sums = mean.chunks_exact(plane).map(|x| sum(x, f64::from)).collect();
    let mut squares: Vec<f64> = mean.chunks_exact(plane).map(|x| sum(x, square)).collect();
    for (total, x) in squares.iter_mut().zip(spread.chunks_exact(plane)) {
        *total += match spec.spread {
            Spread::Std => sum(x, square),
            Spread::Logvar => sum(x, |v| square(logvar_to_std(v))),
        };
    }
    (sums, squares)
}

/// The sum of `f` over `values`, in eight partial sums so that it vectorises; always the same bits.
fn sum(values: &[f32], f: impl Fn(f32) -> f64) -> f64 {
    let (eights, rest) = values.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for eight in eights {
        for (sum, &v) in sums.iter_mut().zip(eight) {
            *sum += f(v);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&v| f(v)).sum::<f64>()
}
