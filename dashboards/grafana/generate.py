#!/usr/bin/env python3
"""Writes dashboards/*.json beside this file. With --check, says which of them it would change, and fails."""

import json
import pathlib
import sys

sys.dont_write_bytecode = True

import panels as p  # noqa: E402

RANK = "{{run}} rank {{rank}}"
FROM_0 = {"min": 0}
PARTS = [
    ("data wait", "repa_data_wait_seconds"),
    ("host to device", "repa_host_to_device_seconds"),
    ("forward", "repa_forward_seconds"),
    ("backward", "repa_backward_seconds"),
    ("communication, exposed", "repa_communication_seconds"),
    ("optimizer", "repa_optimizer_seconds"),
]


def gauge(name):
    """A gauge that is the same on all ranks, or only on one."""
    return p.by_run("max", p.series(name))


def breakdown():
    parts = [p.target(p.mean(metric), f"{{{{run}}}} {name}") for name, metric in PARTS]
    known = " - ".join(f"({p.mean(metric)})" for _, metric in PARTS)
    rest = p.target(f"clamp_min({p.mean('repa_step_seconds')} - {known}, 0)", "{{run}} other")
    return [*parts, rest]


def quantile(q, name):
    return p.target(
        f"histogram_quantile({q}, {p.by_run('sum', p.rate('repa_step_seconds_bucket'), 'le')})", f"{{{{run}}}} {name}"
    )


def training():
    left = f"({gauge('repa_planned_steps')} - {gauge('repa_step')}) / {p.by_run('max', p.rate('repa_steps_total'))}"
    return p.dashboard("repa-training", "repa-dist / Training", "How a run learns, and how fast.", [
        p.row("Overview"),
        p.number("Progress", "Steps done, as a part of the steps planned.", "percentunit",
                 f"{gauge('repa_step')} / {gauge('repa_planned_steps')}", decimals=1),
        p.number("Step", "Optimizer steps done since the run began.", "locale", gauge("repa_step")),
        p.number("Time left", "Steps left at the present pace.", "s", left),
        p.number("Loss", "Denoising loss + coefficient x alignment loss of the last step.", "none", gauge("repa_loss"),
                 decimals=4),
        p.number("Throughput", "Images that all ranks together train on in a second.", "suffix:images/s",
                 p.by_run("sum", p.rate("repa_images_total")), decimals=0),
        p.number("Ranks", "Ranks that serve metrics.", "none",
                 f'count by (run) ({p.INFO})'),
        p.row("Losses"),
        p.lines("Loss", "Denoising loss + coefficient x alignment loss, mean over the global batch.", "none",
                [gauge("repa_loss")], calcs=p.MEAN_AND_LAST),
        p.lines("Denoising loss", "Mean squared error of the velocity, mean over the global batch.", "none",
                [gauge("repa_denoising_loss")], calcs=p.MEAN_AND_LAST),
        p.lines("Alignment loss", "Negative mean cosine similarity with the encoders' tokens: -1 is best.", "none",
                [gauge("repa_alignment_loss")], calcs=p.MEAN_AND_LAST),
        p.lines("Alignment loss by encoder", "With each encoder, in the order of the configuration; mean over the "
                "ranks.", "none",
                [p.target(p.by_run("avg", p.series("repa_encoder_alignment_loss"), "encoder"),
                          "{{run}} encoder {{encoder}}")], 12),
        p.lines("Denoising loss by timestep", "By the quarter that the sample's t lies in, from data (0) to noise (1); "
                "mean over the ranks.", "none",
                [p.target(p.by_run("avg", p.series("repa_timestep_denoising_loss"), "timestep"),
                          "{{run}} t {{timestep}}")], 12, aside=True),
        p.row("Optimization"),
        p.lines("Gradient norm", "Global norm before clipping.", "none", [gauge("repa_gradient_norm")], log=True,
                calcs=p.MEAN_AND_LAST),
        p.lines("Parameter norm", "Norm of all weights, every 50 steps.", "none", [gauge("repa_parameter_norm")]),
        p.lines("Learning rate", "Of the last step.", "sci", [gauge("repa_learning_rate")]),
        p.lines("EMA decay", "Decay of the weights' moving average.", "none", [gauge("repa_ema_decay")], 12, 7,
                defaults={"decimals": 5}),
        p.lines("Loss scale", "What the loss is multiplied by before the backward pass. Only in float16.", "locale",
                [gauge("repa_loss_scale")], 12, 7, log=True),
        p.row("Throughput"),
        p.lines("Images per second", "All ranks together.", "suffix:images/s",
                [p.by_run("sum", p.rate("repa_images_total"))], calcs=p.MEAN_AND_LAST, defaults=FROM_0),
        p.lines("Tokens per second", "Tokens of the transformer, all ranks together.", "si: tokens/s",
                [p.by_run("sum", p.rate("repa_tokens_total"))], calcs=p.MEAN_AND_LAST, defaults=FROM_0),
        p.lines("Model FLOP/s", "Operations that the model's matrix products need, all ranks together.", "flops",
                [gauge("repa_model_flops_per_second")], calcs=p.MEAN_AND_LAST, defaults=FROM_0),
        p.lines("Model FLOPs utilization (MFU)", "Model FLOP/s over what the devices can do. Only where "
                "telemetry.peak_tflops is set.", "percentunit", [gauge("repa_mfu_ratio")], calcs=p.MEAN_AND_LAST,
                defaults=FROM_0),
        p.lines("Step time", "Median and 99th percentile over all ranks, as far as the buckets tell.", "s",
                [quantile(0.5, "median"), quantile(0.99, "99 %")]),
        p.lines("Encoder time", "What the frozen encoders take for a batch, one batch ahead of training. Only with "
                "features computed as training goes.", "s", [p.mean("repa_encoder_seconds")]),
        p.lines("Step time by part", "Mean over all ranks. Communication is what the backward pass did not hide.", "s",
                breakdown(), 24, 10, stack=True, aside=True, calcs=p.MEAN_AND_LAST),
    ])


def share(metric, ranks=False, *labels):
    part, whole = (p.by_run("sum", p.rate(f"{name}_sum", ranks), *labels) for name in (metric, "repa_step_seconds"))
    return f"{part} / {whole}"


def cluster():
    work = f"rate({p.series('repa_step_seconds_sum')}[$__rate_interval])"
    work = f"({work} - {p.rate('repa_communication_seconds_sum')}) / {p.rate('repa_step_seconds_count')}"
    exposed = p.by_run("sum", p.rate("repa_communication_seconds_sum"))
    busy = p.by_run("sum", p.rate("repa_communication_busy_seconds_sum"))
    return p.dashboard("repa-cluster", "repa-dist / Cluster", "How the ranks, their hosts and devices do.", [
        p.row("Overview"),
        p.number("Ranks", "Ranks that serve metrics.", "none", f"count by (run) ({p.INFO})"),
        p.number("Ranks that do not answer", "Addresses of any run's target file where nothing answers.", "none",
                 f'count({p.series("up")} == 0) or vector(0)', 5, thresholds=p.steps("green", 1, "red")),
        p.number("Stragglers", "Ranks that are persistently slower than the others in their own work.", "none",
                 gauge("repa_stragglers"), 5, thresholds=p.steps("green", 1, "orange")),
        p.number("Waiting for data", "Part of the ranks' time.", "percentunit", share("repa_data_wait_seconds"), 5,
                 thresholds=p.steps("green", 0.1, "orange", 0.2, "red"), decimals=1),
        p.number("Communication, exposed", "Part of the ranks' time in collectives that nothing hid, waiting for other "
                 "ranks included.", "percentunit", share("repa_communication_seconds"), 5, decimals=1),
        p.row("Ranks"),
        p.heatmap("Own work by rank", "A step without what the rank waits for others. A row that is lighter or darker "
                  "than the rest is a rank to look at. Choose one run.", "s",
                  p.target(p.rows(f"({work}) {p.JOIN}"), "{{row}}")),
        p.heatmap("Step time by rank", "All of a step. Ranks wait for each other, so that rows look alike. Choose one "
                  "run.", "s",
                  p.target(p.rows(f"({p.rate('repa_step_seconds_sum')} / {p.rate('repa_step_seconds_count')}) "
                                  f"{p.JOIN}"), "{{row}}")),
        p.lines("Own work by rank, as rank 0 sees it", "From the status board, once a second: the last step of each "
                "rank.", "s", [p.target(p.by_run("max", p.series("repa_rank_work_seconds"), "peer", "host"),
                                        "{{run}} rank {{peer}} on {{host}}")], 12, many=True),
        p.heatmap("Step times", "How often a step took how long, all ranks together.", "none",
                  p.target(f"sum by (le) (increase({p.series('repa_step_seconds_bucket')}[$__rate_interval]) {p.JOIN})",
                           "{{le}}", format="heatmap"), height=8, scheme="Spectral", axis={"unit": "s"}),
        p.table("Who is where", "Each rank's address, host and device.", "none",
                f'{p.series("repa_rank_info", True)} * on (job, instance, rank) group_left (run, model, version) {p.INFO}',
                ["Value"], {"instance": "Address", "node": "Host", "rank": "Rank", "local_rank": "Local rank",
                            "device": "Device", "run": "Run", "model": "Model", "version": "Version"},
                ["run", "rank", "node", "local_rank", "device", "instance", "model", "version"], sort="Rank"),
        p.row("Communication"),
        p.lines("Collectives of a step", "Busy: all of the time in which one ran. Exposed: the part that nothing hid. "
                "Both include waiting for other ranks.", "s",
                [p.target(p.mean("repa_communication_busy_seconds"), "{{run}} busy"),
                 p.target(p.mean("repa_communication_seconds"), "{{run}} exposed")]),
        p.lines("Hidden part of communication", "What of the collectives' time the backward pass covers.",
                "percentunit", [f"clamp_min(1 - {exposed} / {busy}, 0)"]),
        p.lines("Communication by rank, exposed", "The rank with the least is the one that the others wait for.", "s",
                [p.target(p.mean("repa_communication_seconds", "rank", ranks=True), RANK)], many=True),
        p.lines("Bytes handed to collectives", "A rank's vectors, mean over the ranks.", "Bps",
                [p.by_run("avg", p.rate("repa_communication_bytes_total"))], 12),
        p.lines("Bandwidth of collectives", "A rank's bytes over the time in which its collectives ran, mean over the "
                "ranks.", "Bps",
                [f"{p.by_run('sum', p.rate('repa_communication_bytes_total'))} / {busy}"], 12),
        p.row("Data"),
        p.lines("Waiting for data by rank", "Part of the rank's time.", "percentunit",
                [p.target(share("repa_data_wait_seconds", True, "rank"), RANK)], many=True),
        p.lines("Batches held ready", "By the rank's loader. At 0, training waits for data.", "none",
                [p.target(p.by_rank(p.series("repa_loader_queue_depth", True)), RANK)], many=True, defaults=FROM_0),
        p.lines("Loader reads", "Bytes that the rank's loader reads in a second.", "Bps",
                [p.target(p.by_rank(p.rate("repa_loader_bytes_total", True)), RANK)], many=True),
        p.row("Processes"),
        p.lines("CPU", "Cores' worth of time that the rank takes.", "suffix:cores",
                [p.target(p.by_rank(p.rate("process_cpu_seconds_total", True)), RANK)], many=True,
                defaults={"decimals": 2, "min": 0}),
        p.lines("Memory", "Resident memory of the rank.", "bytes",
                [p.target(p.by_rank(p.series("process_resident_memory_bytes", True)), RANK)], many=True,
                defaults=FROM_0),
        p.lines("Threads", "Of the rank.", "none",
                [p.target(p.by_rank(p.series("process_threads", True)), RANK)], many=True, defaults=FROM_0),
        p.lines("Open files", "Part of the number that the rank may open.", "percentunit",
                [p.target(p.by_rank(f"({p.series('process_open_fds', True)} / {p.series('process_max_fds', True)})"),
                          RANK)], 12, many=True),
        p.lines("Time since start", "Of the rank's process.", "s",
                [p.target(p.by_rank(f"(time() - {p.series('process_start_time_seconds', True)})"), RANK)], 12,
                many=True),
        p.row("GPUs"),
        p.lines("GPU utilization", "Part of the time in which the rank's GPU did something. Only on CUDA.",
                "percentunit", [p.target(p.by_rank(p.series("repa_gpu_utilization_ratio", True)), RANK)], many=True,
                defaults={"min": 0, "max": 1}),
        p.lines("GPU memory", "Used, of the rank's GPU. Only on CUDA.", "bytes",
                [p.target(p.by_rank(p.series("repa_gpu_memory_used_bytes", True)), RANK)], many=True),
        p.lines("GPU memory in use", "Part of the rank's GPU's memory. Only on CUDA.", "percentunit",
                [p.target(p.by_rank(f"({p.series('repa_gpu_memory_used_bytes', True)} / "
                                    f"{p.series('repa_gpu_memory_total_bytes', True)})"), RANK)], many=True),
    ])


def reliability():
    age = f"time() - {gauge('repa_checkpoint_time_seconds')}"
    at_risk = f"{gauge('repa_step')} - {gauge('repa_checkpoint_step')}"
    skipped = p.by_run("max", f"increase({p.series('repa_skipped_steps_total')}[$__range])")
    # A process that has not failed yet may not show the counter.
    no_failure = f"0 * {p.series('repa_step')}"
    failed = f"increase({p.series('repa_checkpoint_failures_total')}"
    failures = p.by_run("max", f"({failed}[$__range]) or {no_failure})")
    alerts = 'ALERTS{alertname=~"Repa.+", job=~"$job", run=~"$run|"}'
    return p.dashboard("repa-reliability", "repa-dist / Reliability", "What a run would lose, and what went wrong.", [
        p.row("Overview"),
        p.number("Alerts", "Alerts of any run that fire now.", "none",
                 f'count({alerts[:-1]}, alertstate="firing"}}) or vector(0)', thresholds=p.steps("green", 1, "red")),
        p.number("Last checkpoint", "Step of the last durable one.", "locale", gauge("repa_checkpoint_step")),
        p.number("Checkpoint age", "Time since the last one became durable.", "s", age,
                 thresholds=p.steps("green", 7200, "orange", 14400, "red")),
        p.number("Failed saves", "In the time shown.", "none", failures,
                 thresholds=p.steps("green", 0.5, "red"), decimals=0),
        p.number("Skipped steps", "In the time shown, because the gradient was not finite.", "none", skipped,
                 thresholds=p.steps("green", 0.5, "orange"), decimals=0),
        p.number("Restarts", "How often the job has been started again.", "none", gauge("repa_restarts"),
                 thresholds=p.steps("text", 1, "orange")),
        p.row("Checkpoints"),
        p.lines("Age of the last checkpoint", "Time since it became durable.", "s", [age]),
        p.lines("Steps at risk", "Steps since the last durable checkpoint: what a failure now would cost.", "locale",
                [at_risk]),
        p.lines("Saves that failed", "In the time from one point to the next.", "none",
                [p.by_run("max", f"({failed}[$__rate_interval]) or {no_failure})")], top=1, defaults=FROM_0),
        p.lines("Time of a save", "From the snapshot until the checkpoint was durable, while training goes on. Mean.",
                "s", [p.mean("repa_checkpoint_seconds")], rare=True, defaults=FROM_0),
        p.lines("Wait for a snapshot", "What a save keeps training waiting. Mean.", "s",
                [p.mean("repa_checkpoint_snapshot_seconds")], rare=True, defaults=FROM_0),
        p.lines("Bytes saved", "All ranks together, in a second.", "Bps",
                [p.by_run("sum", p.rate("repa_checkpoint_bytes_total"))]),
        p.row("Steps and starts"),
        p.lines("Skipped part of steps", "Part of the steps whose gradient was not finite.", "percentunit",
                [p.by_run("max", f"({p.rate('repa_skipped_steps_total')} / {p.rate('repa_steps_total')})")], top=0.01,
                defaults=FROM_0),
        p.lines("Restarts by now", "How often the job has been started again.", "none", [gauge("repa_restarts")], top=1,
                defaults=FROM_0),
        p.lines("Steps", "Done since the run began. A fall is a return to a checkpoint.", "locale",
                [gauge("repa_step")]),
        p.row("Disks"),
        p.lines("Free space", "Of the disks that the run folder and the checkpoints are on.", "bytes",
                [p.target(p.by_run("min", p.series("repa_disk_free_bytes"), "folder"), "{{run}} {{folder}}")], 12),
        p.lines("Change of free space", "Bytes a second, over the last 30 minutes. Below 0, the disk fills.", "Bps",
                [p.target(p.by_run("min", f"deriv({p.series('repa_disk_free_bytes')}[30m])", "folder"),
                          "{{run}} {{folder}}")], 12),
        p.row("Alerts and runs"),
        p.table("Alerts", "Alerts that fire or are about to. alerts.yml says what to do about each.", "none", alerts,
                ["Value"], {"alertname": "Alert", "alertstate": "State", "run": "Run", "severity": "Severity",
                            "instance": "Address", "folder": "Folder"},
                ["alertname", "alertstate", "severity", "run", "instance", "folder"], 12, widths={"Alert": 200}),
        p.table("Runs", "Runs that ranks serve metrics of.", "none",
                f"count by (run, job_id, model, version, world_size) ({p.INFO})", [],
                {"run": "Run", "job_id": "Job", "model": "Model", "version": "Version", "world_size": "Planned ranks",
                 "Value": "Ranks"}, ["run", "job_id", "model", "version", "world_size", "Value"], 12),
    ])


def main():
    here = pathlib.Path(__file__).parent / "dashboards"
    changed = []
    for name, board in (("training", training()), ("cluster", cluster()), ("reliability", reliability())):
        path = here / f"{name}.json"
        text = json.dumps(board, indent=2, ensure_ascii=False) + "\n"
        if not path.exists() or path.read_text() != text:
            changed.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if changed:
        print("differs from generate.py:" if "--check" in sys.argv else "wrote", *changed)
    return int(bool(changed) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
