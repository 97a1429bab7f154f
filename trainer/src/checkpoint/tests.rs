use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::objective::LossScaler;
use crate::params::{Init, Layout};

fn layout() -> Layout {
    let mut layout = Layout::default();
    layout.add_frozen("pos_embed", &[1, 4, 2], Init::Zeros);
    layout.add("a.weight", &[5, 3], Init::Zeros);
    layout.add("a.bias", &[5], Init::Zeros);
    layout.add("b.weight", &[7, 2, 2], Init::Zeros);
    layout.add("c", &[1], Init::Zeros);
    layout
}

fn arrays(len: usize, salt: f32) -> [Vec<f32>; 4] {
    std::array::from_fn(|a| (0..len).map(|i| salt + a as f32 * 1000.0 + i as f32 * 0.37).collect())
}

fn save(folder: &Path, step: u64, arrays: &[Vec<f32>; 4], world: usize) {
    let [model, ema, exp_avg, exp_avg_sq] = arrays;
    let arrays = Arrays { model, ema, exp_avg, exp_avg_sq };
    save_parts(folder, step, world, |rank| arrays.parts(rank, world));
}

fn save_parts<'a>(folder: &Path, step: u64, world: usize, parts: impl Fn(usize) -> Vec<Part<'a>>) {
    let (layout, checkpoints) = (layout(), Checkpoints::at(folder));
    let write =
        |rank| checkpoints.write_shard(step, &layout, &parts(rank), &[], (rank, world)).expect("written");
    let records = (0..world).map(write).collect();
    checkpoints.commit(&layout, about(step), records).expect("committed");
}

pub(super) fn about(step: u64) -> About {
    About {
        progress: Progress { step, samples: step * 8, updates: step, scaler: LossScaler::default() },
        config: serde_json::json!({ "train": { "seed": 1 } }),
        // The later, the worse.
        metrics: [("loss".to_owned(), step as f64)].into(),
        branch: None,
        node_local: false,
        data: None,
    }
}

fn latest(folder: &Path) -> Found {
    Checkpoints::at(folder).latest().expect("one is good")
}

fn load(checkpoint: &Checkpoint) -> [Vec<f32>; 4] {
    Array::ALL.map(|array| checkpoint.read(&layout(), array).expect("readable").to_vec())
}

#[test]
fn any_world_size_reads_what_any_other_wrote() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut expected = arrays(layout().trainable_len(), 0.5);
    expected[2][3] = f32::from_bits(0x7fc0_1234); // a NaN's payload survives too
    for (step, world) in [4, 2, 3, 1, 48].into_iter().enumerate() {
        save(folder.path(), step as u64, &expected, world);
        let found = latest(folder.path());
        let checkpoint = found.checkpoint.expect("one");
        assert!(found.passed_over.is_empty());
        assert_eq!(checkpoint.progress().step, step as u64);
        let bits = |arrays: &[Vec<f32>; 4]| {
            arrays.each_ref().map(|a| a.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(bits(&load(&checkpoint)), bits(&expected));
        for readers in [1, 2, 3, 5] {
            for (number, array) in Array::ALL.into_iter().enumerate() {
                let joined: Vec<u32> = (0..readers)
                    .flat_map(|rank| {
                        let range = repa_comm::shard_range(layout().trainable_len(), rank, readers);
                        checkpoint.read_ranges(&layout(), array, &[range]).expect("readable").to_vec()
                    })
                    .map(f32::to_bits)
                    .collect();
                assert_eq!(joined, bits(&expected)[number]);
            }
        }
    }
}

/// As a sharded optimizer keeps its state: every rank a piece of each of several buckets.
#[test]
fn what_lies_in_many_pieces_is_put_together_again() {
    let len = layout().trainable_len();
    let expected = arrays(len, 0.5);
    for (step, (world, bucket)) in [(2, 9), (3, 7), (4, 3), (5, 2)].into_iter().enumerate() {
        let folder = tempfile::tempdir().expect("a folder");
        let ranges = |rank: usize| -> Vec<std::ops::Range<usize>> {
            let shard = |begin: usize| {
                let shard = repa_comm::shard_range(bucket.min(len - begin), rank, world);
                begin + shard.start..begin + shard.end
            };
            (0..len).step_by(bucket).map(shard).filter(|r| !r.is_empty()).collect()
        };
        let values: Vec<[Vec<f32>; 4]> = (0..world)
            .map(|rank| {
                expected.each_ref().map(|a| ranges(rank).into_iter().flat_map(|r| a[r].to_vec()).collect())
            })
            .collect();
        save_parts(folder.path(), step as u64, world, |rank| {
            let part = |(array, values)| Part { array, ranges: ranges(rank), values };
            Array::ALL.into_iter().zip(values[rank].iter().map(Vec::as_slice)).map(part).collect()
        });
        let checkpoint = latest(folder.path()).checkpoint.expect("one");
        assert_eq!(load(&checkpoint), expected, "{world} ranks, buckets of {bucket}");
        for rank in 0..world {
            for (array, values) in Array::ALL.into_iter().zip(&values[rank]) {
                let read = checkpoint.read_ranges(&layout(), array, &ranges(rank)).expect("readable");
                assert_eq!(read[..], values[..]);
            }
        }
    }
}

#[test]
fn shards_are_safetensors_files_with_the_reference_names() {
    let folder = tempfile::tempdir().expect("a folder");
    save(folder.path(), 1, &arrays(layout().trainable_len(), 0.0), 2);
    let path = folder.path().join("step-00000001/rank-00000-of-00002.safetensors");
    let weights = crate::weights::Weights::open_safetensors(&path).expect("safetensors");
    assert_eq!(weights.f32("model.a.bias").expect("there").len(), 5);
    assert!(weights.tensors.contains_key("exp_avg_sq.a.weight"));
    assert!(!weights.tensors.contains_key("model.pos_embed"), "frozen parameters follow from the model");
}

#[test]
fn the_same_state_makes_the_same_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = arrays(layout().trainable_len(), 0.0);
    let shard = || {
        save(folder.path(), 1, &state, 2);
        std::fs::read(folder.path().join("step-00000001/rank-00001-of-00002.safetensors")).expect("read")
    };
    let first = shard();
    for _ in 0..4 {
        assert_eq!(shard(), first);
    }
}

#[test]
fn a_save_that_was_cut_short_is_not_seen_and_is_cleared_away() {
    let folder = tempfile::tempdir().expect("a folder");
    let checkpoints = Checkpoints::at(folder.path());
    assert!(latest(folder.path()).checkpoint.is_none());
    for step in 1..=4 {
        save(folder.path(), step, &arrays(layout().trainable_len(), step as f32), 2);
    }
    // Four ranks, of which the second's shard is written and the others' are not.
    let state = arrays(layout().trainable_len(), 5.0);
    let [model, ema, exp_avg, exp_avg_sq] = &state;
    let parts = Arrays { model, ema, exp_avg, exp_avg_sq }.parts(1, 4);
    checkpoints.write_shard(5, &layout(), &parts, &[], (1, 4)).expect("written");
    assert_eq!(latest(folder.path()).checkpoint.expect("one").progress().step, 4);
    assert_eq!(checkpoints.list().expect("listed").unfinished, ["step-00000005.partial"]);
    assert_eq!(checkpoints.discard_unfinished().expect("discarded"), ["step-00000005.partial"]);
    checkpoints.prune(&Retention { last: 2, every: 0, best: 1 }, "loss").expect("pruned");
    let listed = checkpoints.list().expect("listed");
    assert_eq!(listed.steps, [1, 3, 4]);
    assert!(listed.unfinished.is_empty());
    let aside = checkpoints.set_aside_after(1).expect("set aside");
    assert!(aside.len() == 2 && aside.iter().all(|path| path.join("manifest.json").exists()));
    assert_eq!(checkpoints.list().expect("listed"), storage::Listed { steps: vec![1], unfinished: vec![] });
}

/// Saved on disks of the hosts' own: a host alone cannot go on from it, and says what it lacks; its files copied
/// together are a checkpoint.
#[test]
fn the_shards_of_two_hosts_make_one_checkpoint() {
    let (here, there) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let state = arrays(layout().trainable_len(), 5.0);
    let [model, ema, exp_avg, exp_avg_sq] = &state;
    let arrays = Arrays { model, ema, exp_avg, exp_avg_sq };
    let hosts = [Checkpoints::at(here.path()), Checkpoints::at(there.path())];
    let write = |rank: usize| {
        hosts[rank / 2].write_shard(3, &layout(), &arrays.parts(rank, 4), &[], (rank, 4)).expect("written")
    };
    let records: Vec<ShardRecord> = (0..4).map(write).collect();
    for host in &hosts {
        let about = About { node_local: true, ..about(3) };
        host.commit(&layout(), about, records.clone()).expect("committed");
    }
    let error = hosts[0].open(3).expect_err("half of it").to_string();
    assert!(
        error.contains("2 of its shards are not here") && error.contains("rank-00002-of-00004"),
        "{error}"
    );
    for rank in [2, 3] {
        let file = format!("step-00000003/rank-{rank:05}-of-00004.safetensors");
        std::fs::copy(there.path().join(&file), here.path().join(&file)).expect("copied");
    }
    assert_eq!(load(&hosts[0].latest().expect("good").checkpoint.expect("one")), state);
}

#[test]
fn a_checkpoint_of_another_model_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    save(folder.path(), 1, &arrays(layout().trainable_len(), 0.0), 1);
    let mut other = Layout::default();
    other.add("a.weight", &[3, 5], Init::Zeros);
    other.add("d", &[2], Init::Zeros);
    let checkpoint = latest(folder.path()).checkpoint.expect("one");
    let message = checkpoint.read(&other, Array::Model).expect_err("other").to_string();
    for part in ["a.weight is [5, 3]", "d is missing", "c is unexpected"] {
        assert!(message.contains(part), "{message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever happens to one file of the newest checkpoint, it is found out, and the one before is used.
    #[test]
    fn damage_is_found_and_the_last_good_one_is_used(
        file in 0usize..5,
        kind in 0usize..6,
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        save(folder.path(), 1, &arrays(layout().trainable_len(), 1.0), 3);
        save(folder.path(), 2, &arrays(layout().trainable_len(), 2.0), 3);
        let newest = folder.path().join(name(2));
        let shard = |rank: usize| newest.join(format!("rank-{rank:05}-of-00003.safetensors"));
        let path = match file {
            3 => newest.join("manifest.json"),
            4 => newest.join("manifest.xxh3"),
            rank => shard(rank),
        };
        let mut bytes = std::fs::read(&path).expect("readable");
        let i = at.index(bytes.len());
        let damaged = match kind {
            0 => Some(bytes[..i].to_vec()),
            1 => { bytes[i] ^= 1 << bit; Some(bytes) }
            2 => Some(Vec::new()),
            3 => { bytes.insert(i, bit); Some(bytes) }
            // Another file of the same checkpoint in its place: the next rank's shard.
            4 if file < 3 => {
                let (own, other) = (bytes, std::fs::read(shard((file + 1) % 3)).expect("readable"));
                std::fs::write(shard((file + 1) % 3), own).expect("written");
                Some(other)
            }
            // The older checkpoint's file of the same name, which may be sound in itself.
            4 => Some(std::fs::read(folder.path().join(name(1)).join(path.file_name().expect("a name"))).expect("readable")),
            _ => None,
        };
        match damaged {
            Some(bytes) => std::fs::write(&path, &bytes).expect("written"),
            None => std::fs::remove_file(&path).expect("removed"),
        }
        let found = latest(folder.path());
        prop_assert_eq!(found.checkpoint.expect("one").progress().step, 1);
        prop_assert_eq!(found.passed_over.len(), 1);
        // What `checkpoint verify` does.
        let faults = Checkpoint::open(&newest).map_or_else(|e| vec![e], |checkpoint| checkpoint.faults(&|_| ()));
        prop_assert!(!faults.is_empty() && faults[0].to_string().contains("step-00000002"), "{:?}", faults);
    }
}

/// Every rank of a job reads its part and checks its share of the shards.
#[test]
fn one_pass_reads_what_is_wanted_and_checks_digests() {
    let folder = tempfile::tempdir().expect("a folder");
    let len = layout().trainable_len();
    let expected = arrays(len, 0.5);
    save(folder.path(), 1, &expected, 3);
    let checkpoint = latest(folder.path()).checkpoint.expect("one");
    let whole = 0..len;
    for readers in [1, 2, 3, 5] {
        for rank in 0..readers {
            let own = repa_comm::shard_range(len, rank, readers);
            let wanted =
                Array::ALL.map(|a| (a, std::slice::from_ref(if a == Array::Model { &whole } else { &own })));
            let mine: Vec<usize> = (rank..3).step_by(readers).collect();
            let read = checkpoint.read_checked(&layout(), wanted, &mine, None).expect("sound");
            assert_eq!(read[0][..], expected[0][..]);
            (1..4).for_each(|array| assert_eq!(read[array][..], expected[array][own.clone()]));
        }
    }
    // One byte of the last shard: told by who has to check it; others do not look.
    let shard = folder.path().join(name(1)).join("rank-00002-of-00003.safetensors");
    let mut bytes = std::fs::read(&shard).expect("there");
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(&shard, bytes).expect("written");
    let first = std::slice::from_ref(&(0..2));
    let wanted = [(Array::Model, first)];
    let error = checkpoint.read_checked(&layout(), wanted, &[0, 2], None).expect_err("damaged").to_string();
    assert!(error.contains("rank-00002-of-00003") && error.contains("digest"), "{error}");
    let read = checkpoint.read_checked(&layout(), wanted, &[0, 1], None).expect("not looked at");
    assert_eq!(read[0][..], expected[0][..2]);
}

/// Whatever is kept of the shards, each tensor is its own.
#[test]
fn tensors_are_read_in_any_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let expected = arrays(layout().trainable_len(), 0.5);
    save(folder.path(), 1, &expected, 3);
    let checkpoint = latest(folder.path()).checkpoint.expect("one");
    let layout = layout();
    let mut entries: Vec<_> = layout.entries().iter().filter(|entry| entry.trainable).collect();
    for _ in 0..2 {
        let mut tensors = Tensors::of(&checkpoint);
        for (array, values) in Array::ALL.into_iter().zip(&expected) {
            for entry in &entries {
                let read = tensors.tensor(array, &entry.name).expect("readable").expect("there");
                assert_eq!(read, values[entry.offset..entry.offset + entry.len()], "{}", entry.name);
            }
        }
        assert_eq!(tensors.tensor(Array::Ema, "none").expect("readable"), None);
        entries.reverse();
    }
}

#[test]
fn what_cannot_be_reached_is_not_damaged() {
    use std::io::{Error, ErrorKind};
    let read = |source: Error| CheckpointError::Read { path: "step-1".into(), source };
    for kind in
        [ErrorKind::NotFound, ErrorKind::UnexpectedEof, ErrorKind::InvalidData, ErrorKind::NotADirectory]
    {
        let error = read(kind.into());
        assert!(!error.may_be_good() && error.kind() == crate::exit::Kind::Data, "{error}");
    }
    // EIO and ESTALE, as a network's file system gives them.
    for code in [5, 116] {
        let error = read(Error::from_raw_os_error(code));
        assert!(error.may_be_good() && error.kind() == crate::exit::Kind::Runtime, "{error}");
        assert!(error.to_string().contains("--resume STEP"), "{error}");
    }
    let denied = read(ErrorKind::PermissionDenied.into());
    assert!(denied.may_be_good() && denied.kind() == crate::exit::Kind::Data);
}

#[test]
fn copies_beside_checkpoints_are_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = ["step-00000005-best", "step-00000005.bak", "step-best", "step-00000005.old2", "lock"];
    for name in names {
        std::fs::create_dir(folder.path().join(name)).expect("made");
    }
    std::fs::write(folder.path().join("step-00000007.safetensors"), "an export").expect("written");
    for name in ["step-00000006.partial", "step-00000005.old"] {
        std::fs::create_dir(folder.path().join(name)).expect("made");
    }
    let checkpoints = Checkpoints::at(folder.path());
    let cleared = checkpoints.discard_unfinished().expect("cleared");
    assert_eq!(cleared, ["step-00000005.old", "step-00000006.partial"]);
    assert!(names.iter().all(|name| folder.path().join(name).is_dir()));
    assert!(folder.path().join("step-00000007.safetensors").is_file());
}

#[test]
fn the_best_is_kept_where_other_hosts_have_its_shards() {
    let folder = tempfile::tempdir().expect("a folder");
    let checkpoints = Checkpoints::at(folder.path());
    let state = arrays(layout().trainable_len(), 1.0);
    let [model, ema, exp_avg, exp_avg_sq] = &state;
    let arrays = Arrays { model, ema, exp_avg, exp_avg_sq };
    for (step, loss) in [(1, 0.2), (2, 0.9), (3, 0.8)] {
        let write = |rank| {
            checkpoints.write_shard(step, &layout(), &arrays.parts(rank, 2), &[], (rank, 2)).expect("written")
        };
        let records = (0..2).map(write).collect();
        let about = About { node_local: true, metrics: [("loss".to_owned(), loss)].into(), ..about(step) };
        checkpoints.commit(&layout(), about, records).expect("committed");
        std::fs::remove_file(checkpoints.path(step).join("rank-00001-of-00002.safetensors"))
            .expect("another host's");
    }
    checkpoints.prune(&Retention { last: 1, every: 0, best: 1 }, "loss").expect("pruned");
    assert_eq!(checkpoints.list().expect("listed").steps, [1, 3]);
}
