//! `repa-dist config`.

use clap::Args;

use super::Settings;
use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Print JSON: {"key": {"value": ..., "origin": ...}}
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let entries = arguments.settings.load()?.entries();
    if arguments.json {
        let object: serde_json::Map<String, serde_json::Value> = entries
            .into_iter()
            .map(|(key, value, origin)| (key, serde_json::json!({ "value": value, "origin": origin })))
            .collect();
        println!("{:#}", serde_json::Value::Object(object));
        return Ok(Outcome::Done);
    }
    let width = entries.iter().map(|(key, value, _)| key.len() + value.len() + 3).max().unwrap_or(0);
    for (key, value, origin) in entries {
        let setting = format!("{key} = {value}");
        println!("{setting:width$}  # {origin}");
    }
    Ok(Outcome::Done)
}
