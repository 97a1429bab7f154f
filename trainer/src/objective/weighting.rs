//! How training times are spread.

use std::f64::consts::FRAC_PI_2;

use serde::{Deserialize, Serialize};

use super::Path;

/// A weighting that is no distribution.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("weighting.logit_normal.{key} = {value}: must be {wanted}")]
pub struct WeightingError {
    /// The key: `mean`, `std` or `shift`.
    pub key: &'static str,
    /// Its value.
    pub value: f64,
    /// What it must be.
    pub wanted: &'static str,
}

/// The distribution of the training time t.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// Uniform in [0, 1).
    #[default]
    Uniform,
    /// The ratio of noise to data, sigma / alpha, is exp(normal), as in the reference.
    Lognormal,
    /// t is logit-normal (Esser et al., arXiv 2403.03206, section 3.1), then moved to the resolution.
    LogitNormal {
        /// Mean of logit(t).
        #[serde(default)]
        mean: f64,
        /// Standard deviation of logit(t).
        #[serde(default = "one")]
        std: f64,
        /// Factor on the ratio of noise to data; 1 leaves t as it is. The same paper, section 5.3.2,
        /// takes sqrt(pixels here / pixels of the resolution that mean and std were chosen for);
        /// on the linear path t becomes shift t / (1 + (shift - 1) t).
        #[serde(default = "one")]
        shift: f64,
    },
}

fn one() -> f64 {
    1.0
}

impl Weighting {
    /// Checks the numbers of a logit-normal.
    ///
    /// # Errors
    /// Names the first one that makes no distribution.
    pub fn validate(&self) -> Result<(), WeightingError> {
        let Self::LogitNormal { mean, std, shift } = *self else { return Ok(()) };
        let error = |key, value, wanted| Err(WeightingError { key, value, wanted });
        if !mean.is_finite() {
            return error("mean", mean, "finite");
        }
        if !(std.is_finite() && std > 0.0) {
            return error("std", std, "finite and above 0");
        }
        if !(shift.is_finite() && shift > 0.0) {
            return error("shift", shift, "finite and above 0");
        }
        Ok(())
    }

    /// The time in [0, 1] that belongs to a uniform draw in [0, 1) and a standard normal draw, of
    /// which each weighting uses one. Computed in float64 without the platform's libm, so that
    /// every host gets the same bits.
    pub fn time(&self, path: Path, uniform: f32, normal: f32) -> f32 {
        let normal = f64::from(normal);
        match *self {
            Self::Uniform => uniform,
            Self::Lognormal => time_of_ratio(path, libm::exp(normal)),
            Self::LogitNormal { mean, std, shift } => {
                let odds = libm::exp(mean + std * normal);
                match path {
                    // On this path the odds of t are the ratio of noise to data.
                    Path::Linear => time_of_ratio(path, shift * odds),
                    Path::Cosine => {
                        let ratio = libm::tan(FRAC_PI_2 * time_of_ratio64(Path::Linear, odds));
                        time_of_ratio(path, shift * ratio)
                    }
                }
            }
        }
    }
}

/// The time at which sigma / alpha is `ratio`.
fn time_of_ratio(path: Path, ratio: f64) -> f32 {
    time_of_ratio64(path, ratio) as f32
}

fn time_of_ratio64(path: Path, ratio: f64) -> f64 {
    match path {
        // Not ratio / (1 + ratio), which is NaN for an infinite ratio.
        Path::Linear => 1.0 / (1.0 + 1.0 / ratio),
        Path::Cosine => libm::atan(ratio) / FRAC_PI_2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f32, b: f64) {
        assert!((f64::from(a) - b).abs() < 1e-6, "{a} is not {b}");
    }

    #[test]
    fn uniform_times_are_the_draw_itself() {
        assert_eq!(Weighting::Uniform.time(Path::Cosine, 0.37, 9.0), 0.37);
    }

    #[test]
    fn lognormal_gives_the_ratio_of_noise_to_data() {
        for normal in [-2.5f32, -0.3, 0.0, 1.7] {
            let sigma = f64::from(normal).exp();
            close(Weighting::Lognormal.time(Path::Linear, 0.5, normal), sigma / (1.0 + sigma));
            close(Weighting::Lognormal.time(Path::Cosine, 0.5, normal), sigma.atan() / FRAC_PI_2);
        }
    }

    #[test]
    fn logit_normal_times_have_normal_logits_on_both_paths() {
        let weighting = Weighting::LogitNormal { mean: -0.4, std: 1.3, shift: 1.0 };
        for normal in [-2.0f32, 0.0, 0.9] {
            let logit = -0.4 + 1.3 * f64::from(normal);
            for path in [Path::Linear, Path::Cosine] {
                close(weighting.time(path, 0.5, normal), 1.0 / (1.0 + (-logit).exp()));
            }
        }
    }

    #[test]
    fn the_shift_multiplies_the_ratio_of_noise_to_data() {
        let plain = Weighting::LogitNormal { mean: 0.0, std: 1.0, shift: 1.0 };
        let shifted = Weighting::LogitNormal { mean: 0.0, std: 1.0, shift: 3.0 };
        for normal in [-1.0f32, 0.0, 2.0] {
            let t = f64::from(plain.time(Path::Linear, 0.0, normal));
            close(shifted.time(Path::Linear, 0.0, normal), 3.0 * t / (1.0 + 2.0 * t));
            let ratio = |t: f32| (FRAC_PI_2 * f64::from(t)).tan();
            let (before, after) = (
                ratio(plain.time(Path::Cosine, 0.0, normal)),
                ratio(shifted.time(Path::Cosine, 0.0, normal)),
            );
            assert!((after / before - 3.0).abs() < 1e-4, "{before} {after}");
        }
    }

    #[test]
    fn extreme_draws_stay_within_the_unit_interval() {
        let wide = Weighting::LogitNormal { mean: 0.0, std: 1000.0, shift: 10.0 };
        for weighting in [Weighting::Lognormal, wide] {
            for path in [Path::Linear, Path::Cosine] {
                for normal in [-800.0f32, -8.0, 8.0, 800.0] {
                    let t = weighting.time(path, 0.0, normal);
                    assert!((0.0..=1.0).contains(&t), "{weighting:?} {path:?} {normal}: {t}");
                    assert_eq!(t > 0.5, normal > 0.0, "{weighting:?} {path:?} {normal}: {t}");
                }
            }
        }
    }

    #[test]
    fn config_spelling_and_defaults() {
        let read = |json: &str| serde_json::from_str::<Weighting>(json).unwrap();
        assert_eq!(read("\"lognormal\""), Weighting::Lognormal);
        assert_eq!(
            read(r#"{"logit_normal": {"mean": 0.5}}"#),
            Weighting::LogitNormal { mean: 0.5, std: 1.0, shift: 1.0 }
        );
        assert_eq!(serde_json::to_string(&Path::Cosine).unwrap(), "\"cosine\"");
    }

    #[test]
    fn a_logit_normal_without_width_is_refused() {
        let error = Weighting::LogitNormal { mean: 0.0, std: 0.0, shift: 1.0 }.validate().unwrap_err();
        assert_eq!(error.to_string(), "weighting.logit_normal.std = 0: must be finite and above 0");
        let error = Weighting::LogitNormal { mean: 0.0, std: 1.0, shift: f64::NAN }.validate().unwrap_err();
        assert!(error.to_string().contains("shift"));
        Weighting::Lognormal.validate().unwrap();
    }
}
