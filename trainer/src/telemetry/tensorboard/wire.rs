//! TensorBoard's file format: TFRecord frames (tensorflow/core/lib/io/record_writer.h) around messages of which a few
//! fields are used (tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto).

use crc_fast::{CrcAlgorithm, checksum};

/// What an event tells.
#[derive(Debug)]
pub(super) enum What<'a> {
    /// The version of the format: a file's first record.
    Version,
    /// A program has started, and this step is its first: what is known of it and later ones is out of date.
    Start,
    /// A point of each of these curves.
    Scalars(&'a [(&'a str, f64)]),
    /// A PNG.
    Image { name: &'a str, width: usize, height: usize, png: &'a [u8] },
}

/// An event at `time`, in seconds since 1970.
pub(super) fn event(time: f64, step: u64, what: &What) -> Vec<u8> {
    // Event: wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7.
    let event = Message::default().double(1, time).varint(2, step);
    let event = match what {
        What::Version => event.bytes(3, b"brain.Event:2"),
        // SessionLog: status = 1, of which START is 1.
        What::Start => event.message(7, &Message::default().varint(1, 1)),
        // Summary: value = 1, each with tag = 1 and simple_value = 2.
        What::Scalars(scalars) => {
            let value = |(name, value): &(&str, f64)| {
                Message::default().bytes(1, name.as_bytes()).float(2, *value as f32)
            };
            event.message(5, &scalars.iter().fold(Message::default(), |all, one| all.message(1, &value(one))))
        }
        // image = 4: height = 1, width = 2, colorspace = 3 (RGB is 3), encoded_image_string = 4.
        What::Image { name, width, height, png } => {
            let image = Message::default().varint(1, *height as u64).varint(2, *width as u64);
            let image = image.varint(3, 3).bytes(4, png);
            let value = Message::default().bytes(1, name.as_bytes()).message(4, &image);
            event.message(5, &Message::default().message(1, &value))
        }
    };
    event.0
}

/// A message of protocol buffers that grows field by field.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(mut self, field: u64, value: u64) -> Self {
        self.raw(field << 3);
        self.raw(value);
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.raw(field << 3 | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.raw(field << 3 | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.raw(field << 3 | 2);
        self.raw(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn message(self, field: u64, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }
}

/// A frame: the length and its checksum, the data and theirs.
pub(super) fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked(data).to_le_bytes());
    record
}

/// CRC-32C, turned and shifted so that the checksum of data that hold their own checksum is no constant.
fn masked(data: &[u8]) -> u32 {
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, data) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}
