//! `scores`: what ADM's evaluator gives for two batches of images, with Inception's weights by a formula.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use repa_comm::Single;
use repa_tests::inception::weights;
use repa_trainer::data::source::npy;
use repa_trainer::evaluate::{Batch, GaussianStatistics, Inception, Samples, Scores, score};
use repa_trainer::figures::NpzWriter;
use zip::write::SimpleFileOptions;
use zip::{ZipArchive, ZipWriter};

use crate::case::{Case, device_for, slack};
use crate::inception::images;

/// Relative error that rounding may make in Fréchet distances and the inception score.
const TOLERANCE: f64 = 1e-4;

/// By way of files, as commands get them.
pub fn check(case: &Case) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let at = |name: &str| folder.path().join(name);
    let inception = Inception::from_weights(weights(), &device_for(36)).map_err(|e| e.to_string())?;
    let (reference, samples) = (batch(case, "reference", &at("a"))?, batch(case, "samples", &at("b"))?);
    let between = |reference: &Batch, samples: &Batch| {
        let scores = score(&Single::new(), &inception, reference, &Samples::Stored(samples), |_| {});
        scores.map_err(|e| e.to_string())?.ok_or_else(|| "rank 0 has no scores".to_owned())
    };
    let expect = |what: &str, ours: Option<f64>, tolerance: f64| {
        let (ours, expected) = (ours.ok_or(format!("{what} is missing"))?, case.f64s(what)[0]);
        match (ours - expected).abs() <= tolerance * slack() * expected.abs() {
            true => Ok(()),
            false => Err(format!("{what} is {ours} where the reference has {expected}")),
        }
    };
    let distances = |scores: &Scores| {
        expect("fid", Some(scores.fid), TOLERANCE)?;
        expect("sfid", scores.sfid, TOLERANCE)?;
        expect("inception_score", Some(scores.inception_score), TOLERANCE)
    };
    // Fractions of 16 and of 20 points.
    let fractions = |scores: &Scores| {
        expect("precision", scores.precision, 1e-3)?;
        expect("recall", scores.recall, 1e-3)
    };
    let scores = between(&reference, &samples)?;
    distances(&scores)?;
    fractions(&scores)?;

    // ADM's reference batches come with statistics, which go before images, and may come without images.
    let features = inception.features(&images(case, "reference"));
    let statistics = [
        ("mu", "sigma", &features.pooled, Inception::POOLED),
        ("mu_s", "sigma_s", &features.spatial, Inception::SPATIAL),
    ];
    let mut files = Vec::new();
    for (mean, covariance, features, width) in statistics {
        let mut gathered = GaussianStatistics::new(width);
        gathered.add_f32(features).map_err(|e| e.to_string())?;
        files.push((mean, float64(&[width], gathered.mean())));
        files
            .push((covariance, float64(&[width, width], &gathered.covariance().map_err(|e| e.to_string())?)));
    }
    let alone = archive(&at("alone"), &files).map_err(|e| e.to_string())?;
    let scores = between(&alone, &samples)?;
    distances(&scores)?;
    if scores.precision.or(scores.recall).is_some() || scores.reference_images != 0 {
        return Err(format!("{scores:?} without images to compare with"));
    }
    files.push(("arr_0", pixels(&at("b")).map_err(|e| e.to_string())?));
    let with_others = archive(&at("with others' images"), &files).map_err(|e| e.to_string())?;
    // The images are the samples' own, and would be at no distance.
    distances(&between(&with_others, &samples)?)?;
    // Here the statistics would be the reference's, as those that it is compared with.
    let none = between(&alone, &with_others)?;
    match none.fid < TOLERANCE && none.sfid.is_some_and(|sfid| sfid < TOLERANCE) {
        true => Ok(()),
        false => Err(format!("{none:?} between equal statistics")),
    }
}

fn batch(case: &Case, name: &str, path: &Path) -> Result<Batch, String> {
    let shape = case.shape(name);
    let mut writer = NpzWriter::create(path, shape[0], shape[1], shape[2]).map_err(|e| e.to_string())?;
    images(case, name).iter().try_for_each(|image| writer.push(image)).map_err(|e| e.to_string())?;
    writer.finish().map_err(|e| e.to_string())?;
    Batch::open(path).map_err(|e| e.to_string())
}

/// A float64 array as NumPy writes it.
fn float64(shape: &[usize], values: &[f64]) -> Vec<u8> {
    let mut bytes = npy::header("<f8", shape);
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

fn archive(path: &Path, files: &[(&str, Vec<u8>)]) -> Result<Batch, Box<dyn std::error::Error>> {
    let mut zip = ZipWriter::new(File::create(path)?);
    for (name, bytes) in files {
        zip.start_file(format!("{name}.npy"), SimpleFileOptions::default())?;
        zip.write_all(bytes)?;
    }
    zip.finish()?;
    Ok(Batch::open(path)?)
}

/// A batch's `arr_0`.
fn pixels(path: &Path) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let mut bytes = Vec::new();
    ZipArchive::new(File::open(path)?)?.by_name("arr_0.npy")?.read_to_end(&mut bytes)?;
    Ok(bytes)
}
