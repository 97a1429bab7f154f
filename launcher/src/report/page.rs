//! The page itself.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use repa_trainer::telemetry::progress::duration;

use super::curves::{QUANTITIES, curves};
use super::tables;
use crate::run::{Run, Sample, names, now};

/// uPlot (MIT): plots that can be zoomed, without a network.
const PLOTS: &str = include_str!("../../assets/uplot/uPlot.iife.min.js");
const PLOTS_LICENCE: &str = include_str!("../../assets/uplot/LICENSE");
const PLOTS_STYLE: &str = include_str!("../../assets/uplot/uPlot.min.css");
const SCRIPT: &str = include_str!("../../assets/report.js");
const STYLE: &str = include_str!("../../assets/report.css");

/// As many colours as a comparison can be read with; the ninth run begins again.
pub const COLOURS: [&str; 8] =
    ["#1d5bd6", "#d04a14", "#24803d", "#6e40c9", "#b8860b", "#c2185b", "#0b8793", "#6b7280"];

/// The whole page. `pictures` is the most sample pictures of a run.
pub fn page(runs: &[Run], pictures: usize) -> String {
    let names = names(runs);
    let title = match &names[..] {
        [name] => format!("Run {name}"),
        _ => format!("Runs {}", names.join(", ")),
    };
    let data = serde_json::json!({
        "colours": COLOURS,
        "quantities": QUANTITIES.iter().map(|q| serde_json::json!({
            "key": q.key, "title": q.title, "unit": q.unit, "logarithmic": q.logarithmic,
        })).collect::<Vec<_>>(),
        "runs": runs.iter().zip(&names).map(|(run, name)| curves(run, name)).collect::<Vec<_>>(),
    });
    // In a script element, only this can end it.
    let data = data.to_string().replace("</", "<\\/");
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) " · repa-dist" }
                style { (PreEscaped(PLOTS_STYLE)) (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { (title) }
                    p.quiet { "repa-dist " (env!("CARGO_PKG_VERSION")) ", " (tables::moment(now())) " UTC" }
                }
                main {
                    (section("overview", "Overview", &tables::overview(runs, &names)))
                    (section("curves", "Curves", &controls()))
                    (section("time", "Where a step's time goes", &tables::time(runs, &names)))
                    (section("samples", "Samples", &samples(runs, &names, pictures)))
                    (section("checkpoints", "Checkpoints", &tables::checkpoints(runs, &names)))
                    (section("events", "What happened", &tables::events(runs, &names)))
                    (section("configuration", "Configuration", &tables::configuration(runs, &names)))
                    (section("environment", "Environment", &tables::environment(runs, &names)))
                }
                script type="application/json" id="data" { (PreEscaped(data)) }
                script { "/*" (PreEscaped(PLOTS_LICENCE)) "*/" (PreEscaped(PLOTS)) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    }
    .into_string()
}

fn section(id: &str, title: &str, body: &Markup) -> Markup {
    html! { section id=(id) { h2 { (title) } (body) } }
}

/// What the script fills with plots.
fn controls() -> Markup {
    html! {
        form.controls {
            label { "over " select id="axis" {
                option value="step" { "steps" }
                option value="hours" { "hours of training" }
                option value="images" { "thousand images" }
            } }
            label { "mean over " select id="smoothing" {
                option value="0" { "nothing" }
                option value="0.01" { "1 % of the run" }
                option value="0.04" selected { "4 % of the run" }
                option value="0.1" { "10 % of the run" }
            } }
            span.quiet { "drag to zoom, double-click to zoom out, click a name to hide it" }
        }
        div id="plots" {}
        noscript { p { "The curves are drawn by this page's script; loss-curves.png has them as a picture." } }
    }
}

fn samples(runs: &[Run], names: &[String], pictures: usize) -> Markup {
    let none = runs.iter().all(|run| run.samples.is_empty());
    html! {
        @if none { p.quiet { "none yet: repa-dist sample --run " (runs[0].folder.display()) } }
        @for (run, name) in runs.iter().zip(names).filter(|_| !none) {
            @if runs.len() > 1 { h3 { (name) } }
            @if run.samples.is_empty() { p.quiet { "none" } }
            div.strip {
                @for sample in spread(&run.samples, pictures) { (picture(sample)) }
            }
            @if run.samples.len() > pictures {
                p.quiet { (pictures) " of " (run.samples.len()) " pictures, spread over the run" }
            }
        }
        @for (run, name) in runs.iter().zip(names) {
            @if let Some(e) = &run.evaluation {
                p {
                    @if runs.len() > 1 { (name) ": " }
                    "Fréchet distance of " (e.samples) " samples at step " (e.step) " (guidance " (e.cfg_scale) "): "
                    strong { (format!("{:.2}", e.trained)) }
                    " (untrained " (format!("{:.1}", e.untrained)) ", class means " (format!("{:.1}", e.class_means))
                    ", the data's own halves " (format!("{:.2}", e.floor)) ")"
                }
            }
            @if !run.scores.is_empty() {
                @if runs.len() > 1 { p { (name) ":" } }
                (tables::scores(&run.scores))
            }
        }
    }
}

fn picture(sample: &Sample) -> Markup {
    let label = match sample.step {
        Some(step) => format!("step {}", tables::count(step)),
        None => sample.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    };
    html! {
        figure {
            @match std::fs::read(&sample.path) {
                Ok(bytes) => img alt=(label) src={ "data:image/png;base64," (BASE64_STANDARD.encode(bytes)) };,
                Err(error) => p.bad { "cannot read " (sample.path.display()) ": " (error) },
            }
            figcaption { (label) }
        }
    }
}

/// At most `most` of them, evenly spread, the first and the last included.
fn spread<T>(all: &[T], most: usize) -> Vec<&T> {
    match (all.len(), most) {
        (0, _) | (_, 0) => Vec::new(),
        (n, 1) => vec![&all[n - 1]],
        (n, most) if n <= most => all.iter().collect(),
        (n, most) => (0..most).map(|i| &all[(i * (n - 1) + (most - 1) / 2) / (most - 1)]).collect(),
    }
}

/// Seconds as people write them, or a dash.
pub fn seconds(x: f64) -> String {
    if x.is_finite() { duration(x) } else { "-".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_spread_with_both_ends() {
        let all: Vec<usize> = (0..100).collect();
        let picked = |most| spread(&all, most).into_iter().copied().collect::<Vec<_>>();
        assert_eq!(picked(3), [0, 50, 99]);
        assert_eq!(picked(1), [99]);
        assert_eq!(picked(0), [0; 0]);
        assert_eq!((picked(7)[0], picked(7)[6], picked(7).len()), (0, 99, 7));
        assert_eq!(spread(&all[..5], 8).len(), 5);
    }
}
