//! `repa-dist dashboards`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder to write to
    #[arg(value_name = "DIR", default_value = "dashboards")]
    dir: PathBuf,
    /// Run folder that Prometheus finds the ranks through; give it once for each run
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    run: Vec<PathBuf>,
    /// Overwrite files that are there and differ
    #[arg(long)]
    force: bool,
}

macro_rules! files {
    ($($path:literal),* $(,)?) => {
        [$(($path, include_str!(concat!("../../../dashboards/", $path)))),*]
    };
}

/// What is written, by its path.
const FILES: [(&str, &str); 11] = files![
    "README.md",
    "compose.yaml",
    "prometheus/prometheus.yml",
    "prometheus/rules.yml",
    "prometheus/alerts.yml",
    "prometheus/tests.yml",
    "grafana/provisioning/datasources/prometheus.yml",
    "grafana/provisioning/dashboards/repa-dist.yml",
    "grafana/dashboards/training.json",
    "grafana/dashboards/cluster.json",
    "grafana/dashboards/reliability.json",
];

/// Lines that name the run folder, in `prometheus.yml` and `compose.yaml`.
const TARGETS: &str = "          - ../../runs/quickstart/prometheus-targets.json\n";
const MOUNT: &str = "      - ${REPA_RUN:-../runs/quickstart}:/runs/quickstart:ro\n";
const COMMAND: &str = "REPA_RUN=/path/to/run docker compose -f dashboards/compose.yaml up";

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let Arguments { dir, run, force } = arguments;
    let runs = run.iter().map(|run| absolute(run)).collect::<Result<Vec<_>, _>>()?;
    let files: Vec<(PathBuf, String)> =
        FILES.iter().map(|(path, text)| (dir.join(path), adapted(path, text, &runs))).collect();
    let mut changed = Vec::new();
    for (path, text) in &files {
        match std::fs::read(path) {
            Ok(there) if there == text.as_bytes() => {}
            Ok(_) => changed.push(path.display().to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Failure::usage(format!("cannot read {}: {e}", path.display()))),
        }
    }
    if !changed.is_empty() && !force {
        return Err(Failure::usage(format!(
            "these files are there and differ from what would be written: {}; name another folder, or overwrite them \
             with --force",
            changed.join(", ")
        )));
    }
    for (path, text) in &files {
        write(path, text).map_err(|e| {
            Failure::usage(format!("cannot write {}: {e}; name another folder", path.display()))
        })?;
    }
    println!("wrote {} files to {}", files.len(), dir.display());
    for run in &runs {
        println!("run          {run}");
    }
    println!("\nNext, one of:");
    let dir = dir.display();
    println!("  docker compose -f {dir}/compose.yaml up    (Grafana at http://127.0.0.1:3000)");
    println!(
        "  prometheus --config.file {dir}/prometheus/prometheus.yml --web.listen-address 127.0.0.1:9090"
    );
    println!("and {dir}/README.md says how to add them to a Grafana that is there already.");
    Ok(Outcome::Done)
}

/// A run folder's path for other programs' files.
fn absolute(run: &Path) -> Result<String, Failure> {
    let path =
        std::path::absolute(run).map_err(|e| Failure::usage(format!("--run {}: {e}", run.display())))?;
    match path.to_str() {
        Some(text) if !text.contains('*') => Ok(text.to_owned()),
        _ => Err(Failure::usage(format!(
            "--run {}: Prometheus takes no path with * or with bytes that are no text; give --run once for each run",
            run.display()
        ))),
    }
}

/// A file's text for these runs. JSON's strings are YAML's too.
fn adapted(path: &str, text: &str, runs: &[String]) -> String {
    let quoted = |text: String| serde_json::Value::String(text).to_string();
    match path {
        "prometheus/prometheus.yml" => {
            let lines: String = runs.iter().fold(String::new(), |mut lines, run| {
                let _ = writeln!(lines, "          - {}", quoted(format!("{run}/prometheus-targets.json")));
                lines
            });
            text.replace(TARGETS, &lines)
        }
        "compose.yaml" => {
            let lines: String = runs.iter().fold(String::new(), |mut lines, run| {
                // Compose reads `$` as the beginning of a variable.
                let run = quoted(run.replace('$', "$$"));
                let _ = writeln!(
                    lines,
                    "      - {{ type: bind, source: {run}, target: {run}, read_only: true, bind: {{ create_host_path: true }} }}"
                );
                lines
            });
            text.replace(MOUNT, &lines).replace(COMMAND, "docker compose up")
        }
        _ => text.to_owned(),
    }
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_written() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards");
        let mut found = Vec::new();
        walk(&root, &mut found);
        let mut there: Vec<String> = found
            .iter()
            .map(|path| path.strip_prefix(&root).expect("in the folder").display().to_string())
            .filter(|path| !path.starts_with("check/") && !path.ends_with(".py"))
            .collect();
        there.sort();
        let mut written: Vec<String> = FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
        written.sort();
        assert_eq!(there, written);
    }

    #[test]
    fn paths_are_those_of_the_runs() {
        let runs = ["/runs/a b".to_owned(), "/x$y".to_owned()];
        let text = |path: &str| {
            let (path, text) = FILES.iter().find(|(name, _)| *name == path).expect("a file");
            adapted(path, text, &runs)
        };
        let prometheus = text("prometheus/prometheus.yml");
        assert!(prometheus.contains("          - \"/runs/a b/prometheus-targets.json\"\n"), "{prometheus}");
        assert!(prometheus.contains("          - \"/x$y/prometheus-targets.json\"\n"), "{prometheus}");
        let compose = text("compose.yaml");
        assert!(compose.contains(r#"source: "/x$$y", target: "/x$$y", read_only: true"#), "{compose}");
        for text in [prometheus, compose] {
            assert!(!text.contains("quickstart") && !text.contains("REPA_RUN"), "{text}");
        }
        assert!(absolute(Path::new("runs/*")).is_err());
    }
}
