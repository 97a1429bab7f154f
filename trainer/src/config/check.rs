//! Values that are of the right type and still cannot work.

use super::{Config, ConfigError, TrainingSamples};
use crate::checkpoint::storage::{check_url, is_url};
use crate::model::{ModelError, Precision};
use crate::sample::SampleError;
use crate::telemetry::push;

impl Config {
    /// Checks what can be known without the data, the ranks or the device.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let train = &self.train;
        positive("train.steps", train.steps)?;
        positive("train.global_batch", train.global_batch as u64)?;
        positive("data.queue_depth", self.data.queue_depth as u64)?;
        positive("comm.bucket_mib", self.comm.bucket_mib as u64)?;
        if self.comm.bucket_mib > 1 << 14 {
            return Err(ConfigError::value(
                "comm.bucket_mib",
                self.comm.bucket_mib,
                "it must be 16384 or less",
            ));
        }
        if is_url(&self.run.dir) {
            let problem = "it must be a folder, for logs and the lock; checkpoint.dir alone may be a URL";
            return Err(ConfigError::value("run.dir", self.run.dir.display(), problem));
        }
        check_url(&self.checkpoint.dir).map_err(|problem| {
            ConfigError::value("checkpoint.dir", self.checkpoint.dir.display(), problem)
        })?;
        positive("checkpoint.keep", self.checkpoint.keep as u64)?;
        let metrics = crate::telemetry::record::MEANS.map(|(name, _)| name);
        let metric = self.checkpoint.best_metric.as_str();
        if !metrics.contains(&metric) {
            let known = format!("known are {}", metrics.join(", "));
            return Err(ConfigError::value("checkpoint.best_metric", metric, known));
        }
        positive("sample.batch", self.sample.batch as u64)?;
        self.check_training_samples()?;
        if train.steps.checked_mul(train.global_batch as u64).is_none_or(|samples| samples >> 56 != 0) {
            return Err(ConfigError::value(
                "train.steps",
                train.steps,
                format!("with train.global_batch = {} it passes 2^56 samples", train.global_batch),
            ));
        }
        unit("objective.label_drop", f64::from(self.objective.label_drop))?;
        let optimizer = &self.optimizer;
        unit("optimizer.ema_decay", optimizer.ema_decay)?;
        below_one("optimizer.beta1", optimizer.beta1)?;
        below_one("optimizer.beta2", optimizer.beta2)?;
        for (key, value) in [
            ("comm.timeout_seconds", self.comm.timeout_seconds),
            ("telemetry.push_seconds", self.telemetry.push_seconds),
            ("optimizer.learning_rate", optimizer.learning_rate),
            ("optimizer.epsilon", optimizer.epsilon),
            ("optimizer.max_grad_norm", optimizer.max_grad_norm),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::value(key, value, "it must be above 0"));
            }
        }
        for (key, value) in [
            ("telemetry.peak_tflops", self.telemetry.peak_tflops),
            ("train.step_timeout_seconds", train.step_timeout_seconds),
            ("checkpoint.every_minutes", self.checkpoint.every_minutes),
            ("optimizer.weight_decay", optimizer.weight_decay),
            ("alignment.coefficient", self.alignment.coefficient),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::value(key, value, "it must be 0 or more"));
            }
        }
        let alignment = &self.alignment;
        if !alignment.encoders.is_empty() && alignment.encoders.len() != alignment.z_dims.len() {
            return Err(ConfigError::value(
                "alignment.encoders",
                alignment.encoders.len(),
                format!(
                    "it names one weight file for each width of alignment.z_dims, {:?}",
                    alignment.z_dims
                ),
            ));
        }
        self.sit().validate().map_err(|e| model_error(&e))?;
        self.sample.solver.validate().map_err(|e| solver_error(&e))?;
        self.objective.weighting().validate().map_err(|e| {
            ConfigError::value(
                &format!("objective.logit_{}", e.key),
                e.value,
                format!("it must be {}", e.wanted),
            )
        })?;
        let push_url = self.telemetry.push_url.as_str();
        if !push_url.is_empty() {
            push::parse(push_url)
                .map_err(|problem| ConfigError::value("telemetry.push_url", push_url, problem))?;
        }
        let device = &self.device;
        let wgpu = device.0 == "wgpu";
        if !device.is_cpu() && !device.is_cuda() && !wgpu {
            return Err(ConfigError::value("device", &device.0, "known are cpu, cuda, cuda:N and wgpu"));
        }
        if wgpu && train.precision != Precision::F32 {
            let problem = "device=wgpu computes in f32 only";
            let named = format!("{:?}", train.precision).to_lowercase();
            return Err(ConfigError::value("train.precision", named, problem));
        }
        Ok(())
    }

    fn check_training_samples(&self) -> Result<(), ConfigError> {
        let TrainingSamples { classes, per_class, num_steps, .. } = self.sample.training;
        positive("sample.training.classes", classes as u64)?;
        positive("sample.training.per_class", per_class as u64)?;
        positive("sample.training.num_steps", num_steps as u64)?;
        let most = TrainingSamples::MOST;
        if classes.checked_mul(per_class).is_none_or(|images| images > most) {
            let problem =
                format!("with sample.training.classes = {classes} a grid has more than {most} images");
            return Err(ConfigError::value("sample.training.per_class", per_class, problem));
        }
        if num_steps > 1000 {
            let problem = "training waits for each grid: it must be 1000 or less";
            return Err(ConfigError::value("sample.training.num_steps", num_steps, problem));
        }
        Ok(())
    }
}

/// N of `cuda:N`.
pub(crate) fn cuda_index(device: &str) -> Option<usize> {
    device.strip_prefix("cuda:")?.parse().ok()
}

fn model_error(error: &ModelError) -> ConfigError {
    match error {
        ModelError::Invalid { key, value, problem } => {
            let section = if ALIGNMENT_KEYS.contains(key) { "alignment" } else { "model" };
            ConfigError::value(&format!("{section}.{key}"), value, format!("it {problem}"))
        }
        ModelError::UnknownPreset { name, known } => {
            ConfigError::value("model.preset", name, format!("known are {known}"))
        }
    }
}

/// Keys of the model that the configuration has under `alignment`.
const ALIGNMENT_KEYS: [&str; 3] = ["encoder_depth", "projector_dim", "z_dims"];

fn solver_error(error: &SampleError) -> ConfigError {
    match error {
        SampleError::Config { key, value, wanted } => {
            ConfigError::value(&format!("sample.solver.{key}"), value, format!("it must be {wanted}"))
        }
        other => ConfigError::value("sample.solver", "", other.to_string()),
    }
}

fn positive(key: &str, value: u64) -> Result<(), ConfigError> {
    if value == 0 { Err(ConfigError::value(key, value, "it must be 1 or more")) } else { Ok(()) }
}

fn unit(key: &str, value: f64) -> Result<(), ConfigError> {
    if (0.0..=1.0).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::value(key, value, "it must lie in [0, 1]"))
    }
}

fn below_one(key: &str, value: f64) -> Result<(), ConfigError> {
    if (0.0..1.0).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::value(key, value, "it must lie in [0, 1)"))
    }
}
