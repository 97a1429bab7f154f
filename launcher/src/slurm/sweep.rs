//! The runs of a sweep.

use crate::exit::Failure;

/// More than this SLURM refuses (its default MaxArraySize is 1001).
const MOST: usize = 1000;

/// One run of a sweep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its folder, under the sweep's.
    pub name: String,
    /// What differs from the other runs.
    pub values: Vec<String>,
}

/// Every combination of `KEY=VALUE,VALUE,...` lists, the last one changing fastest.
///
/// # Errors
/// No list, a key twice, or too many runs.
pub fn points(lists: &[String]) -> Result<Vec<Point>, Failure> {
    let mut keys: Vec<(&str, Vec<&str>)> = Vec::new();
    for list in lists {
        let (key, values) = list.split_once('=').map_or((list.as_str(), Vec::new()), |(k, v)| (k, split(v)));
        if values.is_empty() || values.contains(&"") {
            return Err(Failure::usage(format!(
                "--array {list}: write a key and its values, such as optimizer.learning_rate=1e-4,2e-4"
            )));
        }
        let own = key == "run.dir" || key == "checkpoint.dir";
        if own || keys.iter().any(|(known, _)| *known == key) {
            let problem = if own { "each run has a folder of its own" } else { "it is there twice" };
            return Err(Failure::usage(format!("--array {list}: {problem}")));
        }
        keys.push((key, values));
    }
    let count = keys.iter().try_fold(1usize, |count, (_, values)| count.checked_mul(values.len()));
    match count {
        Some(count) if count <= MOST => {}
        _ => {
            return Err(Failure::usage(format!(
                "--array: more than {MOST} runs; SLURM takes no larger array"
            )));
        }
    }
    let mut points = vec![Point { name: String::new(), values: Vec::new() }];
    for (key, values) in &keys {
        let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        let short = last(key);
        // The key's last part names the run where no other key ends in it.
        let alone = keys.iter().filter(|(other, _)| last(other) == short).count() == 1;
        let label = if alone { &short } else { *key };
        let with = |point: &Point, value: &&str| {
            let separator = if point.name.is_empty() { "" } else { "_" };
            let mut values = point.values.clone();
            values.push(format!("{key}={value}"));
            Point { name: format!("{}{separator}{label}-{}", point.name, name(value)), values }
        };
        points = points.iter().flat_map(|point| values.iter().map(move |value| with(point, value))).collect();
    }
    distinct(&points)?;
    Ok(points)
}

/// Values that differ only in signs that a folder's name does not keep would share a folder.
fn distinct(points: &[Point]) -> Result<(), Failure> {
    let mut names: Vec<&str> = points.iter().map(|point| point.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(Failure::usage(format!("--array: two runs would have the folder {}", pair[0]))),
    }
}

/// Splits at commas outside brackets and quotes.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut begin, mut depth, mut quote) = (Vec::new(), 0, 0usize, None);
    for (at, c) in text.char_indices() {
        match (c, quote) {
            ('"' | '\'', None) => quote = Some(c),
            (_, Some(open)) if c == open => quote = None,
            (_, Some(_)) => {}
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth = depth.saturating_sub(1),
            (',', None) if depth == 0 => {
                parts.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    parts
}

/// A value as part of a folder's name.
fn name(value: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || ".+-".contains(c) { c } else { '-' };
    value.chars().map(keep).collect::<String>().trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lists: &[&str]) -> Result<Vec<Point>, String> {
        points(&lists.iter().map(|&l| l.to_owned()).collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn every_combination_once_with_a_folder_of_its_own() {
        let points =
            of(&["optimizer.learning_rate=1e-4,2e-4", "alignment.z_dims=[8,9],[7]"]).expect("a sweep");
        let names: Vec<&str> = points.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "learning_rate-1e-4_z_dims-8-9",
                "learning_rate-1e-4_z_dims-7",
                "learning_rate-2e-4_z_dims-8-9",
                "learning_rate-2e-4_z_dims-7"
            ]
        );
        assert_eq!(points[2].values, ["optimizer.learning_rate=2e-4", "alignment.z_dims=[8,9]"]);
        let same_end = of(&["train.seed=1,2", "sample.seed=3"]).expect("a sweep");
        assert_eq!(same_end[1].name, "train.seed-2_sample.seed-3");
    }

    #[test]
    fn what_is_no_sweep_is_refused() {
        for (lists, problem) in [
            (&["train.seed"][..], "write a key and its values"),
            (&["train.seed=1,,2"], "write a key and its values"),
            (&["train.seed=1", "train.seed=2"], "twice"),
            (&["run.dir=a,b"], "a folder of its own"),
            (&["a.b=/x,-x"], "two runs would have the folder b-x"),
        ] {
            let said = of(lists).expect_err("refused");
            assert!(said.contains(problem), "{said}");
        }
        let many = format!("train.seed={}", (0..40).map(|i| i.to_string()).collect::<Vec<_>>().join(","));
        let other = many.replace("train", "sample");
        assert!(of(&[&many, &other]).expect_err("refused").contains("more than 1000"));
    }
}
