//! The batch script of a job.

use std::fmt::Write;

use repa_trainer::checkpoint::storage::is_url;

use super::{Job, Launch, quoted, quoted_path};

/// Longest line of the command in the script's head.
const WIDTH: usize = 96;

/// The batch script of a job, to read, change and hand in.
pub fn script(job: &Job) -> String {
    let mut text = String::new();
    let mut part = |lines: String| {
        text.push_str(&lines);
        text.push('\n');
    };
    part(head(job));
    part(places(job));
    part(environment(job));
    part(command(job));
    part(launch(job));
    part(stops(job));
    text.push_str(&ending(job));
    text
}

fn head(job: &Job) -> String {
    let several =
        |count: usize, what: &str| if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") };
    let (nodes, ranks) = (several(job.nodes, "node"), several(job.ranks, "rank"));
    let mut text = format!("#!/bin/bash\n# Trains repa-dist on {nodes}, {ranks} on each. Made by\n#\n");
    text.push_str(&wrapped(&job.made_by));
    let _ = write!(
        text,
        "#\n# Hand it in from the folder in which the paths below hold; SLURM makes no folder for its log:\n#\n\
         #   mkdir -p {} && sbatch THIS_FILE\n#\n",
        quoted_path(&job.logs())
    );
    let mut option = |option: String| {
        let _ = writeln!(text, "#SBATCH {option}");
    };
    option(format!("--job-name={}", job.name));
    option(format!("--nodes={}", job.nodes));
    option(format!("--ntasks-per-node={}", job.ranks));
    option(format!("--cpus-per-task={}", job.cores));
    if job.gpus > 0 {
        option(format!("--gpus-per-node={}", job.gpus));
    }
    option(format!("--time={}", job.time.text()));
    job.options.iter().for_each(|given| option(given.clone()));
    if !job.sweep.is_empty() {
        let at_once = job.at_once.map_or_else(String::new, |limit| format!("%{limit}"));
        option(format!("--array=0-{}{at_once}", job.sweep.len() - 1));
    }
    let number = if job.sweep.is_empty() { "%j" } else { "%A_%a" };
    // In a log's name SLURM reads % itself.
    let logs = job.logs().to_string_lossy().replace('%', "%%");
    let log = format!("{logs}/%x-{number}.out");
    let log = if log.contains(char::is_whitespace) { format!("\"{log}\"") } else { log };
    let _ = write!(
        text,
        "# A stopped or preempted job starts again under its number, and its log goes on.\n\
         #SBATCH --requeue\n#SBATCH --open-mode=append\n#SBATCH --output={log}\n\
         # So long before the time limit (SLURM may be a minute early), this script gets SIGUSR1.\n\
         #SBATCH --signal=B:USR1@{}\n",
        job.notice_seconds
    );
    text
}

/// The command in comment lines that a shell reads back. An option and its value stay together.
fn wrapped(words: &[String]) -> String {
    let mut groups: Vec<String> = Vec::new();
    let mut open = false;
    for word in words {
        let option = word.starts_with('-');
        match groups.last_mut() {
            Some(last) if open && !option => {
                last.push(' ');
                last.push_str(&quoted(word));
            }
            _ => groups.push(quoted(word)),
        }
        open = option && !word.contains('=');
    }
    let (mut text, mut line) = (String::new(), String::from("#  "));
    for group in groups {
        if line.len() + group.len() + 3 > WIDTH && line.trim() != "#" {
            let _ = writeln!(text, "{line} \\");
            line = String::from("#    ");
        }
        let _ = write!(line, " {group}");
    }
    let _ = writeln!(text, "{line}");
    text
}

fn places(job: &Job) -> String {
    let mut text = String::from("set -u\n");
    let logs = quoted_path(&job.logs());
    if job.sweep.is_empty() {
        let _ = write!(text, "run={}\nlogs={logs}\njob=$SLURM_JOB_ID\n", quoted_path(&job.run));
    } else {
        let _ = write!(
            text,
            "# A sweep: one run for each number of the array, in a folder of its own.\ncase $SLURM_ARRAY_TASK_ID in\n"
        );
        for (number, point) in job.sweep.iter().enumerate() {
            let values: Vec<String> = point.values.iter().map(|value| quoted(value)).collect();
            let run = quoted_path(&job.run.join(&point.name));
            let checkpoints = match &job.checkpoints {
                Some(folder) => format!("checkpoints={} ", quoted_path(&folder.join(&point.name))),
                None => String::new(),
            };
            let _ = writeln!(text, "    {number}) run={run} {checkpoints}values=({}) ;;", values.join(" "));
        }
        let _ = write!(
            text,
            "    *) echo \"the sweep has no run $SLURM_ARRAY_TASK_ID\" >&2; exit 2 ;;\nesac\nlogs={logs}\n\
             job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID\n"
        );
    }
    text.push_str(
        "# Prometheus: `file_sd_configs` with this run's $run/prometheus-targets.json finds all ranks",
    );
    text.push_str(match job.metrics_stay_local {
        true => ". They\n# listen on 127.0.0.1: for a Prometheus on another machine, train with telemetry.bind=0.0.0.0.\n",
        false => ".\n",
    });
    for line in &job.setup {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn environment(job: &Job) -> String {
    let mut text = String::new();
    let mut line = |set: bool, assignment: &str, why: &str| {
        let start = format!("{}export {assignment}", if set { "" } else { "#" });
        let _ = writeln!(text, "{start:<44} # {why}");
    };
    let (named, interface) = (job.interface.is_some(), job.interface.as_deref().unwrap_or("ib0"));
    let interface = quoted(interface);
    if job.gpus > 0 {
        line(true, "NCCL_DEBUG=WARN", "INFO also says how each pair of GPUs is joined");
        line(
            named,
            &format!("NCCL_SOCKET_IFNAME={interface}"),
            "the network between nodes, if NCCL takes another",
        );
        line(false, "NCCL_IB_HCA=mlx5", "the InfiniBand adapters, if NCCL takes others");
        line(
            true,
            "OMPI_MCA_opal_cuda_support=0",
            "only NCCL touches the GPUs' memory: both at once may hang",
        );
    }
    if job.launch == Launch::Srun {
        line(true, "PMIX_MCA_gds=hash", "PMIx's other store (ds21) crashes now and then at the start");
        line(true, "SLURM_PMIX_FENCE=ring", "SLURM's tree lets ranks begin before the others listen");
    }
    line(
        named,
        &format!("OMPI_MCA_btl_tcp_if_include={interface}"),
        "the network between nodes, if OpenMPI takes another",
    );
    line(named, &format!("OMPI_MCA_oob_tcp_if_include={interface}"), "the same for OpenMPI's own talk");
    text
}

fn command(job: &Job) -> String {
    let mut text = match job.launch {
        Launch::Supervised => "train=(\n    train\n".to_owned(),
        Launch::Srun | Launch::Mpirun => format!("train=(\n    {} train\n", quoted(&job.program)),
    };
    for argument in &job.arguments {
        let word = quoted(&argument.text);
        match argument.why {
            "" => writeln!(text, "    {word}"),
            why => writeln!(text, "    {word:<20} # {why}"),
        }
        .expect("a String takes all");
    }
    if !job.sweep.is_empty() {
        text.push_str("    \"run.dir=$run\"\n");
        if job.checkpoints.is_some() {
            text.push_str("    \"checkpoint.dir=$checkpoints\"\n");
        }
        text.push_str("    \"${values[@]}\"\n");
    }
    text.push_str(")\n");
    text
}

fn launch(job: &Job) -> String {
    match job.launch {
        Launch::Srun => format!(
            "# The ranks find each other through PMIx; when one fails, SLURM ends the others.\n\
             launch=(srun --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task={})\n",
            job.cores
        ),
        Launch::Mpirun => {
            let mut text = format!(
                "# mpirun reads the nodes from SLURM.\n\
                 launch=(mpirun -n \"$SLURM_NTASKS\" --map-by ppr:{}:node --bind-to none)\n",
                job.ranks
            );
            text.push_str(daemons(job));
            text
        }
        Launch::Supervised => {
            let mut text = format!(
                "# launch reads the nodes from SLURM and starts mpirun. When a rank or mpirun fails, it goes on from the \
                 last\n# checkpoint inside the job; ranks may take all of the notice above to save.\n\
                 launch=({} launch --grace-seconds={} --)\n",
                quoted(&job.program),
                job.notice_seconds
            );
            text.push_str(daemons(job));
            text
        }
    }
}

/// What keeps mpirun's daemons on other nodes up while the ranks save.
fn daemons(job: &Job) -> &'static str {
    match job.nodes {
        1 => "",
        _ => {
            "# On preemption SLURM sends SIGTERM to the ranks and to mpirun's daemons beside them, which would end\n# all: \
             the daemons do not listen to it, and the ranks save.\n\
             if command -v orted >/dev/null && env --block-signal=TERM true 2>/dev/null; then\n    \
             export OMPI_MCA_orte_launch_agent='env --block-signal=TERM orted'\nfi\n"
        }
    }
}

fn stops(job: &Job) -> String {
    let mut text = String::from(
        "say() { echo \"$(date '+%F %T') job $job: $*\" >&2; }\n\n\
         # A request to stop: every rank saves at the same step and exits with 75. A second one ends them at once.\n\
         launcher=\nstopping=\nstop() {\n    say 'stop asked for: the ranks save'\n    stopping=yes\n    \
         [ -z \"$launcher\" ] || kill -USR1 \"$launcher\"\n}\ntrap stop USR1\n",
    );
    match (job.launch, job.nodes) {
        (Launch::Mpirun | Launch::Supervised, 1) => text.push_str(
            "# mpirun kills the ranks a second after SIGTERM; SIGUSR1 gives them time.\n\
             trap '[ -n \"$stopping\" ] || stop' TERM\n\
             # On preemption SLURM signals the steps of a job, and on one node mpirun starts none: here is one to \
             hear it.\n\
             (\n    srun --overlap --mpi=none --nodes=1 --ntasks=1 --cpus-per-task=1 \\\n        \
             bash -c 'trap \"exit 75\" TERM USR1; sleep infinity & wait' >/dev/null 2>&1\n    \
             [ $? -ne 75 ] || kill -TERM $$\n) &\n",
        ),
        _ => text.push_str(
            "# SIGTERM (preemption) reaches the ranks without this script, and they save; a signal more would end \
             them.\ntrap stopping=yes TERM\n",
        ),
    }
    text.push_str(
        "\nstarts=${SLURM_RESTART_COUNT:-0}\nprogress=$logs/.progress-$job\nstarted=$logs/.started-$job\n",
    );
    text.push_str(&saved(job));
    text.push_str(
        "# The start before may have ended together with its node or its script, unseen.\n\
         if [ -e \"$started\" ] && saved; then echo \"$starts\" >\"$progress\"; fi\n\
         so_far >\"$started\"\n\"${launch[@]}\" \"${train[@]}\" &\nlauncher=$!\nwait \"$launcher\"\n\
         while kill -0 \"$launcher\" 2>/dev/null; do wait \"$launcher\"; done # a signal ends a wait\n\
         wait \"$launcher\"\ncode=$?\n",
    );
    text
}

/// Shell functions: what to remember at the start, and whether a checkpoint has become durable since. Of those in S3
/// only the run's events tell here.
fn saved(job: &Job) -> String {
    match &job.checkpoints {
        Some(place) if is_url(place) => {
            "so_far() { cat \"$run/events.jsonl\" 2>/dev/null | grep -c '\"kind\":\"durable\"'; }\n\
             saved() { [ \"$(so_far)\" -gt \"$(cat \"$started\")\" ]; }\n"
                .to_owned()
        }
        place => {
            let folder = match place {
                None => "\"$run/checkpoints\"".to_owned(),
                Some(_) if !job.sweep.is_empty() => "\"$checkpoints\"".to_owned(),
                Some(folder) => quoted_path(folder),
            };
            format!(
                "so_far() {{ date '+%F %T'; }} # newer files will have come since\n\
                 saved() {{ [ -n \"$(find {folder} -name manifest.json -newer \"$started\" 2>/dev/null)\" ]; }}\n"
            )
        }
    }
}

fn ending(job: &Job) -> String {
    let (codes, given_up) = match job.launch {
        Launch::Srun | Launch::Mpirun => (
            "# Exit codes: 0 trained; 75 stopped and saved; 2 and 3 wrong settings or data, where starting again \
             cannot\n# help; anything else (4, a lost rank or node) may be gone at the next start.\n",
            "",
        ),
        Launch::Supervised => (
            "# Exit codes: 0 trained; 75 stopped and saved; 2 and 3 wrong settings or data, where starting again \
             cannot\n# help; 4 launch has tried again and given up; anything else (launch was killed) may be gone at \
             the next start.\n",
            "    # Ranks that did not save in time after a request to stop have given up nothing.\n    \
             4) [ -n \"$stopping\" ] || { say \"exit code $code: see the error above; launch has given up\"; exit \
             \"$code\"; } ;;\n",
        ),
    };
    format!(
        r#"{codes}requeue() {{
    say "$1: to be started again"
    # SLURM ends the daemons of a step that is just over at once, and the PMIx sockets that they would leave are in the
    # next start's way.
    sleep 5
    scontrol requeue "$job" && exit 0
    say 'SLURM does not requeue it: hand the script in again'
    exit "$code"
}}
case $code in
    0) exit 0 ;;
    2 | 3) say "exit code $code: see the error above; starting again cannot help"; exit "$code" ;;
{given_up}    75) stopping=yes ;;
esac
if [ "$run/STOP" -nt "$started" ]; then
    say "stopped by $run/STOP: not started again (remove the file and hand the script in to go on)"
    exit 75
fi
# When the first ranks have stopped, the launcher ends those that are a little late, and its code may be theirs: what
# counts is whether this start has saved anything.
if [ -n "$stopping" ] || saved; then
    echo "$((starts + 1))" >"$progress"
    requeue "exit code $code, with a checkpoint to go on from"
fi
# SLURM counts the starts, and beside the log stands which was the first after one that got on.
failures=$((starts - $(cat "$progress" 2>/dev/null || echo 0)))
if [ "$failures" -ge {most} ]; then
    say "exit code $code after {most} starts in a row that saved nothing: given up"
    exit "$code"
fi
requeue "exit code $code"
"#,
        most = job.max_failures
    )
}
