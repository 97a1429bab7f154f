//! Labels of images: a `dataset.json` as EDM2's tools write it, a JSON map, a CSV table, or the names of
//! folders.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

/// Labelled files of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Name and label of each file, in the order that gives their numbers.
    pub members: Vec<(String, u32)>,
    /// Names of the classes by label; empty where labels are numbers.
    pub class_names: Vec<String>,
}

/// Why there are no labels.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct LabelsError {
    /// The file or folder.
    pub path: PathBuf,
    /// What is wrong with it, and what belongs there.
    pub problem: String,
}

/// A label as a file gives it: a number, or the name of a class.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Given {
    Number(u32),
    Name(String),
}

#[derive(Deserialize)]
struct DataSet {
    /// Null where EDM2's tool was given no labels; a map of files has no such key at all.
    #[serde(deserialize_with = "Option::deserialize")]
    labels: Option<Vec<(String, Given)>>,
}

impl Labels {
    /// From the text of a `.json` or `.csv` file (its path decides which, and is for messages).
    ///
    /// JSON is `{"labels": [["00000/a.png", 6], ...]}` or `{"00000/a.png": 6, ...}`; CSV has a file and a
    /// label a line, a heading if its label is neither number nor followed by others of its kind. Labels
    /// are numbers, or names that are numbered in their alphabetical order.
    ///
    /// # Errors
    /// The text is neither, names no file, names one twice, or names a path outside the tree.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, LabelsError> {
        let is_csv = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv"));
        let given = if is_csv { from_csv(text) } else { from_json(text) };
        given.and_then(number).map_err(|problem| LabelsError { path: path.to_owned(), problem })
    }

    /// From the top folder that each file lies in, in alphabetical order.
    ///
    /// # Errors
    /// A file lies in no folder, or there is no file.
    pub fn from_folders(root: &Path, names: Vec<String>) -> Result<Self, LabelsError> {
        let wrong = |problem: String| Err(LabelsError { path: root.to_owned(), problem });
        let mut given = Vec::with_capacity(names.len());
        for name in names {
            let Some((folder, _)) = name.split_once('/') else {
                return wrong(format!(
                    "{name} lies in no class folder, and there is no dataset.json: put each class in a folder \
                     of its own, or name a file of labels with --labels"
                ));
            };
            given.push((name.clone(), Given::Name(folder.to_owned())));
        }
        if given.is_empty() {
            return wrong("holds no PNG or JPEG image".to_owned());
        }
        number(given).or_else(wrong)
    }

    /// One more than the greatest label.
    #[must_use]
    pub fn classes(&self) -> usize {
        match self.class_names.len() {
            0 => self.members.iter().map(|(_, label)| *label as usize + 1).max().unwrap_or(0),
            named => named,
        }
    }
}

fn from_json(text: &[u8]) -> Result<Vec<(String, Given)>, String> {
    // One after the other, not as an untagged enum: that would hold the text's million values twice.
    match serde_json::from_slice::<DataSet>(text) {
        Ok(DataSet { labels: Some(labels) }) => return Ok(labels),
        Ok(DataSet { labels: None }) => return Err("lists no labels".to_owned()),
        Err(e) if e.is_data() => {}
        Err(e) => return Err(format!("is not JSON: {e}")),
    }
    match serde_json::from_slice::<BTreeMap<String, Given>>(text) {
        Ok(map) => Ok(map.into_iter().collect()),
        Err(e) => Err(format!(
            "is not {{\"labels\": [[\"00000/a.png\", 6], ...]}} or {{\"00000/a.png\": 6, ...}} (line {})",
            e.line()
        )),
    }
}

fn from_csv(text: &[u8]) -> Result<Vec<(String, Given)>, String> {
    let mut reader =
        csv::ReaderBuilder::new().has_headers(false).flexible(true).trim(csv::Trim::All).from_reader(text);
    let mut given = Vec::new();
    for (line, record) in reader.records().enumerate() {
        let record = record.map_err(|e| format!("is not CSV: {e}"))?;
        match (record.get(0), record.get(1)) {
            (Some(file), Some(label)) if !file.is_empty() && !label.is_empty() => {
                let label = label.parse().map_or_else(|_| Given::Name(label.to_owned()), Given::Number);
                given.push((file.to_owned(), label));
            }
            _ => return Err(format!("line {} is not \"file,label\"", line + 1)),
        }
    }
    // A heading is a first line without a file's ending, whose label is a name like `label`.
    if let Some((file, Given::Name(_))) = given.first()
        && !file.contains('.')
    {
        given.remove(0);
    }
    Ok(given)
}

/// Checks names and turns class names into numbers.
fn number(given: Vec<(String, Given)>) -> Result<Labels, String> {
    if given.is_empty() {
        return Err("lists no labels".to_owned());
    }
    let mut seen = HashSet::new();
    for (name, _) in &given {
        if !Path::new(name).components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(format!("lists {name:?}, which is not a path below its folder"));
        }
        if !seen.insert(name) {
            return Err(format!("lists {name:?} twice"));
        }
    }
    let names: BTreeSet<&str> = given
        .iter()
        .filter_map(|(_, label)| match label {
            Given::Name(name) => Some(name.as_str()),
            Given::Number(_) => None,
        })
        .collect();
    let class_names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    let members = given
        .into_iter()
        .map(|(file, label)| match label {
            Given::Number(label) if class_names.is_empty() => Ok((file, label)),
            Given::Number(label) => Err(format!(
                "labels {file:?} with the number {label} and others with names: use one of the two"
            )),
            Given::Name(name) => {
                let label = class_names.binary_search(&name).expect("every name is in the list");
                Ok((file, label as u32))
            }
        })
        .collect::<Result<_, _>>()?;
    Ok(Labels { members, class_names })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &str, text: &str) -> Result<Labels, String> {
        Labels::parse(Path::new(path), text.as_bytes()).map_err(|e| e.to_string())
    }

    fn members(labels: &Labels) -> Vec<(&str, u32)> {
        labels.members.iter().map(|(name, label)| (name.as_str(), *label)).collect()
    }

    #[test]
    fn all_forms_give_the_same_labels() {
        for (path, text) in [
            ("dataset.json", "{\"labels\": [[\"a/2.png\", 6], [\"b.png\", 0]]}"),
            ("l.json", "{\"a/2.png\": 6, \"b.png\": 0}"),
            ("l.csv", "a/2.png,6\nb.png, 0\n"),
            ("l.csv", "file,label\na/2.png,6\nb.png,0\n"),
            ("l.CSV", "\"a/2.png\",6,more\nb.png,0"),
        ] {
            let labels = parse(path, text).unwrap();
            assert_eq!(members(&labels), [("a/2.png", 6), ("b.png", 0)], "{text}");
            assert_eq!((labels.classes(), labels.class_names.len()), (7, 0));
        }
    }

    #[test]
    fn names_are_numbered_in_their_order() {
        let labels = parse("l.csv", "x.png,zebra\ny.png,ant\nz.png,zebra\n").unwrap();
        assert_eq!(members(&labels), [("x.png", 1), ("y.png", 0), ("z.png", 1)]);
        assert_eq!(
            (labels.class_names, labels.members.len()),
            (vec!["ant".to_owned(), "zebra".to_owned()], 3)
        );
        let names = ["n02/a.jpg", "n01/x/b.jpg"].map(str::to_owned).to_vec();
        let labels = Labels::from_folders(Path::new("train"), names).unwrap();
        assert_eq!(members(&labels), [("n02/a.jpg", 1), ("n01/x/b.jpg", 0)]);
        assert_eq!(labels.classes(), 2);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (path, text, part) in [
            ("dataset.json", "{\"labels\": null}", "dataset.json: lists no labels"),
            ("dataset.json", "{\"labels\": [[\"a.npy\"]]}", "is not {\"labels\""),
            ("dataset.json", "{\"labels\": ", "is not JSON"),
            ("dataset.json", "{\"labels\": [[\"../a.npy\", 1]]}", "not a path below its folder"),
            ("dataset.json", "{\"labels\": [[\"a.npy\", 1], [\"a.npy\", 2]]}", "lists \"a.npy\" twice"),
            ("l.csv", "", "lists no labels"),
            ("l.csv", "a.png\n", "line 1 is not \"file,label\""),
            ("l.csv", "a.png,1\nb.png,cat\n", "use one of the two"),
            ("l.json", "{\"a.png\": -1}", "is not {\"labels\""),
        ] {
            let error = parse(path, text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let error = Labels::from_folders(Path::new("train"), vec!["a.png".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("a.png lies in no class folder"), "{error}");
    }
}
