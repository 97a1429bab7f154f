//! Merging the layers of a configuration.

use std::path::{Path, PathBuf};

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::{Config, ConfigError};
use crate::model::{PRESETS, SitConfig};

/// Where the file layer comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A TOML file.
    File(PathBuf),
    /// TOML that the binary carries, by name.
    Embedded(&'static str, &'static str),
}

/// What a configuration is merged from, lowest first: defaults, `source`, environment, arguments.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The file layer, if there is one.
    pub source: Option<Source>,
    /// Environment variables; only `REPA_DEVICE` and `REPA_<SECTION>__<KEY>` are read.
    pub environment: Vec<(String, String)>,
    /// `key=value` arguments.
    pub arguments: Vec<String>,
}

/// A merged configuration.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    figment: Figment,
}

impl Loaded {
    /// Every key in order, its value as TOML writes it, and where it came from.
    pub fn entries(&self) -> Vec<(String, String, String)> {
        let values = Value::serialize(&self.config).expect("the configuration serialises");
        let mut entries = Vec::new();
        flatten("", &values, &mut |key, value| {
            let origin = self.figment.find_metadata(key).map_or("default", |m| m.name.as_ref());
            entries.push((key.to_owned(), display(value), origin.to_owned()));
        });
        entries
    }
}

/// Merges and checks a configuration.
///
/// # Errors
/// The first unreadable file, unknown key, wrong type or impossible value.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
    let defaults = Value::serialize(Config::default()).expect("the defaults serialise");
    let mut known = Vec::new();
    flatten("", &defaults, &mut |key, _| known.push(key.to_owned()));

    let mut layers = Vec::new();
    if let Some(source) = &sources.source {
        layers.push(read(source)?);
    }
    for (name, value) in &sources.environment {
        if let Some(key) = environment_key(name) {
            layers.push(Layer::single(&key, value, format!("environment variable {name}")));
        }
    }
    for argument in &sources.arguments {
        let (key, value) = argument
            .split_once('=')
            .filter(|(key, _)| key.split('.').all(|part| !part.trim().is_empty()))
            .ok_or_else(|| ConfigError::Argument(argument.clone()))?;
        layers.push(Layer::single(key.trim(), value.trim(), format!("argument {argument}")));
    }
    for layer in &layers {
        layer.check_keys(&known)?;
    }

    let Value::Dict(_, defaults) = defaults else { unreachable!("a struct serialises as a dictionary") };
    let base = Figment::from(Layer { name: "default".into(), dict: defaults });
    let merged = layers.iter().cloned().fold(base.clone(), Figment::merge);
    let figment = match merged.extract_inner::<String>("model.preset") {
        Ok(preset) if !preset.is_empty() => {
            let preset = Layer::preset(&preset)?;
            layers.iter().cloned().fold(base.merge(preset), Figment::merge)
        }
        _ => merged,
    };
    let config: Config = figment.extract().map_err(|e| type_error(&figment, e))?;
    config.check()?;
    Ok(Loaded { config, figment })
}

/// One source of values.
#[derive(Debug, Clone)]
struct Layer {
    name: String,
    dict: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.dict.clone())]))
    }
}

impl Layer {
    /// One key. The value is read as TOML where it is TOML, and as a string otherwise, so that
    /// neither paths nor `cuda:0` need quotes.
    fn single(key: &str, value: &str, name: String) -> Self {
        let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"))
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| toml::Value::String(value.to_owned()));
        let value = Value::serialize(parsed).expect("TOML values serialise");
        let Value::Dict(_, dict) = figment::util::nest(key, value) else {
            unreachable!("nesting under a key gives a dictionary: empty ones are refused before")
        };
        Self { name, dict }
    }

    fn preset(name: &str) -> Result<Self, ConfigError> {
        let preset = SitConfig::preset(name).map_err(|_| {
            ConfigError::value("model.preset", name, format!("known are {}", PRESETS.join(", ")))
        })?;
        let value = |v: usize| Value::from(v as u64);
        let model = Dict::from([
            ("hidden_size".into(), value(preset.hidden_size)),
            ("depth".into(), value(preset.depth)),
            ("num_heads".into(), value(preset.num_heads)),
            ("patch_size".into(), value(preset.patch_size)),
        ]);
        let alignment = Dict::from([("encoder_depth".into(), value(preset.encoder_depth))]);
        let dict = Dict::from([("model".into(), model.into()), ("alignment".into(), alignment.into())]);
        Ok(Self { name: format!("preset {name}"), dict })
    }

    fn check_keys(&self, known: &[String]) -> Result<(), ConfigError> {
        let mut unknown = None;
        flatten("", &Value::from(self.dict.clone()), &mut |key, _| {
            let section = format!("{key}.");
            if !known.iter().any(|k| k == key || k.starts_with(&section)) {
                unknown.get_or_insert_with(|| key.to_owned());
            }
        });
        match unknown {
            None => Ok(()),
            Some(key) => {
                Err(ConfigError::UnknownKey { nearest: nearest(&key, known), key, origin: self.name.clone() })
            }
        }
    }
}

fn read(source: &Source) -> Result<Layer, ConfigError> {
    let (path, text, name) = match source {
        Source::File(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            (path.as_path(), text, path.display().to_string())
        }
        Source::Embedded(name, text) => (Path::new(name), (*text).to_owned(), format!("built-in {name}")),
    };
    let table: toml::Table = toml::from_str(&text)
        .map_err(|e| ConfigError::Syntax { path: path.to_owned(), problem: e.to_string() })?;
    let Ok(Value::Dict(_, dict)) = Value::serialize(&table) else {
        unreachable!("a TOML table serialises as a dictionary")
    };
    Ok(Layer { name, dict })
}

/// `REPA_TRAIN__STEPS` is `train.steps`; other variables that begin with REPA_ are not settings.
fn environment_key(name: &str) -> Option<String> {
    let rest = name.strip_prefix("REPA_")?;
    let key = (rest.contains("__") || rest == "DEVICE").then(|| rest.replace("__", ".").to_lowercase())?;
    key.split('.').all(|part| !part.is_empty()).then_some(key)
}

fn flatten(prefix: &str, value: &Value, visit: &mut dyn FnMut(&str, &Value)) {
    match value {
        Value::Dict(_, dict) => {
            for (key, value) in dict {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&path, value, visit);
            }
        }
        _ => visit(prefix, value),
    }
}

fn nearest(key: &str, known: &[String]) -> Option<String> {
    // The last part counts most: `steps` for `train.steps` is a likely slip.
    let last = |k: &str| k.rsplit('.').next().unwrap_or(k).to_owned();
    known
        .iter()
        .map(|k| {
            let score = strsim::normalized_damerau_levenshtein(key, k)
                .max(0.95 * strsim::normalized_damerau_levenshtein(&last(key), &last(k)));
            (score, k)
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(score, _)| *score > 0.5)
        .map(|(_, k)| k.clone())
}

fn display(value: &Value) -> String {
    match value {
        Value::String(_, s) => format!("{s:?}"),
        Value::Char(_, c) => format!("{:?}", c.to_string()),
        Value::Bool(_, b) => b.to_string(),
        Value::Num(_, n) => match (n.to_u128(), n.to_i128(), n.to_f64()) {
            (Some(n), _, _) => n.to_string(),
            (_, Some(n), _) => n.to_string(),
            (_, _, Some(x)) => float(x),
            (None, None, None) => "none".into(),
        },
        Value::Empty(..) => "none".into(),
        Value::Array(_, items) => format!("[{}]", items.iter().map(display).collect::<Vec<_>>().join(", ")),
        Value::Dict(_, dict) => {
            let items: Vec<String> = dict.iter().map(|(k, v)| format!("{k} = {}", display(v))).collect();
            format!("{{ {} }}", items.join(", "))
        }
    }
}

/// As TOML writes it, and short: a float32 that went through float64 shows the digits it had.
fn float(x: f64) -> String {
    let narrow = x as f32;
    if x != 0.0 && x.abs() < 1e-3 {
        if f64::from(narrow) == x { format!("{narrow:e}") } else { format!("{x:e}") }
    } else if f64::from(narrow) == x {
        format!("{narrow:?}")
    } else {
        format!("{x:?}")
    }
}

fn type_error(figment: &Figment, error: figment::Error) -> ConfigError {
    let key = error.path.join(".");
    let value = figment.find_value(&key).map_or_else(|_| "that".into(), |v| display(&v));
    let origin = error.metadata.as_ref().map_or_else(|| "default".into(), |m| m.name.to_string());
    let problem = match &error.kind {
        figment::error::Kind::InvalidType(_, expected) => format!("{expected} belongs there"),
        figment::error::Kind::UnknownVariant(_, known) => format!("known are {}", known.join(", ")),
        other => other.to_string(),
    };
    ConfigError::Type { key, value, origin, problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(arguments: &[&str]) -> Sources {
        Sources {
            source: Some(Source::Embedded("test.toml", "[train]\nsteps = 7\n")),
            environment: vec![
                ("REPA_TRAIN__SEED".into(), "3".into()),
                ("REPA_GOLDEN_DIR".into(), "x".into()),
            ],
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
        }
    }

    #[test]
    fn a_key_without_a_name_is_refused() {
        for argument in ["=5", ".train.steps=5", "train..steps=5", "train.=5", " =5", "steps"] {
            let error = load(&sources(&[argument])).expect_err(argument);
            assert!(matches!(&error, ConfigError::Argument(text) if text == argument), "{error}");
        }
        assert_eq!(environment_key("REPA____STEPS"), None);
        assert_eq!(environment_key("REPA_TRAIN__"), None);
    }

    #[test]
    fn later_layers_win_and_say_so() {
        let loaded = load(&sources(&["train.global_batch=12", "run.dir=some/where"])).expect("valid");
        assert_eq!(loaded.config.train.steps, 7);
        assert_eq!(loaded.config.train.seed, 3);
        assert_eq!(loaded.config.train.global_batch, 12);
        assert_eq!(loaded.config.run.dir, Path::new("some/where"));
        let origin = |key: &str| loaded.entries().into_iter().find(|e| e.0 == key).expect(key).2;
        assert_eq!(origin("train.steps"), "built-in test.toml");
        assert_eq!(origin("train.seed"), "environment variable REPA_TRAIN__SEED");
        assert_eq!(origin("train.global_batch"), "argument train.global_batch=12");
        assert_eq!(origin("optimizer.learning_rate"), "default");
    }

    #[test]
    fn a_preset_sets_the_size_and_explicit_keys_override_it() {
        let loaded = load(&sources(&["model.preset=SiT-B/4", "model.depth=5"])).expect("valid");
        let model = &loaded.config.model;
        assert_eq!((model.hidden_size, model.patch_size, model.depth), (768, 4, 5));
    }

    #[test]
    fn mistakes_name_the_key_the_value_and_a_remedy() {
        let message = |argument: &str| load(&sources(&[argument])).expect_err(argument).to_string();
        let text = message("train.step=5");
        assert!(text.contains("train.step\"") && text.contains("train.steps"), "{text}");
        let text = message("steps=5");
        assert!(text.contains("train.steps"), "{text}");
        let text = message("train.steps=many");
        assert!(text.contains("train.steps") && text.contains("many") && text.contains("argument"), "{text}");
        let text = message("objective.path=spiral");
        assert!(text.contains("linear") && text.contains("spiral"), "{text}");
        let text = message("train.steps");
        assert!(text.contains("key=value"), "{text}");
        let text = message("model.preset=SiT-Q/2");
        assert!(text.contains("SiT-Q/2"), "{text}");
        let text = message("model.num_heads=7");
        assert!(text.contains("num_heads") && text.contains('7'), "{text}");
        for (argument, remedy) in [
            ("sample.training.classes=0", "1 or more"),
            ("sample.training.per_class=1000", "more than 1024 images"),
            ("sample.training.num_steps=5000", "1000 or less"),
            ("telemetry.push_url=gateway:9091", "http://gateway:9091"),
            ("telemetry.push_seconds=0", "above 0"),
        ] {
            let (key, text) = (argument.split('=').next().expect("a key"), message(argument));
            assert!(text.contains(key) && text.contains(remedy), "{text}");
        }
    }

    #[test]
    fn values_show_as_they_were_written() {
        let loaded =
            load(&sources(&["optimizer.learning_rate=2e-4", "objective.label_drop=0.15"])).expect("valid");
        let value = |key: &str| loaded.entries().into_iter().find(|e| e.0 == key).expect(key).1;
        assert_eq!(value("optimizer.learning_rate"), "2e-4");
        assert_eq!(value("objective.label_drop"), "0.15");
        assert_eq!(value("device"), "\"cpu\"");
        assert_eq!(value("alignment.z_dims"), "[768]");
    }
}
