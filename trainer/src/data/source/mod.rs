//! Where samples come from: trees of files, their labels, and NumPy's arrays.

pub mod images;
pub mod labels;
pub mod npy;
pub mod tree;

use xxhash_rust::xxh3::Xxh3;

/// A few digits that tell lists of members apart, for the description of a source.
pub(super) fn list_digest<'a>(members: impl Iterator<Item = (&'a str, u32)>) -> String {
    let mut hasher = Xxh3::new();
    for (name, label) in members {
        hasher.update(name.as_bytes());
        hasher.update(&[0]);
        hasher.update(&label.to_le_bytes());
    }
    format!("{:016x}", hasher.digest())
}
