//! Shards that are long enough to be read straight to where they are wanted.

use std::ops::Range;

use proptest::prelude::*;

use super::load::{Turn, take_turns};
use super::stream::Stream;
use super::tests::about;
use super::*;
use crate::flat::{self, PAGE};
use crate::params::{Init, Layout};

/// Tensors of lengths that fill neither lines nor pages.
fn layout() -> Layout {
    let mut layout = Layout::default();
    for (name, len) in [("a", 200_003), ("b", 7), ("c", 333_333), ("d", 1), ("e", 150_016)] {
        layout.add(name, &[len], Init::Zeros);
    }
    layout
}

fn arrays() -> [Vec<f32>; 4] {
    let len = layout().trainable_len();
    std::array::from_fn(|a| (0..len).map(|i| (a * len + i) as f32).collect())
}

fn save(folder: &Path, world: usize) -> Checkpoint {
    let (layout, checkpoints, arrays) = (layout(), Checkpoints::at(folder), arrays());
    let [model, ema, exp_avg, exp_avg_sq] = &arrays;
    let arrays = Arrays { model, ema, exp_avg, exp_avg_sq };
    let write =
        |rank| checkpoints.write_shard(1, &layout, &arrays.parts(rank, world), &[], (rank, world)).unwrap();
    let records = (0..world).map(write).collect();
    checkpoints.commit(&layout, about(1), records).unwrap();
    checkpoints.open(1).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever is wanted, whoever wrote it, and whichever shards are read whole.
    #[test]
    fn what_is_wanted_arrives_bit_by_bit(
        world in 1usize..5,
        checked in prop::collection::vec(any::<bool>(), 4),
        cuts in prop::collection::btree_set(0usize..683_360, 2..7),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = save(folder.path(), world);
        let expected = arrays();
        let cuts: Vec<usize> = cuts.into_iter().collect();
        let some: Vec<Range<usize>> = cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect();
        let whole = 0..layout().trainable_len();
        let ranges = |array| if array == Array::Ema { std::slice::from_ref(&whole) } else { &some };
        let wanted = Array::ALL.map(|array| (array, ranges(array)));
        let check: Vec<usize> = (0..world).filter(|&shard| checked[shard]).collect();
        // The second time into memory that has other values.
        let used = [0, 1, 2, 3].map(|_| flat::copied(&vec![-1.0; whole.len()]));
        for memory in [None, Some(used)] {
            let read = checkpoint.read_checked(&layout(), wanted, &check, memory).unwrap();
            for ((read, array), (_, ranges)) in read.iter().zip(&expected).zip(wanted) {
                let values: Vec<f32> = ranges.iter().flat_map(|r| array[r.clone()].iter().copied()).collect();
                prop_assert!(read[..] == values[..]);
            }
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_a_short_shard_too() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = save(folder.path(), 2);
    let whole = 0..layout().trainable_len();
    let wanted = Array::ALL.map(|array| (array, std::slice::from_ref(&whole)));
    let shard = checkpoint.dir().join("rank-00001-of-00002.safetensors");
    let good = std::fs::read(&shard).unwrap();
    let read = || checkpoint.read_checked(&layout(), wanted, &[0], None).map(drop);
    for at in [0, 5000, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 16;
        std::fs::write(&shard, bytes).unwrap();
        let error = read().unwrap_err().to_string();
        assert!(error.contains("rank-00001-of-00002") && error.contains("digest"), "byte {at}: {error}");
    }
    std::fs::write(&shard, &good[..good.len() - 5000]).unwrap();
    let error = read().unwrap_err().to_string();
    assert!(error.contains("cannot read") && error.contains("rank-00001-of-00002"), "{error}");
    std::fs::write(&shard, good).unwrap();
    read().unwrap();
}

/// Whatever the distance, each shard is read to its end, and an error in any of them is told.
#[test]
fn shards_are_read_side_by_side_to_their_ends() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = save(folder.path(), 5);
    let turns = [Turn::First, Turn::First, Turn::Later, Turn::Later, Turn::Later];
    let read = |distance| {
        let stream = |(shard, turn)| (turn, Stream::new(&checkpoint, shard, Vec::new()));
        take_turns(turns.into_iter().enumerate().map(stream).collect(), distance)
    };
    for distance in [0, 300 << 10, 1 << 20, u64::MAX] {
        read(distance).unwrap();
    }
    for shard in 0..turns.len() {
        let path = checkpoint.dir().join(&checkpoint.manifest().shards[shard].file);
        let good = std::fs::read(&path).unwrap();
        let mut bytes = good.clone();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        for distance in [0, 1 << 20, u64::MAX] {
            assert!(read(distance).is_err(), "shard {shard} at a distance of {distance}");
        }
        std::fs::write(&path, good).unwrap();
    }
}

#[test]
fn the_data_of_a_shard_begins_on_a_page() {
    let folder = tempfile::tempdir().unwrap();
    for world in [1, 3] {
        let checkpoint = save(folder.path(), world);
        let tensors = checkpoint.manifest().tensors.values().flat_map(|tensors| tensors.values());
        let pieces: Vec<&Piece> = tensors.flat_map(|tensor| &tensor.pieces).collect();
        for shard in 0..world {
            let offsets = pieces.iter().filter(|piece| piece.shard == shard).map(|piece| piece.offset);
            assert_eq!(offsets.min().unwrap() % PAGE as u64, 0, "shard {shard} of {world}");
        }
    }
}

/// Manifests carry a digest, so only a program that writes them otherwise can say such things.
#[test]
fn tensors_that_share_bytes_or_begin_within_a_value_are_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let good = save(folder.path(), 1).manifest().clone();
    let whole = 0..layout().trainable_len();
    let wanted = [(Array::Model, std::slice::from_ref(&whole))];
    let place = Checkpoints::at(folder.path());

    let mut shared = good.clone();
    let tensors = shared.tensors.get_mut(&Array::Model).unwrap();
    let first = tensors["a"].pieces[0].offset;
    tensors.get_mut("c").unwrap().pieces[0].offset = first;
    let error = place.with_manifest(1, shared).read_checked(&layout(), wanted, &[], None).unwrap_err();
    assert!(error.to_string().contains("share bytes"), "{error}");

    let mut within = good;
    within.tensors.get_mut(&Array::Model).unwrap().get_mut("a").unwrap().pieces[0].offset += 2;
    let text = serde_json::to_vec(&within).unwrap();
    let path = place.path(1);
    std::fs::write(path.join(manifest::MANIFEST), &text).unwrap();
    let digest = format!("{:016x}\n", xxhash_rust::xxh3::xxh3_64(&text));
    std::fs::write(path.join(manifest::MANIFEST_DIGEST), digest).unwrap();
    let error = place.open(1).unwrap_err().to_string();
    assert!(error.contains("begins within a value"), "{error}");
}
