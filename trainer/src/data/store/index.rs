//! `index.json`: what a store holds.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::StoreError;

const FORMAT: &str = "repa-dist latent store";
const VERSION: u32 = 1;

/// Whether a store holds distributions or plain latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Mean ‖ spread of a posterior, [2C, h, w]: a latent is drawn from it anew each time (AutoencoderKL).
    Moments,
    /// Latents without a posterior, [C, h, w] (the TAESD family).
    Latents,
}

/// What the second half of moments is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// Standard deviations (REPA's and EDM2's files).
    #[default]
    Std,
    /// Logarithms of variances (MaskDiT's and U-ViT's files); readers give standard deviations all the same.
    Logvar,
}

/// How latents are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float32.
    #[default]
    F32,
    /// float16.
    F16,
}

/// The features of one frozen encoder: float16 [tokens, dim] a sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderSpec {
    /// Which encoder, such as `dinov2-vit-b`; also the tensor's name, `features.<id>`.
    pub id: String,
    /// Patch tokens of an image.
    pub tokens: usize,
    /// Width of a token.
    pub dim: usize,
}

/// How a latent becomes what the model sees: `(latent - shift) * scale`, by channel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalisation {
    /// Subtracted first; [C].
    pub shift: Vec<f32>,
    /// Multiplied then; [C].
    pub scale: Vec<f32>,
}

impl Normalisation {
    /// The same scale for all channels and no shift, such as the SD-VAE's 0.18215.
    #[must_use]
    pub fn uniform(channels: usize, scale: f32) -> Self {
        Self { shift: vec![0.0; channels], scale: vec![scale; channels] }
    }

    /// Normalises latents [.., C, h*w] in place; `plane` = h*w.
    pub fn apply(&self, latents: &mut [f32], plane: usize) {
        for (i, channel) in latents.chunks_exact_mut(plane).enumerate() {
            let (shift, scale) = self.channel(i);
            channel.iter_mut().for_each(|x| *x = (*x - shift) * scale);
        }
    }

    /// Undoes [`Self::apply`], before decoding.
    pub fn invert(&self, latents: &mut [f32], plane: usize) {
        for (i, channel) in latents.chunks_exact_mut(plane).enumerate() {
            let (shift, scale) = self.channel(i);
            channel.iter_mut().for_each(|x| *x = *x / scale + shift);
        }
    }

    fn channel(&self, i: usize) -> (f32, f32) {
        (self.shift[i % self.shift.len()], self.scale[i % self.scale.len()])
    }
}

/// What a store is to hold; fixed when it is begun.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreSpec {
    /// Moments or latents.
    pub kind: Kind,
    /// What the second half of moments is; of no meaning for latents.
    pub spread: Spread,
    /// How latents are stored.
    pub precision: Precision,
    /// Channels C of a latent.
    pub channels: usize,
    /// Height h of a latent.
    pub height: usize,
    /// Width w of a latent.
    pub width: usize,
    /// Width and height of the images, in pixels.
    pub resolution: usize,
    /// Which autoencoder made the latents, such as `sd-vae-ft-ema`.
    pub autoencoder: String,
    /// How latents are normalised; `None`: to mean 0 and variance 1 by channel, as measured.
    pub normalisation: Option<Normalisation>,
    /// Number of classes; labels are below it.
    pub classes: usize,
    /// Names of the classes by label, or none at all.
    pub class_names: Vec<String>,
    /// The encoders whose features are stored.
    pub encoders: Vec<EncoderSpec>,
    /// Whether the encoded images are stored.
    pub images: bool,
    /// Whether latents and features of the mirrored images are stored beside the others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub flips: bool,
    /// Where the samples came from, in words.
    pub source: String,
}

impl StoreSpec {
    /// A spec of images of `resolution` pixels in `classes` classes, of which neither latents nor features are
    /// known yet: [`crate::data::encode::Models::complete`] fills them in.
    #[must_use]
    pub fn of_images(resolution: usize, classes: usize) -> Self {
        Self {
            kind: Kind::Latents,
            spread: Spread::Std,
            precision: Precision::F32,
            channels: 0,
            height: 0,
            width: 0,
            resolution,
            autoencoder: String::new(),
            normalisation: None,
            classes,
            class_names: Vec::new(),
            encoders: Vec::new(),
            images: false,
            flips: false,
            source: String::new(),
        }
    }

    /// Elements of a latent, C*h*w.
    #[must_use]
    pub fn latent_len(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Elements stored for a sample: 2*C*h*w for moments, C*h*w for latents.
    #[must_use]
    pub fn stored_len(&self) -> usize {
        match self.kind {
            Kind::Moments => 2 * self.latent_len(),
            Kind::Latents => self.latent_len(),
        }
    }

    /// Samples of a shard that make about 1 GiB, a power of two between 64 and 16384.
    #[must_use]
    pub fn default_shard_len(&self) -> usize {
        let element = if self.precision == Precision::F32 { 4 } else { 2 };
        let features: usize = self.encoders.iter().map(|e| e.tokens * e.dim * 2).sum();
        let image = if self.images { self.resolution * self.resolution } else { 0 };
        let views = if self.flips { 2 } else { 1 };
        let bytes = ((self.stored_len() * element + features) * views + image).max(1);
        let fit = ((1usize << 30) / bytes).max(1);
        (1 << fit.ilog2()).clamp(64, 16384)
    }

    /// The first key whose value makes no sense, and why.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let bad = |key: &str, problem: String| Err((format!("contents.{key}"), problem));
        for (key, value) in [
            ("channels", self.channels),
            ("height", self.height),
            ("width", self.width),
            ("resolution", self.resolution),
            ("classes", self.classes),
        ] {
            if value == 0 || value > 1 << 24 {
                return bad(key, format!("{value} is not a size (1 to {})", 1 << 24));
            }
        }
        if !self.class_names.is_empty() && self.class_names.len() != self.classes {
            return bad(
                "class_names",
                format!("{} names for {} classes: give all or none", self.class_names.len(), self.classes),
            );
        }
        if let Some(n) = &self.normalisation {
            check_normalisation(n, self.channels).map_err(|e| ("contents.normalisation".to_owned(), e))?;
        }
        let mut ids = HashSet::new();
        for encoder in &self.encoders {
            if !ids.insert(&encoder.id) {
                return bad("encoders", format!("{} is listed twice", encoder.id));
            }
            if encoder.tokens == 0 || encoder.dim == 0 || encoder.tokens.max(encoder.dim) > 1 << 24 {
                return bad(
                    "encoders",
                    format!("{} has features [{}, {}]", encoder.id, encoder.tokens, encoder.dim),
                );
            }
        }
        Ok(())
    }
}

/// One shard of a store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// File name, in the store's folder.
    pub file: String,
    /// Samples in it.
    pub samples: u64,
    /// Size of the file.
    pub bytes: u64,
    /// xxh3 (64 bits) of the file, 16 hexadecimal digits.
    pub xxh3: String,
    /// Sum of the latents by channel; [C]. For moments, of the means.
    pub sums: Vec<f64>,
    /// Sum of the squared latents by channel; [C]. For moments, expected: mean^2 + std^2.
    pub squares: Vec<f64>,
}

/// Mean and standard deviation of all latents, by channel; [C] each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Means.
    pub mean: Vec<f64>,
    /// Standard deviations; for moments, of latents drawn from them.
    pub std: Vec<f64>,
}

/// The whole index of a store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// Always `repa-dist latent store`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Number of samples.
    pub samples: u64,
    /// What a sample is.
    pub contents: StoreSpec,
    /// How latents are normalised for the model.
    pub normalisation: Normalisation,
    /// Statistics of the latents, before normalisation.
    pub statistics: Statistics,
    /// The shards, in the order of their samples.
    pub shards: Vec<ShardEntry>,
}

/// What a configuration needs of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Channels of the model's input.
    pub channels: usize,
    /// Width and height of the model's input, in latent pixels.
    pub input_size: usize,
    /// Classes of the model, without the null class.
    pub classes: usize,
    /// Tokens of the model, compared with those of stored features.
    pub tokens: usize,
    /// Widths of the features that the projectors aim at; empty where features are not needed.
    pub z_dims: Vec<usize>,
}

impl Index {
    /// The index of these shards; statistics are summed in their order.
    pub(super) fn new(contents: StoreSpec, shards: Vec<ShardEntry>) -> Self {
        let samples: u64 = shards.iter().map(|s| s.samples).sum();
        let count = samples as f64 * (contents.height * contents.width) as f64;
        let total =
            |pick: fn(&ShardEntry) -> &Vec<f64>, c: usize| -> f64 { shards.iter().map(|s| pick(s)[c]).sum() };
        let channels = 0..contents.channels;
        let mean: Vec<f64> = channels.clone().map(|c| total(|s| &s.sums, c) / count).collect();
        let std: Vec<f64> = channels
            .map(|c| (total(|s| &s.squares, c) / count - mean[c] * mean[c]).max(0.0).sqrt())
            .collect();
        let normalisation = contents.normalisation.clone().unwrap_or_else(|| Normalisation {
            shift: mean.iter().map(|&m| m as f32).collect(),
            // A channel that never changes is left at its size: 1/0 would be no scale.
            scale: std.iter().map(|&s| if s > 1e-6 { (1.0 / s) as f32 } else { 1.0 }).collect(),
        });
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            samples,
            contents,
            normalisation,
            statistics: Statistics { mean, std },
            shards,
        }
    }

    /// The index of a foreign layout that is read in place: no shards, and no statistics.
    pub(crate) fn in_place(contents: StoreSpec, samples: u64, normalisation: Normalisation) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            samples,
            contents,
            normalisation,
            statistics: Statistics { mean: Vec::new(), std: Vec::new() },
            shards: Vec::new(),
        }
    }

    /// Reads and checks an index; `path` is for messages.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, StoreError> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let json = |e: serde_json::Error| {
            StoreError::index(path, "the file", format!("not the index of a latent store: {e}"))
        };
        let head: Head = serde_json::from_str(text).map_err(json)?;
        if head.format != FORMAT {
            let problem = format!("is {:?}, not {FORMAT:?}: this is another kind of data", head.format);
            return Err(StoreError::index(path, "format", problem));
        }
        if head.version != VERSION {
            let problem = format!(
                "is {}, and this program reads {VERSION}: use the version of repa-dist that wrote it",
                head.version
            );
            return Err(StoreError::index(path, "version", problem));
        }
        let index: Self = serde_json::from_str(text).map_err(json)?;
        index.check().map_err(|(key, problem)| StoreError::index(path, key, problem))?;
        Ok(index)
    }

    fn check(&self) -> Result<(), (String, String)> {
        self.contents.check()?;
        check_normalisation(&self.normalisation, self.contents.channels)
            .map_err(|e| ("normalisation".to_owned(), e))?;
        let mut total = 0u64;
        let mut names = HashSet::new();
        for shard in &self.shards {
            let bad = |problem: &str| Err(("shards".to_owned(), format!("{:?} {problem}", shard.file)));
            if shard.file.is_empty() || shard.file.contains(['/', '\\']) || shard.file.starts_with('.') {
                return bad("is not a plain file name");
            }
            if !names.insert(&shard.file) {
                return bad("is listed twice");
            }
            if shard.samples == 0 {
                return bad("has no samples");
            }
            let Some(sum) = total.checked_add(shard.samples) else { return bad("counts too many samples") };
            total = sum;
        }
        if total != self.samples || total == 0 {
            let problem = format!("is {}, but the shards listed hold {total}", self.samples);
            return Err(("samples".to_owned(), problem));
        }
        Ok(())
    }

    /// Checks the store's shapes against a configuration's.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] names what differs and the value that would fit.
    pub fn expect(&self, dir: &Path, expected: &Expected) -> Result<(), StoreError> {
        let c = &self.contents;
        let wrong = |problem: String| Err(StoreError::Mismatch { dir: dir.to_owned(), problem });
        if c.channels != expected.channels {
            return wrong(format!(
                "its latents have {} channels and the model takes {} (set the model's in_channels to {})",
                c.channels, expected.channels, c.channels
            ));
        }
        if (c.height, c.width) != (expected.input_size, expected.input_size) {
            return wrong(format!(
                "its latents are {}x{} (images of {} pixels) and the model takes {size}x{size} (set the model's \
                 input_size, or make a data set of that resolution)",
                c.height,
                c.width,
                c.resolution,
                size = expected.input_size
            ));
        }
        if c.classes != expected.classes {
            return wrong(format!(
                "it has {} classes and the model {} (set the model's num_classes to {})",
                c.classes, expected.classes, c.classes
            ));
        }
        let stored: Vec<usize> = c.encoders.iter().map(|e| e.dim).collect();
        if !expected.z_dims.is_empty() && stored != expected.z_dims {
            let advice = match (stored.is_empty(), c.images) {
                (true, true) => "name the encoders that run on its images in alignment.encoders",
                (true, false) => {
                    "make it again with features or images, or train without alignment: alignment.z_dims=[]"
                }
                (false, _) => "set z_dims",
            };
            return wrong(format!(
                "it holds features of widths {stored:?} and the projectors aim at {:?} ({advice})",
                expected.z_dims
            ));
        }
        if let Some(e) =
            c.encoders.iter().find(|e| !expected.z_dims.is_empty() && e.tokens != expected.tokens)
        {
            return wrong(format!(
                "the features of {} have {} tokens an image and the model has {}",
                e.id, e.tokens, expected.tokens
            ));
        }
        Ok(())
    }

    /// A few lines for `repa-dist data info`.
    #[must_use]
    pub fn summary(&self) -> String {
        use std::fmt::Write as _;
        let c = &self.contents;
        let bytes: u64 = self.shards.iter().map(|s| s.bytes).sum();
        let what = match (c.kind, c.spread) {
            (Kind::Moments, Spread::Std) => "moments (mean, std)",
            (Kind::Moments, Spread::Logvar) => "moments (mean, log variance)",
            (Kind::Latents, _) => "plain, no posterior",
        };
        let place = match self.shards.len() {
            0 => "read in place, in REPA's layout".to_owned(),
            shards => format!("in {shards} shards, {:.3} GB", bytes as f64 / 1e9),
        };
        let mut text = format!(
            "samples      {} {place}\n\
             latents      {what}, {} x {} x {}, {:?}, by {}\n\
             images       {} pixels, {}\n\
             classes      {}\n",
            self.samples,
            c.channels,
            c.height,
            c.width,
            c.precision,
            c.autoencoder,
            c.resolution,
            if c.images { "stored" } else { "not stored" },
            c.classes,
        );
        if c.flips {
            text.push_str("flips        latents and features of the mirrored images as well\n");
        }
        for e in &c.encoders {
            let _ = writeln!(text, "features     {}: {} tokens of {}", e.id, e.tokens, e.dim);
        }
        if (1..=20).contains(&c.class_names.len()) {
            let _ = writeln!(text, "names        {}", c.class_names.join(", "));
        }
        if !self.statistics.mean.is_empty() {
            let _ = writeln!(text, "channel mean {:.4?}", self.statistics.mean);
            let _ = writeln!(text, "channel std  {:.4?}", self.statistics.std);
        }
        let _ = writeln!(
            text,
            "scale        {:.5?}, shift {:.4?}",
            self.normalisation.scale, self.normalisation.shift
        );
        let _ = writeln!(text, "source       {}", c.source);
        text
    }
}

fn check_normalisation(n: &Normalisation, channels: usize) -> Result<(), String> {
    if n.shift.len() != channels || n.scale.len() != channels {
        return Err(format!("{} shifts and {} scales for {channels} channels", n.shift.len(), n.scale.len()));
    }
    if n.scale.iter().any(|s| !s.is_finite() || *s == 0.0) || n.shift.iter().any(|s| !s.is_finite()) {
        return Err("shifts must be finite, and scales finite and not 0".to_owned());
    }
    Ok(())
}
