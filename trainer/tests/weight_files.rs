//! Weight files of others, sound and damaged. This binary counts every allocation, to show that a
//! damaged file cannot make the readers take memory out of proportion to its size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use repa_trainer::weights::pickle::Value;
use repa_trainer::weights::{Dtype, Header, TorchFile, Weights, write_safetensors, write_sharded};

/// The system's allocator, counting the bytes held by each thread and their peak.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are the ones that System needs.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Peak of the bytes that `work` holds on this thread, beyond what was held before.
fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = work();
    (result, (PEAK.get() - before).max(0) as usize)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn floats(weights: &Weights, name: &str) -> (Vec<usize>, Vec<f32>) {
    (weights.tensor(name).unwrap().shape.clone(), weights.f32(name).unwrap())
}

fn check_nested(path: &Path) {
    let mut file = TorchFile::open(path).unwrap();
    let model = file.tensors_at(&["model"]).unwrap();
    assert_eq!(model.tensors.keys().collect::<Vec<_>>(), ["bias", "weight"]);
    assert_eq!(floats(&model, "weight"), (vec![3, 2], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
    assert_eq!(floats(&model, "bias"), (vec![3], vec![-1.0, 0.5, 2.0]));

    let ema = file.tensors_at(&["ema"]).unwrap();
    let at = |i: usize| i as f32;
    let transposed = (0..6).flat_map(|c| (0..4).map(move |r| at(r * 6 + c))).collect();
    assert_eq!(floats(&ema, "transposed"), (vec![6, 4], transposed));
    let inner = vec![4.0, 6.0, 8.0, 10.0, 16.0, 18.0, 20.0, 22.0];
    assert_eq!(floats(&ema, "inner"), (vec![2, 2, 2], inner));
    let permuted =
        (0..4).flat_map(|k| (0..2).flat_map(move |i| (0..3).map(move |j| at(i * 12 + j * 4 + k)))).collect();
    assert_eq!(floats(&ema, "permuted"), (vec![4, 2, 3], permuted));
    let expanded = [1.0, 2.0].iter().flat_map(|&v| [v; 5]).collect();
    assert_eq!(floats(&ema, "expanded"), (vec![2, 5], expanded));
    assert_eq!(floats(&ema, "parameter"), (vec![2], vec![7.0, 7.0]));
    assert_eq!(floats(&ema, "scalar"), (vec![], vec![3.25]));
    assert_eq!(floats(&ema, "empty"), (vec![0, 4], vec![]));

    let types = file.tensors_at(&["types"]).unwrap();
    for name in ["bf16", "f16", "f64"] {
        assert_eq!(floats(&types, name), (vec![2], vec![1.5, -2.0]), "{name}");
    }
    assert_eq!(types.tensor("bf16").unwrap().dtype, Dtype::BF16);
    assert_eq!(types.tensor("i64").unwrap().bytes[8..], (-2i64).to_le_bytes());
    assert_eq!(types.tensor("u8").unwrap().bytes, [1, 254]);
    assert_eq!(types.tensor("bool").unwrap().bytes, [1, 0]);
    assert!(types.f32("i64").unwrap_err().to_string().contains("not a float type"));

    let args = file.find(&["args"]).unwrap();
    assert_eq!(args.kind(), "argparse.Namespace");
    assert_eq!(args.get("model").and_then(Value::as_str), Some("SiT-B/2"));
    assert_eq!(args.get("steps").and_then(Value::as_int), Some(1_000_000_000_000));
    assert_eq!(args.get("betas").unwrap().items()[1].as_f64(), Some(0.999));
    assert_eq!(args.to_json().unwrap()["note"], serde_json::Value::Null);
    assert_eq!(file.root().get("danger").unwrap().kind(), "posix.system");
    assert_eq!(file.root().get_int(3).and_then(Value::as_str), Some("an integer key"));
    assert!(!Path::new("repa-pickle-was-executed").exists());

    let all = Weights::open(path).unwrap();
    assert_eq!(floats(&all, "model.bias").1, [-1.0, 0.5, 2.0]);
    assert_eq!(floats(&all, "list.0").1, [1.0, 1.0]);
    assert_eq!(floats(&all, "list.1.deep").1, [0.0]);
    assert!(file.tensors_at(&["optimizer"]).unwrap_err().to_string().contains("has no optimizer"));
    assert!(file.tensors_at(&["args"]).unwrap_err().to_string().contains("holds no tensors"));
}

#[test]
fn nested_zip_file_is_read() {
    check_nested(&fixture("nested.pt"));
}

#[test]
fn nested_legacy_file_is_read() {
    check_nested(&fixture("nested-legacy.pt"));
}

#[test]
fn big_endian_legacy_file_is_refused() {
    let bytes = std::fs::read(fixture("nested-legacy.pt")).unwrap();
    let key = b"little_endian";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len();
    let flag = at + bytes[at..].iter().position(|&b| b == 0x88).unwrap();
    let mut bytes = bytes;
    bytes[flag] = 0x89;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big.pt");
    std::fs::write(&path, bytes).unwrap();
    assert!(TorchFile::open(&path).unwrap_err().to_string().contains("big-endian"));
}

#[test]
fn other_files_are_named_for_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.pt");
    let error = |contents: &[u8]| {
        std::fs::write(&path, contents).unwrap();
        Weights::open(&path).unwrap_err().to_string()
    };
    assert!(error(b"").contains("not a file of torch.save"));
    assert!(error(b"<html>404</html>").contains("not a file of torch.save"));
    // A plain pickle of an integer.
    assert!(error(b"\x80\x02K\x01.").contains("not a file of torch.save"));
    assert!(Weights::open(&folder.path().join("none.pt")).unwrap_err().to_string().contains("none.pt"));
    let long = [b"\xff\xff\xff\x00\x00\x00\x00\x00{".as_slice(), &[b' '; 100]].concat();
    let path = folder.path().join("file.safetensors");
    std::fs::write(&path, long).unwrap();
    assert!(Weights::open(&path).unwrap_err().to_string().contains("claims a header of 16777215 bytes"));
}

/// A legacy file around a pickle and no storages.
fn legacy_file(folder: &Path, object: &[u8]) -> PathBuf {
    let mut bytes = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.".to_vec();
    bytes.extend(b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s.");
    bytes.extend(object);
    bytes.extend(b"\x80\x02].");
    let path = folder.join("made.pt");
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn hostile_pickles_cost_no_more_than_they_weigh() {
    let folder = tempfile::tempdir().unwrap();
    let error = |object: &[u8]| {
        let path = legacy_file(folder.path(), object);
        let (result, peak) = peak(|| TorchFile::open(&path).and_then(|mut f| f.tensors_at(&[])));
        assert!(peak < 100 * object.len() + (1 << 20), "{peak} bytes for a pickle of {}", object.len());
        result.unwrap_err().to_string()
    };
    // Lists of the list before, twice: 2^90 values when written out.
    let mut laughs = b"\x80\x02]q\x00".to_vec();
    for i in 1..90u8 {
        laughs.extend([b']', b'q', i, b'(', b'h', i - 1, b'h', i - 1, b'e']);
    }
    laughs.push(b'.');
    assert!(error(&laughs).contains("million"), "{}", error(&laughs));
    // A list that contains itself.
    assert!(error(b"\x80\x02]q\x00h\x00a.").contains("contain themselves"));
    // Tuples in tuples, deep enough to overflow the stack of a careless reader.
    let deep = [b"\x80\x02)".as_slice(), &[0x85; 200_000], b"."].concat();
    assert!(error(&deep).contains("nested deeper"));
    // A tall shared value under another chain, again and again.
    let mut tall = b"\x80\x02]q\x00".to_vec();
    for _ in 0..40 {
        tall.extend(b"h\x00");
        tall.extend([0x85; 60]);
        tall.extend(b"q\x00");
    }
    tall.push(b'.');
    assert!(error(&tall).contains("nested deeper"));
    // A string that claims four gigabytes.
    assert!(error(b"\x80\x02X\xff\xff\xff\xffabc").contains("ends within a string"));
    // A tensor expanded from one element to 2^40.
    let bomb = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n\
        X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x00tQK\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85\x89NtR.";
    assert!(error(bomb).contains("storage 0 is not in the file"), "{}", error(bomb));
    for bad in [&b"\x80\x09."[..], b".", b"\x80\x02h\x05.", b"\x80\x02K\x01e.", b"\x80\x02\xfe.", b"(K\x01d."]
    {
        error(bad);
    }
}

#[test]
fn sharded_files_are_read_through_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: Vec<Header> =
        (0..5).map(|i| Header { name: format!("t{i}"), dtype: Dtype::F32, shape: vec![i + 1, 2] }).collect();
    let fill = |i: usize, w: &mut dyn std::io::Write| {
        (0..2 * (i + 1)).try_for_each(|j| w.write_all(&((10 * i + j) as f32).to_le_bytes()))
    };
    let index = write_sharded(folder.path(), "model", &tensors, &BTreeMap::new(), 60, fill).unwrap();
    assert!(index.ends_with("model.safetensors.index.json"));
    for path in [index.as_path(), folder.path()] {
        let weights = Weights::open(path).unwrap();
        assert_eq!(weights.tensors.len(), 5);
        assert_eq!(floats(&weights, "t3"), (vec![4, 2], (30..38).map(|v| v as f32).collect()));
    }
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, text.replace("model-00001", "../model-00001")).unwrap();
    assert!(Weights::open(&index).unwrap_err().to_string().contains("no plain file name"));
    std::fs::write(&index, text).unwrap();
    std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(Weights::open(&index).unwrap_err().to_string().contains("model-00002-of-00003"));
}

/// Real TAEF2 weights lie beside the project, not in it.
#[test]
fn taef2_weights_are_read() {
    let folder = std::env::var_os("REPA_WEIGHTS_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/weights"), PathBuf::from);
    for (name, tensors) in [("taef2_encoder.pth", 79), ("taef2_decoder.pth", 79)] {
        let path = folder.join(name);
        if !path.exists() {
            println!("skipped: {} is not there (set REPA_WEIGHTS_DIR)", path.display());
            continue;
        }
        let weights = Weights::open(&path).unwrap();
        assert_eq!(weights.tensors.len(), tensors, "{name}");
        for name in weights.tensors.keys() {
            assert!(weights.f32(name).unwrap().iter().all(|v| v.is_finite() && v.abs() < 100.0), "{name}");
        }
    }
}

fn small_safetensors() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    let tensors = [
        Header { name: "a.weight".into(), dtype: Dtype::F32, shape: vec![4, 6] },
        Header { name: "b".into(), dtype: Dtype::U8, shape: vec![3] },
        Header { name: "c".into(), dtype: Dtype::BF16, shape: vec![2, 1, 2] },
    ];
    let metadata = BTreeMap::from([("kind".to_owned(), "test".to_owned())]);
    let written =
        write_safetensors(&path, &tensors, &metadata, |i, w| w.write_all(&vec![i as u8; tensors[i].bytes()]))
            .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(written.bytes, bytes.len() as u64);
    assert_eq!(written.digest, xxhash_rust::xxh3::xxh3_128(&bytes));
    // The safetensors library reads it as well.
    assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor("b").unwrap().data(), [1, 1, 1]);
    bytes
}

#[derive(Debug, Clone)]
enum Damage {
    Truncate(prop::sample::Index),
    Flip(Vec<(prop::sample::Index, u8)>),
    Overwrite(prop::sample::Index, Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    let flip = prop::collection::vec((any::<prop::sample::Index>(), 0..8u8), 1..8);
    let overwrite = (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..16));
    prop_oneof![
        any::<prop::sample::Index>().prop_map(Damage::Truncate),
        flip.prop_map(Damage::Flip),
        overwrite.prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
    ]
}

/// Opens a damaged copy of a file: whatever comes of it, no panic and no more memory than the file
/// warrants. A truncated file must not pass for a whole one.
fn survive(original: &[u8], head: usize, name: &str, damage: &Damage) -> Result<(), TestCaseError> {
    let mut bytes = original.to_vec();
    match damage {
        Damage::Truncate(at) => bytes.truncate(at.index(original.len())),
        // Half of the flips hit the head, where lengths and names stand.
        Damage::Flip(flips) => {
            for (number, (at, bit)) in flips.iter().enumerate() {
                let range = if number % 2 == 0 { head } else { original.len() };
                bytes[at.index(range)] ^= 1 << bit;
            }
        }
        Damage::Overwrite(at, new) => {
            let at = at.index(head);
            let end = (at + new.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&new[..end - at]);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, &bytes).unwrap();
    let (result, peak) = peak(|| Weights::open(&path));
    let allowed = 32 * bytes.len() + (1 << 20);
    prop_assert!(peak < allowed, "{} bytes held for a file of {}", peak, bytes.len());
    if matches!(damage, Damage::Truncate(_)) {
        prop_assert!(result.is_err(), "a truncated file was read");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_safetensors_are_survived(damage in damage()) {
        let bytes = small_safetensors();
        survive(&bytes, 200, "file.safetensors", &damage)?;
    }

    #[test]
    fn damaged_zip_files_are_survived(damage in damage()) {
        let bytes = std::fs::read(fixture("nested.pt")).unwrap();
        survive(&bytes, 3000.min(bytes.len()), "file.pt", &damage)?;
    }

    #[test]
    fn damaged_legacy_files_are_survived(damage in damage()) {
        let bytes = std::fs::read(fixture("nested-legacy.pt")).unwrap();
        survive(&bytes, 2500.min(bytes.len()), "file.pt", &damage)?;
    }
}
