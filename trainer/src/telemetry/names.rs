//! Every metric's name and help text. The prefix is `repa_`, units are base units.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Mean loss of the step: denoising + coefficient x alignment.
pub const LOSS: &str = "repa_loss";
/// Mean denoising loss of the step.
pub const DENOISING_LOSS: &str = "repa_denoising_loss";
/// Mean alignment loss of the step.
pub const ALIGNMENT_LOSS: &str = "repa_alignment_loss";
/// Global gradient norm before clipping.
pub const GRADIENT_NORM: &str = "repa_gradient_norm";
/// Learning rate of the step.
pub const LEARNING_RATE: &str = "repa_learning_rate";
/// Optimizer steps done, counted from the run's beginning.
pub const STEP: &str = "repa_step";
/// Optimizer steps that this process has taken part in.
pub const STEPS: &str = "repa_steps_total";
/// Images that this rank has trained on.
pub const IMAGES: &str = "repa_images_total";
/// Images that all ranks train on in a second.
pub const IMAGES_PER_SECOND: &str = "repa_images_per_second";
/// Steps left out because the gradient was not finite.
pub const SKIPPED_STEPS: &str = "repa_skipped_steps_total";
/// Seconds of a step.
pub const STEP_SECONDS: &str = "repa_step_seconds";
/// Seconds of a step spent waiting for data.
pub const DATA_WAIT_SECONDS: &str = "repa_data_wait_seconds";
/// Seconds of a step spent in the forward and backward pass.
pub const COMPUTE_SECONDS: &str = "repa_compute_seconds";
/// Seconds of a step spent in collectives that nothing hid, waiting for other ranks included.
pub const COMMUNICATION_SECONDS: &str = "repa_communication_seconds";
/// Seconds that a step's collectives took, behind computation or not.
pub const COMMUNICATION_BUSY_SECONDS: &str = "repa_communication_busy_seconds";
/// Seconds of a step spent in clipping, AdamW and EMA.
pub const OPTIMIZER_SECONDS: &str = "repa_optimizer_seconds";
/// Seconds of a rank's own work in its last step, by `peer` and `host`, as rank 0 sees it.
pub const RANK_WORK_SECONDS: &str = "repa_rank_work_seconds";
/// Ranks that are persistently slower than the others.
pub const STRAGGLERS: &str = "repa_stragglers";
/// Seconds from a checkpoint's snapshot until it was durable.
pub const CHECKPOINT_SECONDS: &str = "repa_checkpoint_seconds";
/// Seconds that copying the state for a checkpoint kept training waiting.
pub const CHECKPOINT_SNAPSHOT_SECONDS: &str = "repa_checkpoint_snapshot_seconds";
/// Step of the last durable checkpoint.
pub const CHECKPOINT_STEP: &str = "repa_checkpoint_step";
/// When the last checkpoint became durable, in seconds since 1970.
pub const CHECKPOINT_TIME: &str = "repa_checkpoint_time_seconds";
/// Saves that have failed.
pub const FAILED_CHECKPOINTS: &str = "repa_checkpoint_failures_total";
/// Bytes of checkpoints that this rank has written.
pub const CHECKPOINT_BYTES: &str = "repa_checkpoint_bytes_total";
/// 1, with the run's name, model, version and world size as labels.
pub const RUN_INFO: &str = "repa_run_info";
/// 1, with the rank's host, local rank and device as labels.
pub const RANK_INFO: &str = "repa_rank_info";

/// Bucket bounds, in seconds, of every duration.
pub const SECONDS_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Tells the recorder the help text and unit of every metric.
pub fn describe() {
    let gauges = [
        (
            LOSS,
            Unit::Count,
            "Loss of the last step: denoising + coefficient x alignment, mean over the global batch",
        ),
        (DENOISING_LOSS, Unit::Count, "Denoising loss of the last step, mean over the global batch"),
        (ALIGNMENT_LOSS, Unit::Count, "Alignment loss of the last step, mean over the global batch"),
        (GRADIENT_NORM, Unit::Count, "Global gradient norm of the last step, before clipping"),
        (LEARNING_RATE, Unit::Count, "Learning rate of the last step"),
        (STEP, Unit::Count, "Optimizer steps done since the run began"),
        (IMAGES_PER_SECOND, Unit::CountPerSecond, "Images trained on per second, all ranks together"),
        (
            CHECKPOINT_STEP,
            Unit::Count,
            "Step of the last durable checkpoint that this process has seen saved",
        ),
        (CHECKPOINT_TIME, Unit::Seconds, "When that checkpoint became durable, in seconds since 1970"),
        (RUN_INFO, Unit::Count, "1, with the run's name, model, version and world size as labels"),
        (RANK_INFO, Unit::Count, "1, with the rank's host, local rank and device as labels"),
    ];
    for (name, unit, help) in gauges {
        describe_gauge!(name, unit, help);
    }
    let counters = [
        (STEPS, Unit::Count, "Optimizer steps that this process has taken part in"),
        (IMAGES, Unit::Count, "Images that this rank has trained on"),
        (SKIPPED_STEPS, Unit::Count, "Steps left out because the gradient was not finite"),
        (FAILED_CHECKPOINTS, Unit::Count, "Checkpoints that could not be saved"),
        (CHECKPOINT_BYTES, Unit::Bytes, "Bytes of checkpoints that this rank has written"),
    ];
    for (name, unit, help) in counters {
        describe_counter!(name, unit, help);
    }
    let durations = [
        (STEP_SECONDS, "Duration of a step"),
        (DATA_WAIT_SECONDS, "Part of a step spent waiting for data"),
        (COMPUTE_SECONDS, "Part of a step spent in the forward and backward pass"),
        (
            COMMUNICATION_SECONDS,
            "Part of a step spent in collectives that nothing hid, waiting for other ranks included",
        ),
        (
            COMMUNICATION_BUSY_SECONDS,
            "Time that a step's collectives took, hidden behind computation or not, waiting for other ranks included",
        ),
        (OPTIMIZER_SECONDS, "Part of a step spent in clipping, AdamW and EMA"),
        (CHECKPOINT_SECONDS, "Time from a checkpoint's snapshot until it was durable, behind training"),
        (CHECKPOINT_SNAPSHOT_SECONDS, "Time for which a checkpoint's snapshot kept training waiting"),
    ];
    for (name, help) in durations {
        describe_histogram!(name, Unit::Seconds, help);
    }
}
