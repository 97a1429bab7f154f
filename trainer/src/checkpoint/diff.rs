//! What differs between two checkpoints.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Array, Checkpoint, CheckpointError, Tensors};

/// One tensor that differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDifference {
    /// Array and parameter, such as `ema.blocks.0.attn.qkv.weight`.
    pub name: String,
    /// How many elements differ in a bit.
    pub elements: usize,
    /// The largest absolute difference; NaN where one side alone is not a number.
    pub largest: f64,
    /// Norm of the difference over the norm of the first.
    pub relative: f64,
}

/// What differs between two checkpoints.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Difference {
    /// Tensors with the same bits.
    pub same: usize,
    /// Tensors with other bits, those with the largest relative difference first.
    pub differing: Vec<TensorDifference>,
    /// Tensors of other shapes: name, the first's shape, the second's.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Tensors that the second lacks.
    pub only_first: Vec<String>,
    /// Tensors that the first lacks.
    pub only_second: Vec<String>,
}

/// Compares two checkpoints tensor by tensor. `progress` is called with tensors done and to do.
///
/// # Errors
/// One cannot be read.
pub fn diff(
    first: &Checkpoint,
    second: &Checkpoint,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Difference, CheckpointError> {
    let shapes = |checkpoint: &Checkpoint| -> BTreeMap<(Array, String), Vec<usize>> {
        let tensors = checkpoint.manifest().tensors.iter();
        tensors
            .flat_map(|(array, tensors)| {
                tensors.iter().map(|(name, tensor)| ((*array, name.clone()), tensor.shape.clone()))
            })
            .collect()
    };
    let (a, b) = (shapes(first), shapes(second));
    let title = |(array, name): &(Array, String)| format!("{}.{name}", array.prefix());
    let mut found = Difference {
        only_first: a.keys().filter(|key| !b.contains_key(*key)).map(title).collect(),
        only_second: b.keys().filter(|key| !a.contains_key(*key)).map(title).collect(),
        ..Difference::default()
    };
    // As they lie in the files.
    let place = |(array, name): &(Array, String)| {
        let piece = first.manifest().tensors[array][name].pieces.first();
        (*array, piece.map(|piece| (piece.shard, piece.offset)))
    };
    let mut order: Vec<_> = a.iter().collect();
    order.sort_by_key(|(key, _)| place(key));
    let (mut first, mut second) = (Tensors::of(first), Tensors::of(second));
    for (done, (key, shape)) in order.into_iter().enumerate() {
        progress(done + 1, a.len());
        let Some(other) = b.get(key) else { continue };
        if shape != other {
            found.misshapen.push((title(key), shape.clone(), other.clone()));
            continue;
        }
        let (array, name) = key;
        let (Some(x), Some(y)) = (first.tensor(*array, name)?, second.tensor(*array, name)?) else {
            continue;
        };
        match compare(&x, &y) {
            None => found.same += 1,
            Some((elements, largest, relative)) => {
                found.differing.push(TensorDifference { name: title(key), elements, largest, relative });
            }
        }
    }
    found.differing.sort_by(|a, b| b.relative.total_cmp(&a.relative));
    Ok(found)
}

/// Elements that differ, the largest difference, and the relative norm; None where all bits are the same.
fn compare(x: &[f32], y: &[f32]) -> Option<(usize, f64, f64)> {
    let (mut elements, mut largest, mut squares, mut norm) = (0, 0.0f64, 0.0f64, 0.0f64);
    for (a, b) in x.iter().zip(y) {
        norm += f64::from(*a) * f64::from(*a);
        if a.to_bits() == b.to_bits() {
            continue;
        }
        elements += 1;
        let difference = (f64::from(*a) - f64::from(*b)).abs();
        squares += difference * difference;
        // `max` would drop a NaN.
        largest = if difference > largest || difference.is_nan() { difference } else { largest };
    }
    let relative = if squares == 0.0 { 0.0 } else { (squares / norm).sqrt() };
    (elements > 0).then_some((elements, largest, relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_counted_and_measured() {
        assert_eq!(compare(&[1.0, 2.0], &[1.0, 2.0]), None);
        let (elements, largest, relative) = compare(&[3.0, 4.0, 0.0], &[3.0, 4.5, 0.0]).unwrap();
        assert_eq!((elements, largest, relative), (1, 0.5, 0.1));
        // A sign of zero is a bit, and no difference.
        assert_eq!(compare(&[0.0, 1.0], &[-0.0, 1.0]), Some((1, 0.0, 0.0)));
        assert!(compare(&[1.0, 2.0], &[f32::NAN, 2.0]).is_some_and(|(_, largest, _)| largest.is_nan()));
    }
}
