"""python3 ranks.py RUN PORT: serves the metrics of a run that is not there, 16 ranks on 4 hosts with GPUs, and writes
their target file to the run folder RUN. One rank is slow, a save has failed and the job has been started again: what a
small run on CPUs does not show."""

import json
import math
import pathlib
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RANKS, PER_HOST, SLOW = 16, 4, 9
BATCH, STEP_SECONDS, FIRST_STEP = 512, 0.25, 120_000
BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]
PARTS = {"data_wait": 0.002, "host_to_device": 0.004, "encoder": 0.05, "forward": 0.06, "backward": 0.12,
         "compute": 0.18, "communication": 0.03, "communication_busy": 0.1, "optimizer": 0.02, "checkpoint": 20,
         "checkpoint_snapshot": 0.8}
START = time.time()


def histogram(name, count, mean):
    """Durations around a mean, as if drawn from a log-normal distribution."""
    below = [count * (1 + math.erf((math.log(b / mean)) / 0.2)) / 2 for b in BUCKETS]
    lines = [(f"{name}_bucket", {"le": f"{b:g}"}, round(n)) for b, n in zip(BUCKETS, below)]
    lines.append((f"{name}_bucket", {"le": "+Inf"}, count))
    return [*lines, (f"{name}_sum", {}, count * mean), (f"{name}_count", {}, count)]


def metrics(rank, run):
    age = time.time() - START
    done = int(age / STEP_SECONDS)
    step = FIRST_STEP + done
    noise = random.Random(step).gauss(0, 0.01)
    loss, align = 0.55 + 0.3 * math.exp(-age / 200) + noise, -0.6 + 0.1 * math.exp(-age / 200) + noise
    images = BATCH / STEP_SECONDS
    info = {"run": run, "job_id": "4711", "model": "SiT-XL/2", "version": "0.1.0", "world_size": RANKS}
    host, saves = f"n{rank // PER_HOST + 1}", done // 100
    out = [
        ("run_info", info, 1), ("rank_info", {"node": host, "local_rank": rank % PER_HOST, "device": "cuda"}, 1),
        ("loss", {}, loss + 0.5 * align), ("denoising_loss", {}, loss), ("alignment_loss", {}, align),
        ("gradient_norm", {}, 0.3 * math.exp(10 * noise)), ("learning_rate", {}, 1e-4), ("ema_decay", {}, 0.9999),
        ("loss_scale", {}, 2.0 ** (12 + done // 300 % 4)), ("step", {}, step), ("planned_steps", {}, 400_000),
        ("images_per_second", {}, images), ("model_flops_per_second", {}, images * 7e11),
        ("mfu_ratio", {}, 0.41 + noise), ("checkpoint_step", {}, step // 100 * 100),
        ("checkpoint_time_seconds", {}, START + saves * 100 * STEP_SECONDS), ("loader_queue_depth", {}, 4),
        ("restarts", {}, 2), ("steps_total", {}, done), ("images_total", {}, done * BATCH // RANKS),
        ("tokens_total", {}, done * BATCH // RANKS * 256), ("skipped_steps_total", {}, done // 400),
        ("communication_bytes_total", {}, done * 2_700_000_000), ("loader_bytes_total", {}, done * 32 * 600_000),
        ("checkpoint_bytes_total", {}, saves * 700_000_000), ("checkpoint_failures_total", {}, int(age > 30)),
        ("gpu_memory_used_bytes", {}, 6.1e10 + 1e9 * rank), ("gpu_memory_total_bytes", {}, 8.5e10),
        ("gpu_utilization_ratio", {}, 0.97 + noise),
    ]
    out += [("encoder_alignment_loss", {"encoder": e}, align + 0.05 * e) for e in range(2)]
    out += [("timestep_denoising_loss", {"timestep": f"{q / 4:.2f}-{(q + 1) / 4:.2f}"}, loss + 0.1 * q)
            for q in range(4)]
    if rank == 0:
        out += [("parameter_norm", {}, 300 + age / 100), ("stragglers", {}, int(age > 20))]
        out += [("disk_free_bytes", {"folder": f}, 3e12 - 1e8 * age) for f in ("run", "checkpoints")]
        out += [("rank_work_seconds", {"peer": r, "host": f"n{r // PER_HOST + 1}"}, 0.35 if r == SLOW else 0.2)
                for r in range(RANKS)]
    slow = 0.02 if rank == SLOW else 0
    out += histogram("step_seconds", done, STEP_SECONDS)
    for part, mean in PARTS.items():
        mean = mean - slow if part.startswith("communication") else mean + slow if part == "backward" else mean
        out += histogram(f"{part}_seconds", saves if "checkpoint" in part else done, mean)
    process = [("cpu_seconds_total", age * 3.2), ("resident_memory_bytes", 9e9), ("open_fds", 80), ("max_fds", 1024),
               ("threads", 40), ("start_time_seconds", START)]
    out = [(f"repa_{name}", labels, value) for name, labels, value in out]
    out += [(f"process_{name}", {}, value) for name, value in process]
    text = ""
    for name, labels, value in out:
        listed = ",".join(f'{k}="{v}"' for k, v in ({"rank": rank} | labels).items())
        text += f"{name}{{{listed}}} {value}\n"
    return text.encode()


def serve(rank, run, port):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = metrics(rank, run)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    # Prometheus gives up on an answer that takes too long.
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"127.0.0.1:{server.server_port}"


def main():
    folder, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    targets = [serve(rank, folder.name, port and port + rank) for rank in range(RANKS)]
    (folder / "prometheus-targets.json").write_text(json.dumps([{"targets": targets}]))
    time.sleep(1800)


if __name__ == "__main__":
    main()
