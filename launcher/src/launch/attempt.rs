//! One attempt: mpirun from its start to the end of the last process.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal, setsid};

use super::command::{MARK, RESTARTS, TERMINAL};
use super::hosts::{Placement, this_host};
use super::output::{Output, Terminal, lock};
use super::processes::{LocalRank, ranks, reap};
use super::signals::{Asked, Requests};
use super::tags::Splitter;
use super::verdict::{Forced, Verdict, Why, judge};
use super::watch::Watch;

/// How often launch looks at everything.
const TICK: Duration = Duration::from_millis(25);
/// How often it reads the run folder and /proc.
const LOOKING: Duration = Duration::from_millis(200);
/// How long mpirun may take to end after a rank has failed or all ranks of this host are gone.
const LINGERING: Duration = Duration::from_secs(5);
/// How long mpirun may take to end after SIGTERM; it gives the ranks a second.
const TERMINATION: Duration = Duration::from_secs(3);

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// From one step to the next.
    pub hang: Duration,
    /// To the first step, from the last one to the end, and of saves and sample images.
    pub start: Duration,
    /// From a request to stop to the end.
    pub grace: Duration,
    /// What a stop takes where nothing is known of it yet.
    pub usual_stop: Duration,
}

impl Deadlines {
    /// How long nothing may happen, and the option that says so.
    fn patience(&self, step_is_due: bool) -> (Duration, &'static str) {
        match step_is_due {
            true => (self.hang, "--hang-seconds"),
            // Never less than steps get.
            false => (self.start.max(self.hang), "--start-seconds"),
        }
    }
}

/// What an attempt needs.
#[derive(Debug)]
pub struct Start<'a> {
    /// The mpirun line.
    pub line: &'a [String],
    /// Where ranks run.
    pub placement: &'a Placement,
    /// The launch's mark.
    pub job: &'a str,
    /// For the log files.
    pub logs: &'a Path,
    /// Whether the other ranks' standard error is shown.
    pub shows_others: bool,
    /// Of this process.
    pub terminal: &'a Terminal,
    /// Steps of the whole run.
    pub steps: u64,
    /// Network interface for NCCL, where the environment has none.
    pub nccl_interface: Option<&'a str>,
    /// The run folder.
    pub run: &'a Path,
    /// Restarts before this attempt.
    pub restarts: usize,
    /// How long things may take.
    pub deadlines: Deadlines,
}

/// How long a request to stop may go without an end before it is made in another way as well.
const UNHEARD: Duration = Duration::from_secs(2);

/// How it went.
#[derive(Debug)]
pub struct Ended {
    /// Why it ended.
    pub verdict: Verdict,
    /// Whether mpirun did not end by itself, so that processes may be left on other hosts.
    pub unclean: bool,
    /// When the first step was seen.
    pub first_step: Option<Instant>,
}

/// Runs an attempt to its end.
///
/// # Errors
/// mpirun cannot be started.
pub fn run(start: &Start, watch: &mut Watch, requests: &mut Requests) -> std::io::Result<Ended> {
    let output = Arc::new(Mutex::new(Output::new(start.logs, start.shows_others, start.terminal.clone())));
    let mut child = spawn(start)?;
    let readers = [read(child.stdout.take(), &output), read(child.stderr.take(), &output)];
    let mut course = Course::new(start, &child);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) => {}
            Err(_) => break None,
        }
        course.go_on(watch, requests, &output);
        std::thread::sleep(TICK);
    };
    let verdict = conclude(start, &course, status, &readers, &output);
    if course.has_asked {
        // One that is left is a person's, who wants no other start: a batch script tells by it.
        let _ = std::fs::remove_file(start.run.join("STOP"));
    }
    watch.look_last();
    let unclean = course.forced.is_some() || status.is_none_or(|status| status.code().is_none());
    Ok(Ended { verdict, unclean, first_step: course.first_step })
}

fn spawn(start: &Start) -> std::io::Result<Child> {
    let mut command = Command::new(&start.line[0]);
    command
        .args(&start.line[1..])
        .env(MARK, start.job)
        .env(RESTARTS, start.restarts.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    match start.terminal.width() {
        Some(width) => command.env(TERMINAL, width.to_string()),
        None => command.env_remove(TERMINAL),
    };
    if let (Some(interface), None) = (start.nccl_interface, std::env::var_os("NCCL_SOCKET_IFNAME")) {
        command.env("NCCL_SOCKET_IFNAME", interface);
    }
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec, only system calls are made.
    unsafe {
        command.pre_exec(move || {
            // A session of its own: what the terminal sends goes to launch alone.
            setsid()?;
            // Where launch is killed, mpirun ends the ranks.
            set_parent_process_death_signal(Some(Signal::TERM))?;
            match rustix::process::getppid() == Some(parent) {
                true => Ok(()),
                false => Err(std::io::Error::other("launch has gone")),
            }
        });
    }
    command.spawn()
}

/// Passes a stream on until it ends, and then says so by closing the channel.
fn read(from: Option<impl Read + Send + 'static>, output: &Arc<Mutex<Output>>) -> Receiver<()> {
    let (open, ended) = channel();
    let output = output.clone();
    std::thread::spawn(move || {
        // Dropped with the thread.
        let _open: Sender<()> = open;
        let Some(mut from) = from else { return };
        let mut splitter = Splitter::default();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    splitter.feed(&buffer[..length], &mut |origin, bytes| lock(&output).take(origin, bytes))
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        splitter.finish(&mut |origin, bytes| lock(&output).take(origin, bytes));
    });
    ended
}

/// What launch has seen and done of an attempt.
#[derive(Debug)]
struct Course<'a> {
    start: &'a Start<'a>,
    mpirun: Option<Pid>,
    began: Instant,
    looked: Option<Instant>,
    /// Ranks on this host at the last look.
    here: Vec<LocalRank>,
    /// When ranks of this host were seen last, once there were any.
    here_last: Option<Instant>,
    first_step: Option<Instant>,
    stop_sent: Option<Instant>,
    /// The file STOP is of launch's making.
    has_asked: bool,
    /// What launch ends the attempt for, and since when.
    forced: Option<(Forced, Instant)>,
    killed: bool,
}

impl<'a> Course<'a> {
    fn new(start: &'a Start<'a>, child: &Child) -> Self {
        Self {
            start,
            mpirun: i32::try_from(child.id()).ok().and_then(Pid::from_raw),
            began: Instant::now(),
            looked: None,
            here: Vec::new(),
            here_last: None,
            first_step: None,
            stop_sent: None,
            has_asked: false,
            forced: None,
            killed: false,
        }
    }

    /// Looks at everything once, and does what has become due.
    fn go_on(&mut self, watch: &mut Watch, requests: &mut Requests, output: &Mutex<Output>) {
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOKING) {
            self.look(watch, output);
            requests.time_for(watch.stopping_time(self.start.deadlines.usual_stop));
        }
        match requests.look() {
            Asked::Nothing => {}
            Asked::Stop => self.stop(requests),
            Asked::End(signal) => self.end(Forced::Again(signal)),
        }
        if self.forced.is_none()
            && let Some(cause) = self.due(watch, output)
        {
            self.end(cause);
        }
        if let Some((_, since)) = &self.forced
            && !self.killed
            && since.elapsed() > TERMINATION
        {
            self.kill();
        }
    }

    fn look(&mut self, watch: &mut Watch, output: &Mutex<Output>) {
        let now = Instant::now();
        self.looked = Some(now);
        let before = watch.steps();
        watch.look();
        if watch.steps() != before {
            self.first_step.get_or_insert(now);
            lock(output).saw_step();
        }
        if self.stop_sent.is_some_and(|at| at.elapsed() > UNHEARD) && self.forced.is_none() {
            // A signal that came before the ranks listened, or mpirun passed signals on, is lost; this file is not. It
            // asks for the same, and a start that is under way removes it once.
            self.has_asked |= File::create_new(self.start.run.join("STOP")).is_ok();
        }
        self.here = self.mpirun.map(ranks).unwrap_or_default();
        if !self.here.is_empty() {
            self.here_last = Some(now);
        }
    }

    /// Asks the ranks to save and end: mpirun passes this signal on.
    fn stop(&mut self, requests: &Requests) {
        if self.stop_sent.is_none() && self.forced.is_none() {
            self.stop_sent = Some(Instant::now());
            let cause = requests.cause();
            self.start.terminal.line(&format!("launch: {cause}: asking the ranks to save and stop"));
            self.signal(Signal::USR1);
        }
    }

    /// What has become a reason to end the attempt.
    fn due(&self, watch: &Watch, output: &Mutex<Output>) -> Option<Forced> {
        let deadlines = &self.start.deadlines;
        let (failed, heard) = {
            let output = lock(output);
            (output.failed(), output.heard())
        };
        let since = |at: Option<Instant>, limit: Duration| at.is_some_and(|at| at.elapsed() > limit);
        if since(failed, LINGERING) || since(self.here_last, LINGERING) {
            return Some(Forced::Lingering);
        }
        if since(self.stop_sent, deadlines.grace) {
            return Some(Forced::Grace(deadlines.grace.as_secs_f64()));
        }
        let steps = watch.steps();
        let complete = steps.is_some_and(|(_, last)| last >= self.start.steps);
        let (limit, option) = deadlines.patience(steps.is_some() && !complete && !watch.between_steps());
        // Where the run folder is on another host's disk, rank 0's words are the only sign of life.
        let heard = heard.filter(|_| !watch.sees_log());
        let alive = [Some(watch.progressed()), Some(self.began), heard].into_iter().flatten().max()?;
        (alive.elapsed() > limit).then(|| Forced::Hung {
            seconds: alive.elapsed().as_secs_f64(),
            stepped: steps.is_some(),
            option,
            stuck: watch.stuck(&self.here, &this_host()),
        })
    }

    /// Ends the attempt: first by mpirun, which has the ranks on all hosts ended.
    fn end(&mut self, cause: Forced) {
        let at_once = matches!(cause, Forced::Again(_));
        if self.forced.is_none() {
            self.forced = Some((cause, Instant::now()));
            self.signal(Signal::TERM);
        } else if at_once && let Some((forced, _)) = &mut self.forced {
            *forced = cause;
        }
        if at_once && !self.killed {
            self.kill();
        }
    }

    /// Ends mpirun and all of the launch's processes on this host.
    fn kill(&mut self) {
        self.killed = true;
        self.signal(Signal::KILL);
        reap(self.start.job);
    }

    fn signal(&self, signal: Signal) {
        if let Some(mpirun) = self.mpirun {
            // It has not been waited for, so the number is still its own.
            let _ = kill_process(mpirun, signal);
        }
    }
}

/// Clears up after mpirun has ended, and judges.
fn conclude(
    start: &Start,
    course: &Course,
    status: Option<ExitStatus>,
    readers: &[Receiver<()>],
    output: &Mutex<Output>,
) -> Verdict {
    // Something that mpirun has left behind may keep its pipes open.
    let drained = || {
        let until = Instant::now() + Duration::from_secs(1);
        readers.iter().for_each(|reader| {
            let _ = reader.recv_timeout(until.saturating_duration_since(Instant::now()));
        });
    };
    drained();
    if reap(start.job) > 0 {
        drained();
    }
    let mut output = lock(output);
    output.finish();
    let forced = course.forced.as_ref().map(|(forced, _)| forced);
    let verdict = judge(status, forced, output.last_words(), start.placement);
    if matches!(verdict.why, Why::Done | Why::Stopped) {
        output.show_errors();
    }
    verdict
}
