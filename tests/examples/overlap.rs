//! What overlap brings between two hosts: `bench step` on two network namespaces whose link is shaped, with
//! and without `comm.overlap`, in turns.
//!
//!     cargo run --release -p repa-tests --example overlap -- [RATE] [TURNS] [KEY=VALUE ...]
//!
//! RATE is tc's, such as 1gbit (the default). Takes root and iproute2.

use std::process::ExitCode;
use std::time::Duration;

use repa_tests::Running;
use repa_tests::hosts::Hosts;

const DEADLINE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let rate = arguments.next().unwrap_or_else(|| "1gbit".to_owned());
    let turns: usize = arguments.next().and_then(|t| t.parse().ok()).unwrap_or(3);
    let more: Vec<String> = arguments.collect();
    match measure(&rate, turns, &more) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::from(4)
        }
    }
}

fn measure(rate: &str, turns: usize, more: &[String]) -> Result<(), String> {
    let hosts = Hosts::new(2)?;
    for host in [1, 2] {
        hosts.shape(host, rate)?;
    }
    let mut seconds: [Vec<f64>; 2] = Default::default();
    println!("{:>4} {:>8} {:>9} {:>12} {:>12}", "turn", "overlap", "step s", "compute s", "exposed s");
    for turn in 1..=turns {
        for (overlap, list) in [true, false].into_iter().zip(&mut seconds) {
            let overlap = overlap.to_string();
            let setting = format!("comm.overlap={overlap}");
            let mut arguments = vec!["bench", "step", "--steps", "6", "--json", "train.threads=1", &setting];
            arguments.extend(more.iter().map(String::as_str));
            let ended = Running::start(&mut hosts.mpirun(1, &arguments)).wait(DEADLINE);
            let figures: serde_json::Value = serde_json::from_str(&ended.stdout)
                .map_err(|e| format!("{e}\n{}\n{}", ended.stdout, ended.stderr))?;
            let figure = |key: &str| figures[key].as_f64().unwrap_or(f64::NAN);
            println!(
                "{turn:>4} {overlap:>8} {:>9.3} {:>12.3} {:>12.3}",
                figure("step_seconds"),
                figure("compute_seconds"),
                figure("exposed_communication_seconds")
            );
            list.push(figure("step_seconds"));
        }
    }
    let median = |list: &mut Vec<f64>| {
        list.sort_by(f64::total_cmp);
        list[list.len() / 2]
    };
    let [with, without] = seconds.each_mut().map(median);
    println!("medians: {with:.3} s with overlap, {without:.3} s without: {:.2} times faster", without / with);
    Ok(())
}
