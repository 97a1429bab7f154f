//! The curves of a report: what the page's script draws, as JSON.

use repa_trainer::telemetry::events::EventKind;
use repa_trainer::telemetry::record::StepRecord;
use serde::Serialize;

use crate::run::Run;

/// More points than this a curve has no pixels for.
const MOST_POINTS: usize = 1500;

/// A quantity over the steps.
pub struct Quantity {
    /// Its key in the page's data.
    pub key: &'static str,
    /// What it is called.
    pub title: &'static str,
    /// Its unit, if it has one.
    pub unit: &'static str,
    /// Whether it spans powers of ten.
    pub logarithmic: bool,
    value: fn(&StepRecord) -> f64,
}

/// What is drawn, in this order.
pub const QUANTITIES: [Quantity; 8] = [
    Quantity::new("denoising_loss", "Denoising loss", "", false, |r| r.denoising_loss),
    Quantity::new("alignment_loss", "Alignment loss", "", false, |r| r.alignment_loss),
    Quantity::new("loss", "Loss, both together", "", false, |r| r.loss),
    Quantity::new("grad_norm", "Gradient norm before clipping", "", true, |r| r.grad_norm),
    Quantity::new("images_per_second", "Throughput", "images/s", false, |r| r.images_per_second),
    Quantity::new("step_seconds", "Time of a step", "s", false, |r| r.step_seconds),
    Quantity::new("communication_seconds", "Exposed communication of a step", "s", false, |r| {
        r.communication_seconds
    }),
    Quantity::new("learning_rate", "Learning rate", "", false, |r| r.learning_rate),
];

impl Quantity {
    const fn new(
        key: &'static str,
        title: &'static str,
        unit: &'static str,
        logarithmic: bool,
        value: fn(&StepRecord) -> f64,
    ) -> Self {
        Self { key, title, unit, logarithmic, value }
    }
}

/// One run's curves.
#[derive(Debug, Serialize)]
pub struct Curves {
    name: String,
    /// Steps that share a point.
    group: usize,
    step: Vec<u64>,
    /// Training time at those steps.
    hours: Vec<f64>,
    /// Images seen, in thousands.
    images: Vec<f64>,
    /// By [`QUANTITIES`]' order.
    values: Vec<Values>,
    marks: Vec<Mark>,
}

/// A quantity's points: null where no value is finite.
#[derive(Debug, Serialize)]
struct Values {
    mean: Vec<Option<f64>>,
    /// Least and greatest of the steps that share a point; empty where each has its own.
    least: Vec<Option<f64>>,
    most: Vec<Option<f64>>,
}

/// Something that happened.
#[derive(Debug, Serialize)]
struct Mark {
    step: u64,
    kind: EventKind,
    text: String,
}

/// Of a run.
pub fn curves(run: &Run, name: &str) -> Curves {
    let group = run.steps.len().div_ceil(MOST_POINTS).max(1);
    let groups: Vec<&[StepRecord]> = run.steps.chunks(group).collect();
    let (mut hours, mut images) = (0.0, 0.0);
    let mut sums = Vec::new();
    for steps in &groups {
        hours += steps.iter().map(|r| r.step_seconds + r.snapshot_seconds).sum::<f64>() / 3600.0;
        images += steps.iter().map(|r| r.step_seconds * r.images_per_second).sum::<f64>() / 1000.0;
        sums.push((hours, images));
    }
    let marked = [EventKind::Start, EventKind::SaveFailed, EventKind::Skipped, EventKind::Straggler];
    let marks = run.events.iter().filter(|event| marked.contains(&event.kind));
    Curves {
        name: name.to_owned(),
        group,
        step: groups.iter().map(|steps| steps[steps.len() - 1].step).collect(),
        hours: sums.iter().map(|&(hours, _)| short(hours)).collect(),
        images: sums.iter().map(|&(_, images)| short(images)).collect(),
        values: QUANTITIES.iter().map(|quantity| values(quantity, &groups, group)).collect(),
        marks: marks.map(|e| Mark { step: e.step, kind: e.kind, text: e.text.clone() }).collect(),
    }
}

fn values(quantity: &Quantity, groups: &[&[StepRecord]], group: usize) -> Values {
    let finite = |steps: &[StepRecord]| -> Vec<f64> {
        steps.iter().map(quantity.value).filter(|x| x.is_finite()).collect()
    };
    let each = |value: fn(&[f64]) -> f64| -> Vec<Option<f64>> {
        let all = groups.iter().map(|steps| finite(steps));
        all.map(|numbers| (!numbers.is_empty()).then(|| short(value(&numbers)))).collect()
    };
    let spread = group > 1;
    Values {
        mean: each(|x| x.iter().sum::<f64>() / x.len() as f64),
        least: if spread { each(|x| x.iter().copied().fold(f64::INFINITY, f64::min)) } else { Vec::new() },
        most: if spread { each(|x| x.iter().copied().fold(f64::NEG_INFINITY, f64::max)) } else { Vec::new() },
    }
}

/// A number with five significant digits, which is more than a screen shows: JSON gets its shortest text.
fn short(x: f64) -> f64 {
    format!("{x:.4e}").parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::run;

    #[test]
    fn long_runs_are_thinned_and_keep_their_spikes() {
        let mut long = run(4000);
        long.steps[1234].denoising_loss = 77.0;
        long.steps[99].denoising_loss = f64::NAN;
        let text = serde_json::to_value(curves(&long, "a")).expect("JSON");
        assert_eq!(text["group"], 3);
        assert_eq!(text["step"].as_array().expect("steps").len(), 4000_usize.div_ceil(3));
        assert_eq!(text["step"][1333], 4000);
        let loss = &text["values"][0];
        assert_eq!(loss["most"][411], 77.0);
        let mean = (77.0 + long.steps[1233].denoising_loss + long.steps[1235].denoising_loss) / 3.0;
        assert!((loss["mean"][411].as_f64().expect("a number") - mean).abs() < 1e-3);
        assert!(loss["mean"][33].is_number(), "of the two that are finite");
        // 4,000 steps of a quarter of a second and 50 images each.
        assert!((text["hours"][1333].as_f64().expect("hours") - 1000.0 / 3600.0).abs() < 1e-4);
        assert_eq!(text["images"][1333], 200.0);
    }

    #[test]
    fn short_runs_keep_every_step() {
        let mut short = run(3);
        short.steps[1].grad_norm = f64::INFINITY;
        let text = serde_json::to_value(curves(&short, "a")).expect("JSON");
        assert_eq!(text["group"], 1);
        let norm = &text["values"][3];
        assert_eq!(norm["mean"], serde_json::json!([1.0, null, 0.33333]));
        assert_eq!(norm["least"], serde_json::json!([]));
    }
}
