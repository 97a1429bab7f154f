//! The log on standard error: text for people, JSON for collectors, each line with its rank and step.

use std::fmt::{self, Write};

use repa_trainer::config::LogFormat;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// What tells of every kernel that a failure of the GPU has kept from running, over pages. The failure itself is told once,
/// where its results are read. Other words of CubeCL's (memory given back, results of tuning) go with it: RUST_LOG=warn
/// has all of them.
const VERBOSE: &str = "cubecl_runtime=off,cubecl_server=off,cubecl_cuda=off";

/// Sends the log to standard error: warnings, or what RUST_LOG asks for; errors only above rank 0.
pub fn to_stderr(rank: usize, format: LogFormat) {
    let quiet = if rank == 0 { "warn" } else { "error" };
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{quiet},{VERBOSE}")));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .event_format(Ranked { rank, format })
        .init();
}

/// Writes events with the rank and the training step.
struct Ranked {
    rank: usize,
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for Ranked
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let (level, target) = (event.metadata().level(), event.metadata().target());
        let step = repa_trainer::telemetry::step();
        match self.format {
            LogFormat::Text => {
                write!(writer, "{time} {level:>5} rank {}", self.rank)?;
                if let Some(step) = step {
                    write!(writer, " step {step}")?;
                }
                write!(writer, ": {}", fields.message)?;
                for (name, value) in &fields.others {
                    write!(writer, " {name}={value}")?;
                }
                writeln!(writer)
            }
            LogFormat::Json => {
                let mut line = serde_json::json!({
                    "time": time,
                    "level": level.as_str(),
                    "rank": self.rank,
                    "step": step,
                    "target": target,
                    "message": fields.message,
                });
                for (name, value) in fields.others {
                    line[name] = value.into();
                }
                writeln!(writer, "{line}")
            }
        }
    }
}

/// An event's fields as text.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // Writing to a string does not fail.
            let _ = write!(self.message, "{value:?}");
        } else {
            self.others.push((field.name(), format!("{value:?}")));
        }
    }
}
