use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use repa_comm::Single;

use super::*;
use crate::data::bench::imagenet_spec;
use crate::data::store::{Kind, LEFT_OUT_FILE, LatentStore};

/// Numbers; some are bad.
#[derive(Default)]
struct Numbers {
    count: usize,
    bad: Mutex<Vec<usize>>,
    loads: AtomicUsize,
}

impl Numbers {
    fn new(count: usize, bad: &[usize]) -> Self {
        Self { count, bad: Mutex::new(bad.to_vec()), loads: AtomicUsize::new(0) }
    }
}

impl Source for Numbers {
    type Raw = usize;

    fn len(&self) -> usize {
        self.count
    }

    fn name(&self, i: usize) -> String {
        format!("number-{i}")
    }

    fn load(&self, i: usize) -> Result<usize, Fault> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        match self.bad.lock().unwrap().contains(&i) {
            true => Err("is bad".to_owned().into()),
            false => Ok(i),
        }
    }
}

fn spec() -> StoreSpec {
    StoreSpec {
        kind: Kind::Latents,
        channels: 1,
        height: 2,
        width: 2,
        normalisation: None,
        ..imagenet_spec(false)
    }
}

/// Number 77 becomes a sample that cannot be stored.
fn make(raw: Vec<usize>) -> Result<Vec<Made>, String> {
    Ok(raw
        .into_iter()
        .map(|i| {
            let value = if i == 77 { f32::NAN } else { i as f32 };
            let view = MadeView { latent: vec![value; 4], features: Vec::new() };
            Made { label: (i % 10) as u32, view, flipped: None, image: Vec::new() }
        })
        .collect())
}

struct Place {
    _folder: tempfile::TempDir,
    dir: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { dir: folder.path().join("store"), _folder: folder }
    }

    fn build(&self, source: &Numbers, max_bad: usize) -> Result<Built, String> {
        self.build_with(source, max_bad, &make, &mut |_| ())
    }

    fn build_with(
        &self,
        source: &Numbers,
        max_bad: usize,
        make: &Make<usize>,
        progress: &mut dyn FnMut(BuildProgress),
    ) -> Result<Built, String> {
        let options = BuildOptions { batch: 3, shard_len: 8, max_bad };
        build(&Single::new(), source, &self.dir, &spec(), &options, make, progress).map_err(|e| e.message)
    }

    /// The numbers that the store holds, in order.
    fn numbers(&self) -> Vec<usize> {
        let store = LatentStore::open(&self.dir).unwrap();
        assert!(store.verify(&|_| ()).findings.is_empty());
        let mut latent = [0.0; 4];
        (0..store.len())
            .map(|i| {
                store.latent(i, false, &mut latent).unwrap();
                latent[0] as usize
            })
            .collect()
    }
}

#[test]
fn all_members_become_samples_in_order_and_progress_is_told() {
    let place = Place::new();
    let mut seen = Vec::new();
    place.build_with(&Numbers::new(29, &[]), 0, &make, &mut |p| seen.push(p)).unwrap();
    assert!(place.numbers().into_iter().eq(0..29));
    assert!(seen.windows(2).all(|w| w[0].done < w[1].done));
    assert_eq!(seen.last(), Some(&BuildProgress { done: 29, total: 29, resumed: 0 }));
    assert!(!place.dir.join(LEFT_OUT_FILE).exists());
}

#[test]
fn a_build_that_was_stopped_goes_on_and_gives_the_same_store() {
    let [whole, stopped] = [Place::new(), Place::new()];
    let index = whole.build(&Numbers::new(29, &[]), 0).unwrap().index;
    let calls = AtomicUsize::new(0);
    let failing = |raw: Vec<usize>| match calls.fetch_add(1, Ordering::Relaxed) {
        5 => Err("out of memory".to_owned()),
        _ => make(raw),
    };
    let source = Numbers::new(29, &[]);
    let error = stopped.build_with(&source, 0, &failing, &mut |_| ()).unwrap_err();
    // Shards of 8 in calls of 3, 3 and 2: the sixth is the end of the second shard.
    assert_eq!(error, "encoding members 14 to 16: out of memory");
    assert!(LatentStore::open(&stopped.dir).is_err());
    let mut first = None;
    let again = stopped.build_with(&source, 0, &make, &mut |p| first = first.or(Some(p))).unwrap();
    assert_eq!(first, Some(BuildProgress { done: 8, total: 29, resumed: 8 }));
    assert_eq!(again.index, index);
}

#[test]
fn bad_members_are_listed_and_their_number_decides() {
    let place = Place::new();
    let source = Numbers::new(90, &[3, 40]);
    let error = place.build(&source, 2).unwrap_err();
    assert!(
        error.starts_with("3 members cannot be used, where --max-bad allows 2; the first is number-3 is bad")
    );
    let report = place.dir.with_extension("partial").join(LEFT_OUT_FILE);
    assert!(error.contains(&report.display().to_string()) && error.contains("--max-bad 3"), "{error}");
    let listed: Vec<LeftOut> = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let names: Vec<_> = listed.iter().map(|m| (m.member, m.name.as_str(), m.problem.as_str())).collect();
    let nan = "latent value 0 is NaN, not a finite number";
    assert_eq!(names, [(3, "number-3", "is bad"), (40, "number-40", "is bad"), (77, "number-77", nan)]);
    assert!(!place.dir.exists(), "no store that looks whole");

    // One is mended: only its shard is made again (and that of 77, which loads and is bad only then).
    source.bad.lock().unwrap().retain(|&i| i != 40);
    source.loads.store(0, Ordering::Relaxed);
    let built = place.build(&source, 2).unwrap();
    assert_eq!(built.left_out.iter().map(|m| m.member).collect::<Vec<_>>(), [3, 77]);
    assert!(source.loads.load(Ordering::Relaxed) <= 3 + 8 + 8);
    assert!(place.numbers().into_iter().eq((0..90).filter(|i| ![3, 77].contains(i))));
    let kept: Vec<LeftOut> =
        serde_json::from_slice(&fs::read(place.dir.join(LEFT_OUT_FILE)).unwrap()).unwrap();
    assert_eq!(kept, built.left_out);
}

#[test]
fn a_hopeless_source_is_given_up_early() {
    let place = Place::new();
    let source = Numbers::new(1000, &(0..1000).collect::<Vec<_>>());
    let error = place.build(&source, 5).unwrap_err();
    assert!(error.contains("where --max-bad allows 5"), "{error}");
    let loads = source.loads.load(Ordering::Relaxed);
    assert!(loads < 200, "{loads} of 1000 were tried");
}

#[test]
fn an_unfinished_store_of_another_plan_or_source_is_not_gone_on_with() {
    let place = Place::new();
    place.build(&Numbers::new(29, &[4]), 0).unwrap_err();
    let error = place.build(&Numbers::new(30, &[]), 0).unwrap_err();
    assert!(error.contains("other settings (members was 29 and is 30 now)"), "{error}");
    let options = BuildOptions { batch: 3, shard_len: 9, max_bad: 0 };
    let source = Numbers::new(29, &[]);
    let error = build(&Single::new(), &source, &place.dir, &spec(), &options, &make, &mut |_| ())
        .unwrap_err()
        .message;
    assert!(error.contains("shard_len was 8 and is 9 now"), "{error}");
}
