//! The tables of a report.

use std::collections::BTreeSet;

use maud::{Markup, html};
use repa_trainer::evaluate::Scores;
use repa_trainer::figures::whole;
use repa_trainer::sample::{Mode, SamplerConfig};
use repa_trainer::telemetry::events::{Event, EventKind};
use repa_trainer::telemetry::record::StepRecord;

use super::Summary;
use super::page::{COLOURS, seconds};
use crate::run::Run;

/// Events of a run beyond which only the last are shown.
const MOST_EVENTS: usize = 200;

fn head(names: &[String]) -> Markup {
    html! {
        thead { tr {
            th {}
            @for (number, name) in names.iter().enumerate() {
                th { span.dot style={ "background:" (COLOURS[number % COLOURS.len()]) } {} (name) }
            }
        } }
    }
}

/// Runs side by side, fact by fact.
pub fn overview(runs: &[Run], names: &[String]) -> Markup {
    let summaries: Vec<Summary> = runs.iter().map(Summary::of).collect();
    type Fact = fn(&Summary) -> String;
    let or_dash = |x: Option<String>| x.unwrap_or_else(|| "-".into());
    let facts: [(&str, Fact); 11] = [
        ("state", |s| s.state.word().into()),
        ("model", |s| s.model.clone()),
        ("ranks", |s| s.ranks.map_or_else(|| "-".into(), |n| n.to_string())),
        ("steps", |s| match s.steps {
            Some(steps) => format!("{} of {}", count(s.step), count(steps)),
            None => count(s.step),
        }),
        ("training time", |s| seconds(s.seconds)),
        ("images/s", |s| format!("{:.1}", s.images_per_second)),
        ("denoising loss", |s| format!("{:.4}", s.denoising_loss)),
        ("alignment loss", |s| format!("{:.4}", s.alignment_loss)),
        ("steps left out", |s| s.skipped_steps.to_string()),
        ("checkpoints", |s| s.checkpoints.to_string()),
        ("starts by launch", |s| s.attempts.to_string()),
    ];
    html! {
        table {
            (head(names))
            tbody {
                @for (fact, value) in facts {
                    tr { th { (fact) } @for summary in &summaries { td { (value(summary)) } } }
                }
                tr {
                    th { "Fréchet distance" }
                    @for s in &summaries { td { (or_dash(s.frechet_distance.map(|x| format!("{x:.2}")))) } }
                }
                tr {
                    th { "FID" }
                    @for s in &summaries { td { (or_dash(s.fid.map(|x| format!("{x:.2}")))) } }
                }
            }
        }
        p.quiet { "Losses are means over the last " (summaries[0].mean_over) " steps"
            @if runs.len() > 1 { " of the first run, and as great a part of the others" } "." }
    }
}

/// Means over the second half of each run: the first steps are slower.
pub fn time(runs: &[Run], names: &[String]) -> Markup {
    type Part = (&'static str, fn(&StepRecord) -> f64);
    const PARTS: [Part; 5] = [
        ("forward and backward", |r| r.compute_seconds),
        ("communication that nothing hid", |r| r.communication_seconds),
        ("clipping, AdamW, EMA", |r| r.optimizer_seconds),
        ("waiting for data", |r| r.data_wait_seconds),
        ("waiting for a save's copy", |r| r.snapshot_seconds),
    ];
    let bars = |run: &Run| {
        let half = &run.steps[run.steps.len() / 2..];
        let mean = |value: fn(&StepRecord) -> f64| half.iter().map(value).sum::<f64>() / half.len() as f64;
        let whole = mean(|r| r.step_seconds + r.snapshot_seconds);
        let mut parts: Vec<(&str, f64)> =
            PARTS.iter().map(|&(name, value)| (name, mean(value) / whole)).collect();
        let rest = 1.0 - parts.iter().map(|(_, share)| share).sum::<f64>();
        parts.push(("the rest", rest.max(0.0)));
        (whole, parts)
    };
    html! {
        @for (run, name) in runs.iter().zip(names) {
            @let (whole, parts) = bars(run);
            p { @if runs.len() > 1 { (name) ": " } (format!("{:.1} ms", 1000.0 * whole)) " a step" }
            div.bar {
                @for (number, (part, share)) in parts.iter().enumerate() {
                    div.part title={ (part) " " (percent(*share)) }
                        style={ "width:" (format!("{:.2}", 100.0 * share)) "%;background:" (COLOURS[number]) } {}
                }
            }
            p.legend {
                @for (number, (part, share)) in parts.iter().enumerate() {
                    span { span.dot style={ "background:" (COLOURS[number]) } {} (part) " " (percent(*share)) }
                }
            }
        }
        p.quiet { "Rank 0's, means over the second half of the steps." }
    }
}

/// Checkpoints that are there now.
pub fn checkpoints(runs: &[Run], names: &[String]) -> Markup {
    html! {
        @for (run, name) in runs.iter().zip(names) {
            @if runs.len() > 1 { h3 { (name) } }
            @if run.checkpoints.is_empty() { p.quiet { "none" } } @else {
                table {
                    thead { tr { th { "step" } th { "saved (UTC)" } th { "size" } th { "ranks" } th { "loss" } th {} } }
                    tbody {
                        @for saved in &run.checkpoints {
                            tr {
                                td { (count(saved.step)) }
                                td { (saved.time.map_or_else(|| "-".into(), moment)) }
                                td { (format!("{:.1} MB", saved.bytes as f64 / 1e6)) }
                                td { (saved.world_size) }
                                td { (saved.metrics.get("loss").map_or_else(|| "-".into(), |x| format!("{x:.4}"))) }
                                td { @if let Some(problem) = &saved.problem { span.bad { (problem) } } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Evaluations with Inception, the newest last.
pub fn scores(all: &[Scores]) -> Markup {
    let of = |x: Option<f64>, digits: usize| x.map_or_else(|| "-".into(), |x| format!("{x:.digits$}"));
    html! {
        table {
            thead { tr {
                th { "step" } th { "samples" } th { "drawn by" } th { "FID" } th { "sFID" } th { "inception score" }
                th { "precision" } th { "recall" } th { "against" }
            } }
            tbody {
                @for scores in all {
                    tr {
                        td { (scores.step.map_or_else(|| "-".into(), count)) }
                        td { (count(scores.samples as u64)) }
                        td { (scores.sampler.as_ref().map(sampler).unwrap_or_default()) }
                        td { (of(Some(scores.fid), 2)) }
                        td { (of(scores.sfid, 2)) }
                        td { (of(Some(scores.inception_score), 1)) }
                        td { (of(scores.precision, 3)) }
                        td { (of(scores.recall, 3)) }
                        td { (scores.reference) }
                    }
                }
            }
        }
    }
}

/// Sampler settings in words.
fn sampler(settings: &SamplerConfig) -> String {
    let SamplerConfig { mode, num_steps, cfg_scale, guidance_low, guidance_high } = settings;
    let mode = match mode {
        Mode::Ode => "ODE",
        Mode::OdeHeun => "ODE (Heun)",
        Mode::Sde => "SDE",
    };
    match *cfg_scale > 1.0 {
        true => {
            format!("{mode}, {num_steps} steps, guidance {cfg_scale} from {guidance_low} to {guidance_high}")
        }
        false => format!("{mode}, {num_steps} steps, no guidance"),
    }
}

/// Attempts and events.
pub fn events(runs: &[Run], names: &[String]) -> Markup {
    html! {
        @for (run, name) in runs.iter().zip(names) {
            @if runs.len() > 1 { h3 { (name) } }
            @if !run.attempts.is_empty() {
                table {
                    thead { tr {
                        th { "start" } th { "at (UTC)" } th { "for" } th { "ranks" } th { "steps" } th { "end" } th {}
                    } }
                    tbody { @for attempt in &run.attempts { (self::attempt(attempt)) } }
                }
            }
            @let shown = &run.events[run.events.len().saturating_sub(MOST_EVENTS)..];
            @if shown.is_empty() { p.quiet { "no events were recorded" } } @else {
                details open[shown.len() <= 30] {
                    summary {
                        (run.events.len()) " events"
                        @if shown.len() < run.events.len() { ", the last " (shown.len()) }
                    }
                    table { tbody { @for event in shown { (line(event)) } } }
                }
            }
        }
    }
}

fn attempt(attempt: &crate::launch::Record) -> Markup {
    let number = |x: Option<u64>| x.map_or_else(|| "?".into(), count);
    let why = attempt.why.and_then(|why| serde_json::to_value(why).ok());
    let why = why.and_then(|why| Some(why.as_str()?.to_owned())).unwrap_or_else(|| "goes on".into());
    html! {
        tr {
            td { (attempt.attempt) }
            td { (moment(attempt.started)) }
            td { (attempt.ended.map_or_else(|| "-".into(), |ended| seconds(ended - attempt.started))) }
            td { (attempt.world_size) }
            td { @if attempt.last_step.is_some() { (number(attempt.first_step)) " to " (number(attempt.last_step)) } }
            td { (why) @if let Some(rank) = attempt.rank { ", rank " (rank) }
                @if let Some(host) = &attempt.host { " on " (host) } }
            td { (attempt.message.as_deref().filter(|message| *message != why).unwrap_or_default()) }
        }
    }
}

fn line(event: &Event) -> Markup {
    let bad = matches!(event.kind, EventKind::SaveFailed | EventKind::Skipped | EventKind::Straggler);
    html! {
        tr {
            td { (moment(event.time)) }
            td { "step " (count(event.step)) }
            td.bad[bad] { (event.text) }
        }
    }
}

/// What differs between runs, and all of it.
pub fn configuration(runs: &[Run], names: &[String]) -> Markup {
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.config.keys()).collect();
    let value = |run: &Run, key: &str| run.setting(key).map_or("-".to_owned(), str::to_owned);
    let differs = |key: &&&String| runs.iter().any(|run| value(run, key) != value(&runs[0], key));
    let differing: Vec<&&String> = keys.iter().filter(differs).collect();
    html! {
        @if runs.len() > 1 {
            table {
                (head(names))
                tbody {
                    @for key in differing {
                        tr { th { (key) } @for run in runs { td { (value(run, key)) } } }
                    }
                }
            }
            p.quiet { "Keys that differ. All of them:" }
        }
        @for (run, name) in runs.iter().zip(names) {
            details { summary { "config.toml of " (name) } pre { (run.config_text) } }
        }
    }
}

/// Program, hosts, processors.
pub fn environment(runs: &[Run], names: &[String]) -> Markup {
    let keys: BTreeSet<&String> =
        runs.iter().filter_map(|run| run.environment.as_object()).flat_map(|object| object.keys()).collect();
    let value = |run: &Run, key: &str| match &run.environment[key] {
        serde_json::Value::Null => "-".to_owned(),
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Number(number) if key == "started" => moment(number.as_f64().unwrap_or(0.0)),
        serde_json::Value::Array(parts) => parts
            .iter()
            .map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(" "),
        serde_json::Value::Object(parts) => parts
            .iter()
            .map(|(key, part)| format!("{key}={}", part.as_str().unwrap_or_default()))
            .collect::<Vec<_>>()
            .join(" "),
        other => other.to_string(),
    };
    let dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    html! {
        @if keys.is_empty() { p.quiet { "not recorded" } } @else {
            table {
                (head(names))
                tbody { @for key in keys { tr { th { (key.replace('_', " ")) } @for run in runs { td { (dash(value(run, key))) } } } } }
            }
            p.quiet { "Of the last start." }
        }
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A count with its thousands apart.
pub fn count(n: u64) -> String {
    whole(n as f64)
}

/// Seconds since 1970 as date and time, UTC.
pub fn moment(seconds: f64) -> String {
    let time = chrono::DateTime::from_timestamp(seconds as i64, 0).unwrap_or_default();
    time.format("%Y-%m-%d %H:%M:%S").to_string()
}
