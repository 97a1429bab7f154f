//! Checking a whole store: digests, shapes, finite values, spreads, label range.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use rayon::prelude::*;

use super::check::{SampleDigest, check_features, check_latent};
use super::reader::{LatentStore, Shard};
use super::shard::{self, DIGESTS, file_digest};
use super::{Precision, StoreError};

/// Something that is wrong with a store.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// File name of the shard.
    pub shard: String,
    /// Sample of the store (not of the shard), where it is one sample's fault.
    pub sample: Option<u64>,
    /// What is wrong.
    pub problem: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self.sample {
            Some(sample) => write!(f, "{}: sample {sample}: {}", self.shard, self.problem),
            None => write!(f, "{}: {}", self.shard, self.problem),
        }
    }
}

/// What [`LatentStore::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// Samples that the index lists.
    pub samples: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Everything that is wrong, in the order of shards and samples; none: the store is sound.
    pub findings: Vec<Finding>,
}

impl LatentStore {
    /// Reads the whole store and checks it. `progress` hears the samples done so far, from any thread.
    /// What is wrong is in the report, not an error.
    pub fn verify(&self, progress: &(dyn Fn(u64) + Sync)) -> VerifyReport {
        if self.is_foreign() {
            return self.verify_in_place(progress);
        }
        let done = AtomicU64::new(0);
        let tick = Mutex::new(progress);
        let shards = 0..self.index().shards.len();
        let findings: Vec<Vec<Finding>> = shards
            .into_par_iter()
            .map(|number| {
                let findings = self.verify_shard(number);
                let samples = self.index().shards[number].samples;
                let total = done.fetch_add(samples, Ordering::Relaxed) + samples;
                // A poisoned lock means that another thread's progress panicked; that one is reported.
                if let Ok(tick) = tick.lock() {
                    tick(total);
                }
                findings
            })
            .collect();
        VerifyReport {
            samples: self.index().samples,
            bytes: self.index().shards.iter().map(|s| s.bytes).sum(),
            findings: findings.into_iter().flatten().collect(),
        }
    }

    /// A foreign layout has no digests: what can be checked is that every sample can be read.
    fn verify_in_place(&self, progress: &(dyn Fn(u64) + Sync)) -> VerifyReport {
        const PIECE: usize = 256;
        let spec = &self.index().contents;
        let bytes = AtomicU64::new(0);
        let check = |i: usize| -> Option<Finding> {
            let mut latent = vec![0.0; spec.stored_len()];
            let mut image = Vec::new();
            let read = self.latent(i, false, &mut latent).and_then(|()| self.label(i)).and_then(|label| {
                bytes.fetch_add(latent.len() as u64 * 4, Ordering::Relaxed);
                if spec.images {
                    self.image(i, &mut image)?;
                    bytes.fetch_add(image.len() as u64, Ordering::Relaxed);
                }
                Ok(label)
            });
            let problem = match read {
                Err(e) => Some(e.to_string()),
                Ok(label) if label as usize >= spec.classes => Some(format!("label {label} is out of range")),
                Ok(_) if spec.images => crate::images::Image::from_bytes(&image)
                    .err()
                    .map(|e| format!("its image is damaged: {e}")),
                Ok(_) => None,
            };
            problem.map(|problem| Finding {
                shard: self.dir().display().to_string(),
                sample: Some(i as u64),
                problem,
            })
        };
        let mut findings = Vec::new();
        for begin in (0..self.len()).step_by(PIECE) {
            let end = (begin + PIECE).min(self.len());
            let found: Vec<Finding> = (begin..end).into_par_iter().filter_map(check).collect();
            findings.extend(found);
            progress(end as u64);
        }
        VerifyReport { samples: self.index().samples, bytes: bytes.into_inner(), findings }
    }

    fn verify_shard(&self, number: usize) -> Vec<Finding> {
        let entry = &self.index().shards[number];
        let finding = |sample, problem| Finding { shard: entry.file.clone(), sample, problem };
        let mut findings = Vec::new();
        let whole = self.open_shard(number).and_then(|shard| {
            for (row, sample) in (0..entry.samples as usize).zip(self.start(number)..) {
                for problem in self.verify_sample(&shard, row)? {
                    findings.push(finding(Some(sample), problem));
                }
            }
            file_digest(&shard.file, &shard.path)
        });
        match whole {
            Ok(digest) if shard::hex(digest) != entry.xxh3 => {
                let digest = shard::hex(digest);
                findings.push(finding(
                    None,
                    format!("its digest is {digest} and the index says {}: the file was changed", entry.xxh3),
                ));
            }
            Ok(_) => {}
            Err(StoreError::Shard { problem, .. }) => findings.push(finding(None, problem)),
            Err(e) => findings.push(finding(None, e.to_string())),
        }
        findings
    }

    fn verify_sample(&self, shard: &Shard, row: usize) -> Result<Vec<String>, StoreError> {
        let spec = &self.index().contents;
        let fields = shard::fields(spec);
        let read = |field: usize, out: &mut [u8]| {
            let offset = shard.places.offsets[field] + row as u64 * fields[field].item;
            shard::read_exact(&shard.file, &shard.path, out, offset)
        };
        let mut problems = Vec::new();
        let label = shard.labels[row];
        let mut digest = SampleDigest::new(label);
        if label < 0 || label >= spec.classes as i64 {
            problems.push(format!(
                "label {label} is not one of the {} classes (0 to {})",
                spec.classes,
                spec.classes - 1
            ));
        }
        let first = shard::latent_field(spec);
        let mut latent = vec![0.0f32; spec.stored_len()];
        let views = if spec.flips { 2 } else { 1 };
        for view in 0..views {
            let field = first + view * (1 + spec.encoders.len());
            let mut complain = |problem: Result<(), String>| {
                let prefix = if view == 1 { "flipped: " } else { "" };
                problems.extend(problem.err().map(|p| format!("{prefix}{p}")));
            };
            match spec.precision {
                Precision::F32 => {
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut latent);
                    read(field, bytes)?;
                    digest.update(bytes);
                }
                Precision::F16 => {
                    let mut halves = vec![f16::ZERO; latent.len()];
                    let bytes = shard::f16_bytes_mut(&mut halves);
                    read(field, bytes)?;
                    digest.update(bytes);
                    halves.convert_to_f32_slice(&mut latent);
                }
            }
            complain(check_latent(spec, &latent));
            for (k, encoder) in spec.encoders.iter().enumerate() {
                let mut features = vec![f16::ZERO; encoder.tokens * encoder.dim];
                let bytes = shard::f16_bytes_mut(&mut features);
                read(field + 1 + k, bytes)?;
                digest.update(bytes);
                complain(check_features(&encoder.id, &features));
            }
        }
        if spec.images {
            let mut image = Vec::new();
            shard.image(row, &mut image)?;
            digest.update(&image);
        }
        let mut stored = [0; 8];
        read(DIGESTS, &mut stored)?;
        if u64::from_le_bytes(stored) != digest.finish() {
            problems.push("its digest does not fit its bytes: they were changed".to_owned());
        }
        Ok(problems)
    }
}
