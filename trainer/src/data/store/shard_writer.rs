//! One shard in the making: samples are written where they will lie, the header last.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::check::{Array, Checked, Sample};
use super::shard::{self, DIGESTS, Field, IMAGE_ENDS, LABELS};
use super::writer::{LeftOut, StoreWriter, shard_file};
use super::{ShardEntry, StoreError};

/// A shard in the making. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct ShardWriter<'a> {
    writer: &'a StoreWriter,
    number: usize,
    path: PathBuf,
    temporary: Temporary,
    file: File,
    fields: Vec<Field>,
    offsets: Vec<u64>,
    capacity: usize,
    labels: Vec<i64>,
    digests: Vec<u64>,
    image_ends: Vec<u64>,
    sums: Vec<f64>,
    squares: Vec<f64>,
    left_out: Vec<LeftOut>,
}

impl<'a> ShardWriter<'a> {
    pub(super) fn new(writer: &'a StoreWriter, number: usize, capacity: usize) -> Result<Self, StoreError> {
        assert!(capacity > 0 && capacity < u32::MAX as usize, "a shard of {capacity} samples");
        let path = writer.partial().join(shard_file(number));
        let temporary = writer.partial().join(format!("{}.tmp", shard_file(number)));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(StoreError::write(&temporary))?;
        let spec = writer.spec();
        let fields = shard::fields(spec);
        Ok(Self {
            writer,
            number,
            path,
            temporary: Temporary(temporary),
            file,
            offsets: offsets(&fields, shard::header_len(spec), capacity as u64),
            fields,
            capacity,
            labels: Vec::new(),
            digests: Vec::new(),
            image_ends: Vec::new(),
            sums: vec![0.0; spec.channels],
            squares: vec![0.0; spec.channels],
            left_out: Vec::new(),
        })
    }

    /// Samples so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Checks a sample and adds it.
    ///
    /// # Errors
    /// [`StoreError::Sample`] where the sample is not fit to be stored (nothing is added then), see
    /// [`Checked::new`]; [`StoreError::Full`] or [`StoreError::Io`] where it cannot be written.
    ///
    /// # Panics
    /// If the shard has its capacity already.
    pub fn push(&mut self, sample: &Sample) -> Result<(), StoreError> {
        let checked = Checked::new(self.writer.spec(), sample).map_err(|problem| StoreError::Sample {
            path: self.path.clone(),
            sample: self.len() as u64,
            problem,
        })?;
        self.push_checked(sample, &checked)
    }

    /// Adds a sample; `checked` is what checking it gave.
    ///
    /// # Errors
    /// [`StoreError::Full`] or [`StoreError::Io`].
    ///
    /// # Panics
    /// If the shard has its capacity already.
    pub fn push_checked(&mut self, sample: &Sample, checked: &Checked) -> Result<(), StoreError> {
        assert!(self.len() < self.capacity, "a shard of {} samples gets one more", self.capacity);
        let spec = self.writer.spec();
        let row = self.labels.len() as u64;
        let mut halves = checked.halves.iter();
        for (field, array) in (shard::latent_field(spec)..).zip(sample.arrays()) {
            let bytes: &[u8] = match array {
                Array::Latent(values) => match halves.next() {
                    Some(half) => shard::f16_bytes(half),
                    None => bytemuck::cast_slice(values),
                },
                Array::Features(values) => shard::f16_bytes(values),
            };
            let offset = self.offsets[field] + row * self.fields[field].item;
            self.file.write_all_at(bytes, offset).map_err(StoreError::write(&self.temporary.0))?;
        }
        if spec.images {
            let begin = self.image_ends.last().copied().unwrap_or(0);
            let images = *self.offsets.last().expect("an offset after the last field");
            self.file
                .write_all_at(sample.image, images + begin)
                .map_err(StoreError::write(&self.temporary.0))?;
            self.image_ends.push(begin + sample.image.len() as u64);
        }
        self.labels.push(i64::from(sample.label));
        self.digests.push(checked.digest);
        for (total, x) in self.sums.iter_mut().zip(&checked.sums) {
            *total += x;
        }
        for (total, x) in self.squares.iter_mut().zip(&checked.squares) {
            *total += x;
        }
        Ok(())
    }

    /// Notes a member of the source that does not become a sample.
    pub fn leave_out(&mut self, member: LeftOut) {
        self.left_out.push(member);
    }

    /// Puts the shard on disk for good. One that got no sample leaves only its entry.
    ///
    /// # Errors
    /// [`StoreError::Full`] or [`StoreError::Io`].
    pub fn finish(mut self) -> Result<ShardEntry, StoreError> {
        let spec = self.writer.spec();
        let samples = self.len() as u64;
        let mut entry = ShardEntry {
            file: shard_file(self.number),
            samples,
            bytes: 0,
            xxh3: String::new(),
            sums: std::mem::take(&mut self.sums),
            squares: std::mem::take(&mut self.squares),
        };
        if samples > 0 {
            let image_bytes = self.image_ends.last().copied().unwrap_or(0);
            self.close_gaps(image_bytes)?;
            let write = |bytes: &[u8], offset: u64| {
                self.file.write_all_at(bytes, offset).map_err(StoreError::write(&self.temporary.0))
            };
            write(&shard::header(spec, samples, image_bytes), 0)?;
            write(bytemuck::cast_slice(&self.digests), self.offsets[DIGESTS])?;
            write(bytemuck::cast_slice(&self.labels), self.offsets[LABELS])?;
            if spec.images {
                write(bytemuck::cast_slice(&self.image_ends), self.offsets[IMAGE_ENDS])?;
            }
            entry.bytes = self.offsets.last().expect("an offset after the last field") + image_bytes;
            self.file.set_len(entry.bytes).map_err(StoreError::write(&self.temporary.0))?;
            entry.xxh3 = shard::hex(shard::file_digest(&self.file, &self.temporary.0)?);
            self.file.sync_all().map_err(StoreError::write(&self.temporary.0))?;
            fs::rename(&self.temporary.0, &self.path).map_err(StoreError::write(&self.path))?;
        }
        let left_out = std::mem::take(&mut self.left_out);
        self.writer.record(self.number, entry.clone(), left_out)?;
        Ok(entry)
    }

    /// Moves the tensors together where the shard got fewer samples than it had room for.
    fn close_gaps(&mut self, image_bytes: u64) -> Result<(), StoreError> {
        let base = shard::header_len(self.writer.spec());
        let to = offsets(&self.fields, base, self.len() as u64);
        if to != self.offsets {
            let samples = self.len() as u64;
            let sizes = self.fields.iter().map(|f| f.item * samples).chain([image_bytes]);
            let mut buffer = vec![0; 1 << 20];
            for ((from, to), size) in self.offsets.iter().zip(&to).zip(sizes) {
                let mut done = 0;
                // Every target lies before its source, so copying forwards never reads what was written.
                while done < size {
                    let n = (size - done).min(buffer.len() as u64);
                    let piece = &mut buffer[..n as usize];
                    // Labels, digests and the like are not in the file yet: what is not there is zeros.
                    read_or_zeros(&self.file, piece, from + done)
                        .map_err(StoreError::io("read", &self.temporary.0))?;
                    self.file.write_all_at(piece, to + done).map_err(StoreError::write(&self.temporary.0))?;
                    done += n;
                }
            }
            self.offsets = to;
        }
        Ok(())
    }
}

/// Removes its file when dropped, if that is still there.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing to be done about a failure here: the next attempt truncates the file.
        let _ = fs::remove_file(&self.0);
    }
}

/// First byte of each field of a shard with room for `samples`, and of the images.
fn offsets(fields: &[Field], base: u64, samples: u64) -> Vec<u64> {
    let mut next = base;
    let mut offsets = vec![base];
    for field in fields {
        next += field.item * samples;
        offsets.push(next);
    }
    offsets
}

fn read_or_zeros(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < out.len() {
        match file.read_at(&mut out[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    out[done..].fill(0);
    Ok(())
}
