//! What readers ask other nodes, and how those answer. Little-endian, of lengths that both sides know.

use super::record::Reading;

/// Changes with the layout.
pub(super) const MAGIC: [u8; 8] = *b"repaBRD1";

/// Proves that a reader is of this job.
pub(super) type Token = [u8; 16];

/// A question: the magic, the token, the number of the node that is meant.
pub(super) const QUESTION: usize = 32;

pub(super) fn question(token: &Token, node: usize) -> [u8; QUESTION] {
    let mut bytes = [0; QUESTION];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..24].copy_from_slice(token);
    bytes[24..].copy_from_slice(&(node as u64).to_le_bytes());
    bytes
}

const HEADER: usize = 32;

/// Length of the answer of a node of so many ranks.
pub(super) fn answer_length(ranks: usize) -> usize {
    HEADER + ranks * Reading::BYTES
}

/// The node's readings by local rank, at `now` of its clock.
pub(super) fn answer(node: usize, now: u64, readings: &[Reading]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(answer_length(readings.len()));
    bytes.extend(MAGIC);
    for number in [node as u64, readings.len() as u64, now] {
        bytes.extend(number.to_le_bytes());
    }
    readings.iter().for_each(|reading| reading.encode(&mut bytes));
    bytes
}

/// The inverse of `answer`; None unless it is that of this node with so many ranks.
pub(super) fn read_answer(bytes: &[u8], node: usize, ranks: usize) -> Option<(u64, Vec<Reading>)> {
    let (header, readings) = bytes.split_at_checked(HEADER)?;
    let (words, _) = header.as_chunks::<8>();
    let [magic, of, count, now] = words else { return None };
    let right = *magic == MAGIC && u64::from_le_bytes(*of) == node as u64;
    if !right || u64::from_le_bytes(*count) != ranks as u64 || bytes.len() != answer_length(ranks) {
        return None;
    }
    let readings: Option<Vec<Reading>> = readings.chunks_exact(Reading::BYTES).map(Reading::decode).collect();
    Some((u64::from_le_bytes(*now), readings?))
}

#[cfg(test)]
mod tests {
    use super::super::process::Identity;
    use super::super::record::Record;
    use super::*;

    #[test]
    fn an_answer_is_taken_from_the_node_that_was_asked() {
        let record = Record::default();
        record.claim(Identity::here());
        let readings = [record.read(Identity::here()); 3];
        let bytes = answer(5, 77, &readings);
        assert_eq!(bytes.len(), answer_length(3));
        assert_eq!(read_answer(&bytes, 5, 3), Some((77, readings.to_vec())));
        assert_eq!(read_answer(&bytes, 4, 3), None);
        assert_eq!(read_answer(&bytes, 5, 2), None);
        assert_eq!(read_answer(&bytes[..bytes.len() - 1], 5, 3), None);
        assert_eq!(read_answer(&[], 5, 3), None);
        let mut other = bytes;
        other[0] ^= 1;
        assert_eq!(read_answer(&other, 5, 3), None);
    }
}
