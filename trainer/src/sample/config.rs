//! What a user sets of a sampler.

use serde::{Deserialize, Serialize};

use super::SampleError;

/// How the flow is integrated from noise (t = 1) to data (t = 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The probability flow ODE by Euler's method: one evaluation a step, first order.
    Ode,
    /// The same by Heun's method: two evaluations a step, second order; the last step is Euler's.
    OdeHeun,
    /// The reverse SDE with diffusion 2t by Euler and Maruyama's method from t = 1 to 0.04, then one
    /// step to 0 without noise.
    #[default]
    Sde,
}

/// A sampler's settings. The defaults are those of the paper's evaluation (arXiv 2410.06940).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplerConfig {
    /// The method.
    pub mode: Mode,
    /// Number of steps, at least 1.
    pub num_steps: usize,
    /// Weight w of classifier-free guidance, at least 1: uncond + w (cond - uncond). 1 is without.
    pub cfg_scale: f64,
    /// Guidance acts at times from this one...
    pub guidance_low: f64,
    /// ...to this one, both included.
    pub guidance_high: f64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { mode: Mode::Sde, num_steps: 250, cfg_scale: 1.8, guidance_low: 0.0, guidance_high: 0.7 }
    }
}

impl SamplerConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// [`SampleError::Config`] names the first key whose value cannot be used.
    pub fn validate(&self) -> Result<(), SampleError> {
        let wrong = |key, value: String, wanted| Err(SampleError::Config { key, value, wanted });
        if !(1..=100_000).contains(&self.num_steps) {
            return wrong("num_steps", self.num_steps.to_string(), "a number from 1 to 100000");
        }
        if !(self.cfg_scale >= 1.0 && self.cfg_scale.is_finite()) {
            return wrong("cfg_scale", self.cfg_scale.to_string(), "at least 1 (1 is without guidance)");
        }
        for (key, value) in [("guidance_low", self.guidance_low), ("guidance_high", self.guidance_high)] {
            if !(0.0..=1.0).contains(&value) {
                return wrong(key, value.to_string(), "a time from 0 to 1");
            }
        }
        if self.guidance_low > self.guidance_high {
            return wrong("guidance_low", self.guidance_low.to_string(), "at most guidance_high");
        }
        Ok(())
    }

    /// Whether guidance acts at time `t`.
    pub(super) fn guides(&self, t: f64) -> bool {
        self.cfg_scale > 1.0 && self.guidance_low <= t && t <= self.guidance_high
    }
}
