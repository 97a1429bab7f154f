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
/// Alignment loss with one encoder (label `encoder`), mean over this rank's samples of the step.
pub const ENCODER_ALIGNMENT_LOSS: &str = "repa_encoder_alignment_loss";
/// Denoising loss where t is in one part of [0, 1] (label `timestep`), mean over this rank's samples there.
pub const TIMESTEP_DENOISING_LOSS: &str = "repa_timestep_denoising_loss";
/// Norm of all weights.
pub const PARAMETER_NORM: &str = "repa_parameter_norm";
/// Decay of the weights' moving average.
pub const EMA_DECAY: &str = "repa_ema_decay";
/// What the loss is multiplied by in float16.
pub const LOSS_SCALE: &str = "repa_loss_scale";
/// Optimizer steps of the whole run.
pub const PLANNED_STEPS: &str = "repa_planned_steps";
/// Tokens that this rank has trained on.
pub const TOKENS: &str = "repa_tokens_total";
/// Floating-point operations a second that the model needs, all ranks together.
pub const MODEL_FLOPS_PER_SECOND: &str = "repa_model_flops_per_second";
/// That over what the devices can do.
pub const MFU_RATIO: &str = "repa_mfu_ratio";
/// Bytes of the vectors that this rank has handed to collectives.
pub const COMMUNICATION_BYTES: &str = "repa_communication_bytes_total";
/// Seconds of a step spent on bringing the batch to where it is computed with.
pub const HOST_TO_DEVICE_SECONDS: &str = "repa_host_to_device_seconds";
/// Seconds that the encoders took for a batch.
pub const ENCODER_SECONDS: &str = "repa_encoder_seconds";
/// Seconds of a step spent in forward passes.
pub const FORWARD_SECONDS: &str = "repa_forward_seconds";
/// Seconds of a step spent in backward passes.
pub const BACKWARD_SECONDS: &str = "repa_backward_seconds";
/// Batches that the loader holds ready.
pub const LOADER_QUEUE_DEPTH: &str = "repa_loader_queue_depth";
/// Bytes that the loader has read.
pub const LOADER_BYTES: &str = "repa_loader_bytes_total";
/// Free bytes of the disk that a folder (label `folder`) is on.
pub const DISK_FREE_BYTES: &str = "repa_disk_free_bytes";
/// How often the job has been started again.
pub const RESTARTS: &str = "repa_restarts";
/// Used bytes of this rank's GPU.
pub const GPU_MEMORY_USED_BYTES: &str = "repa_gpu_memory_used_bytes";
/// Bytes of this rank's GPU.
pub const GPU_MEMORY_TOTAL_BYTES: &str = "repa_gpu_memory_total_bytes";
/// Part of the time in which this rank's GPU did something.
pub const GPU_UTILIZATION_RATIO: &str = "repa_gpu_utilization_ratio";
/// Seconds of a rank's own work in its last step, by `peer` and `host`, as rank 0 sees it.
pub const RANK_WORK_SECONDS: &str = "repa_rank_work_seconds";
/// Ranks that are persistently slower than the others.
pub const STRAGGLERS: &str = "repa_stragglers";
/// Seconds from a checkpoint's snapshot until it was durable.
pub const CHECKPOINT_SECONDS: &str = "repa_checkpoint_seconds";
/// Seconds that copying the state for a checkpoint kept training waiting.
pub const CHECKPOINT_SNAPSHOT_SECONDS: &str = "repa_checkpoint_snapshot_seconds";
/// Seconds for which a grid of sample images kept training waiting.
pub const SAMPLING_SECONDS: &str = "repa_sampling_seconds";
/// Step of the last durable checkpoint.
pub const CHECKPOINT_STEP: &str = "repa_checkpoint_step";
/// When the last checkpoint became durable, in seconds since 1970.
pub const CHECKPOINT_TIME: &str = "repa_checkpoint_time_seconds";
/// Saves that have failed.
pub const FAILED_CHECKPOINTS: &str = "repa_checkpoint_failures_total";
/// Bytes of checkpoints that this rank has written.
pub const CHECKPOINT_BYTES: &str = "repa_checkpoint_bytes_total";
/// Ranks of a host whose metrics its one endpoint could not get; where there is one.
pub const NODE_RANKS_MISSING: &str = "repa_node_ranks_missing";
/// When the rank ended in good order, in seconds since 1970, until then 0: a Pushgateway keeps the last.
pub const RUN_END_TIME: &str = "repa_run_end_time_seconds";
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
        (
            ENCODER_ALIGNMENT_LOSS,
            Unit::Count,
            "Alignment loss with one encoder, mean over this rank's samples of the last step",
        ),
        (
            TIMESTEP_DENOISING_LOSS,
            Unit::Count,
            "Denoising loss where t is in one part of [0, 1], mean over this rank's samples there, when it had some",
        ),
        (PARAMETER_NORM, Unit::Count, "Norm of all weights, every 50 steps; on rank 0 only"),
        (EMA_DECAY, Unit::Count, "Decay of the weights' moving average"),
        (LOSS_SCALE, Unit::Count, "What the loss is multiplied by before the backward pass in float16"),
        (PLANNED_STEPS, Unit::Count, "Optimizer steps of the whole run"),
        (
            MODEL_FLOPS_PER_SECOND,
            Unit::CountPerSecond,
            "Floating-point operations a second of the model's matrix products, all ranks together",
        ),
        (MFU_RATIO, Unit::Count, "Those over what the devices can do (telemetry.peak_tflops)"),
        (LOADER_QUEUE_DEPTH, Unit::Count, "Batches that the loader holds ready"),
        (DISK_FREE_BYTES, Unit::Bytes, "Free bytes of the disk that a folder is on; on rank 0 only"),
        (
            RANK_WORK_SECONDS,
            Unit::Seconds,
            "Own work of a rank (peer) in its last step, without waiting for other ranks; on rank 0 only",
        ),
        (
            STRAGGLERS,
            Unit::Count,
            "Ranks that are persistently slower than 1.3 times the median; on rank 0 only",
        ),
        (RESTARTS, Unit::Count, "How often the job has been started again"),
        (GPU_MEMORY_USED_BYTES, Unit::Bytes, "Used memory of this rank's GPU"),
        (GPU_MEMORY_TOTAL_BYTES, Unit::Bytes, "Memory of this rank's GPU"),
        (GPU_UTILIZATION_RATIO, Unit::Count, "Part of the time in which this rank's GPU did something"),
        (
            NODE_RANKS_MISSING,
            Unit::Count,
            "Ranks of this host whose metrics could not be had; where one rank serves for its host",
        ),
        (
            RUN_END_TIME,
            Unit::Seconds,
            "When the rank ended in good order, in seconds since 1970, until then 0; told where metrics are pushed",
        ),
        (RUN_INFO, Unit::Count, "1, with the run's name, model, version and world size as labels"),
        (RANK_INFO, Unit::Count, "1, with the rank's host, local rank and device as labels"),
    ];
    for (name, unit, help) in gauges {
        describe_gauge!(name, unit, help);
    }
    let counters = [
        (STEPS, Unit::Count, "Optimizer steps that this process has taken part in"),
        (IMAGES, Unit::Count, "Images that this rank has trained on"),
        (TOKENS, Unit::Count, "Tokens that this rank has trained on"),
        (COMMUNICATION_BYTES, Unit::Bytes, "Bytes of the vectors that this rank has handed to collectives"),
        (LOADER_BYTES, Unit::Bytes, "Bytes that this rank's loader has read"),
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
        (HOST_TO_DEVICE_SECONDS, "Part of a step spent on bringing the batch to where it is computed with"),
        (ENCODER_SECONDS, "Time that the encoders took for a batch, one batch ahead of training"),
        (FORWARD_SECONDS, "Part of a step spent in forward passes"),
        (BACKWARD_SECONDS, "Part of a step spent in backward passes"),
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
        (SAMPLING_SECONDS, "Time for which a grid of sample images kept training waiting"),
    ];
    for (name, help) in durations {
        describe_histogram!(name, Unit::Seconds, help);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_metric_has_a_help_text() {
        let (names, described) = include_str!("names.rs").split_once("pub fn describe").expect("both parts");
        let described: Vec<&str> = described.split(|c: char| !c.is_ascii_uppercase() && c != '_').collect();
        let names = names.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(": &str"));
        let missing: Vec<&str> =
            names.map(|(name, _)| name).filter(|name| !described.contains(name)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
