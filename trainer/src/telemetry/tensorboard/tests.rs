use std::collections::BTreeMap;

use super::*;

/// CRC-32C bit by bit, as RFC 3720 defines it.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn checked(data: &[u8], stored: &[u8]) {
    let crc = crc32c(data);
    let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
    assert_eq!(masked.to_le_bytes(), stored);
}

/// The records of a file; what a kill has cut short is left out.
fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    while let Some((head, rest)) = file.split_at_checked(12) {
        let length = u64::from_le_bytes(head[..8].try_into().expect("8 bytes")) as usize;
        checked(&head[..8], &head[8..]);
        let Some((body, rest)) = rest.split_at_checked(length + 4) else { break };
        checked(&body[..length], &body[length..]);
        records.push(body[..length].to_vec());
        file = rest;
    }
    records
}

/// A field's value: a number (floats as their bits) or bytes.
#[derive(Debug, Clone, PartialEq)]
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

/// The fields of a message, by number, in their order.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let (&first, rest) = bytes.split_first().expect("a whole number");
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            shift += 7;
            if first < 0x80 {
                return value;
            }
        }
    }
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let width = match key & 7 {
            0 => {
                all.push((key >> 3, Field::Number(varint(&mut bytes))));
                continue;
            }
            1 => 8,
            5 => 4,
            2 => varint(&mut bytes) as usize,
            other => panic!("wire type {other}"),
        };
        let (value, rest) = bytes.split_at(width);
        bytes = rest;
        let mut padded = [0; 8];
        all.push((
            key >> 3,
            match key & 7 {
                2 => Field::Bytes(value.to_vec()),
                _ => {
                    padded[..width].copy_from_slice(value);
                    Field::Number(u64::from_le_bytes(padded))
                }
            },
        ));
    }
    all
}

fn number(fields: &[(u64, Field)], wanted: u64) -> u64 {
    let found = fields.iter().find(|(field, _)| *field == wanted);
    match found {
        Some((_, Field::Number(value))) => *value,
        other => panic!("field {wanted} is {other:?}"),
    }
}

fn bytes(fields: &[(u64, Field)], wanted: u64) -> Vec<u8> {
    let found = fields.iter().find(|(field, _)| *field == wanted);
    match found {
        Some((_, Field::Bytes(value))) => value.clone(),
        other => panic!("field {wanted} is {other:?}"),
    }
}

fn record(step: u64) -> StepRecord {
    let line = format!(
        r#"{{"step":{step},"loss":1.5,"denoising_loss":1.75,"alignment_loss":-0.5,"grad_norm":0.25,"skipped":false,
        "learning_rate":0.0001,"images_per_second":300.0,"step_seconds":0.125,"data_wait_seconds":0.0,
        "compute_seconds":0.1,"communication_seconds":0.02,"optimizer_seconds":0.005}}"#
    );
    serde_json::from_str(&line).expect("a record")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

#[test]
fn a_file_holds_version_start_curves_and_images() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut file = EventFile::create(folder.path(), "h1", 300).expect("new");
    file.step(&record(301)).expect("written");
    file.image(301, "samples", (640, 480), b"a PNG").expect("written");
    let path = &files(folder.path())[0];
    let mut content = std::fs::read(path).expect("bytes");
    let events: Vec<_> = records(&content).iter().map(|event| fields(event)).collect();
    assert_eq!(events.len(), 4);
    for event in &events {
        let time = f64::from_bits(number(event, 1));
        assert!(time > 1.6e9 && time < 1e10, "{time}");
    }
    assert_eq!(bytes(&events[0], 3), b"brain.Event:2");
    assert_eq!(number(&events[1], 2), 301, "the first step that this file holds");
    assert_eq!(fields(&bytes(&events[1], 7)), [(1, Field::Number(1))], "START");

    assert_eq!(number(&events[2], 2), 301);
    let values: BTreeMap<String, f32> = fields(&bytes(&events[2], 5))
        .into_iter()
        .map(|(field, value)| {
            let Field::Bytes(value) = value else { panic!("a value is a message") };
            assert_eq!(field, 1);
            let value = fields(&value);
            let name = String::from_utf8(bytes(&value, 1)).expect("a name");
            (name, f32::from_bits(number(&value, 2) as u32))
        })
        .collect();
    assert_eq!(values.len(), SCALARS.len());
    assert_eq!((values["loss/total"], values["loss/alignment"]), (1.5, -0.5));
    assert_eq!((values["optimizer/learning_rate"], values["seconds/step"]), (1e-4, 0.125));

    let value = fields(&bytes(&fields(&bytes(&events[3], 5)), 1));
    assert_eq!(bytes(&value, 1), b"samples");
    let image = fields(&bytes(&value, 4));
    assert_eq!((number(&image, 1), number(&image, 2), number(&image, 3)), (480, 640, 3));
    assert_eq!(bytes(&image, 4), b"a PNG");

    // A kill in the middle of a record leaves the ones before it.
    content.truncate(content.len() - 3);
    assert_eq!(records(&content).len(), 3);
}

#[test]
fn each_start_has_a_file_and_the_last_one_sorts_last() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("events.out.tfevents.4000000000.ahead"), b"").expect("written");
    std::fs::write(folder.path().join("notes.txt"), b"").expect("written");
    EventFile::create(folder.path(), "b", 0).expect("new");
    EventFile::create(folder.path(), "a", 0).expect("new");
    let names = files(folder.path());
    let names: Vec<_> = names.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    let expected = ["4000000000.ahead", "4000000001.b", "4000000002.a"].map(|end| format!("{PREFIX}{end}"));
    assert_eq!(names[..3], expected);
}
