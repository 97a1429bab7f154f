//! Large arrays of float32: a model's weights and the optimizer's state, each in one piece.
//!
//! They begin on a page. A copy between the page cache and memory whose addresses differ by anything but a multiple of
//! 32 bytes takes about twice as long on some processors (it is `rep movsb` there; seen on an AMD EPYC of Zen 4), and
//! malloc's large blocks begin 16 bytes behind such a multiple.
//!
//! And they ask for huge pages: their first use costs a fault for every 2 MiB then, and not for every 4 KiB.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use aligned_vec::{AVec, ConstAlign};

/// Bytes of a page, the smallest there are.
pub const PAGE: usize = 4096;

/// float32 from the beginning of a page.
pub type Flat = AVec<f32, ConstAlign<PAGE>>;

/// A copy of some values.
#[must_use]
pub fn copied(values: &[f32]) -> Flat {
    let mut room = Room::new(values.len());
    room.part().take(values.len()).copy_from_slice(values);
    room.finish()
}

/// So many zeros.
#[must_use]
pub fn zeros(len: usize) -> Flat {
    let mut room = Room::new(len);
    room.part().take(len);
    room.finish()
}

/// Memory for an array whose elements come in any order and from several threads. Its pages are touched when their
/// elements come, by the thread that brings them, and not before.
#[derive(Debug)]
pub struct Room {
    values: Flat,
    len: usize,
    taken: AtomicUsize,
}

/// A part of a [`Room`]. Its elements are taken in order.
#[derive(Debug)]
pub struct Part<'a> {
    values: &'a mut [MaybeUninit<f32>],
    taken: &'a AtomicUsize,
}

impl Room {
    /// For so many elements.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let mut memory: Flat = AVec::with_capacity(PAGE, len);
        ask_for_huge_pages(&mut memory);
        Self { values: memory, len, taken: AtomicUsize::new(0) }
    }

    /// For so many elements, in the memory of another array where it is large enough.
    #[must_use]
    pub fn reusing(mut memory: Flat, len: usize) -> Self {
        if memory.capacity() < len {
            return Self::new(len);
        }
        memory.clear();
        Self { values: memory, len, taken: AtomicUsize::new(0) }
    }

    /// All of it.
    pub fn part(&mut self) -> Part<'_> {
        // What was taken of an earlier part has to be taken again.
        *self.taken.get_mut() = 0;
        let start = self.values.as_mut_ptr().cast::<MaybeUninit<f32>>();
        // SAFETY: the vector has room for `len` elements, which need no values to be `MaybeUninit`; nobody else has
        // them while `self` is borrowed.
        let values = unsafe { std::slice::from_raw_parts_mut(start, self.len) };
        Part { values, taken: &self.taken }
    }

    /// The array.
    ///
    /// # Panics
    /// Some of its elements were not taken out of the last [`Room::part`].
    #[must_use]
    pub fn finish(mut self) -> Flat {
        assert_eq!(*self.taken.get_mut(), self.len, "an array has elements that nobody has given a value");
        // SAFETY: elements are counted once each, when they get their first value, and all are counted.
        unsafe { self.values.set_len(self.len) };
        self.values
    }
}

impl<'a> Part<'a> {
    /// Elements that are left to take.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Gives the next `len` elements away, for another to take.
    ///
    /// # Panics
    /// There are fewer.
    #[must_use]
    pub fn split_off(&mut self, len: usize) -> Self {
        Self { values: self.next(len), taken: self.taken }
    }

    /// Takes the next `len` elements, which are zero.
    ///
    /// # Panics
    /// There are fewer.
    pub fn take(&mut self, len: usize) -> &'a mut [f32] {
        let first = self.next(len);
        first.fill(MaybeUninit::new(0.0));
        self.taken.fetch_add(len, Ordering::Relaxed);
        // SAFETY: they have just been given values.
        unsafe { first.assume_init_mut() }
    }

    /// Takes the next `len` elements, with the bytes that `fill` gives them. It returns what it was given.
    ///
    /// # Errors
    /// Those of `fill`; the elements have no values then, and the array cannot be finished.
    ///
    /// # Panics
    /// There are fewer, or `fill` returns something else.
    pub fn take_filled<E>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&'a mut [MaybeUninit<u8>]) -> Result<&'a mut [u8], E>,
    ) -> Result<&'a mut [u8], E> {
        let first = self.next(len);
        let bytes = size_of_val(first);
        let start = first.as_mut_ptr().cast::<MaybeUninit<u8>>();
        // SAFETY: the same memory, as bytes, which may be without values as well.
        let filled = fill(unsafe { std::slice::from_raw_parts_mut(start, bytes) })?;
        // Only what has values can be a slice of bytes, and of float32 any bytes are values.
        assert_eq!((filled.as_ptr().addr(), filled.len()), (start.addr(), bytes), "another slice came back");
        self.taken.fetch_add(len, Ordering::Relaxed);
        Ok(filled)
    }

    fn next(&mut self, len: usize) -> &'a mut [MaybeUninit<f32>] {
        let (first, rest) = std::mem::take(&mut self.values).split_at_mut(len);
        self.values = rest;
        first
    }
}

/// Tells the kernel that an array's memory is worth huge pages. Where it has none, nothing changes.
fn ask_for_huge_pages(memory: &mut Flat) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let bytes = memory.capacity() * size_of::<f32>() / PAGE * PAGE;
        if bytes >= 2 * HUGE {
            // SAFETY: whole pages of the vector's own memory, whose contents the advice leaves as they are.
            let _ = unsafe { libc::madvise(memory.as_mut_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn copied_into<'a>(bytes: &'a mut [MaybeUninit<u8>], values: &[f32]) -> Result<&'a mut [u8], ()> {
        Ok(bytes.write_copy_of_slice(bytemuck::cast_slice(values)))
    }

    proptest! {
        #[test]
        fn every_element_has_the_value_it_was_given(lengths in prop::collection::vec(0usize..3000, 0..8)) {
            let mut room = Room::new(lengths.iter().sum());
            let mut rest = room.part();
            std::thread::scope(|scope| {
                for (number, &len) in lengths.iter().enumerate() {
                    let mut part = rest.split_off(len);
                    scope.spawn(move || {
                        let first = part.take(len / 2);
                        assert!(first.iter().all(|&x| x == 0.0));
                        first.fill(number as f32);
                        let values = vec![number as f32; part.len()];
                        part.take_filled(part.len(), |bytes| copied_into(bytes, &values)).unwrap();
                    });
                }
            });
            let values = room.finish();
            prop_assert_eq!(values.as_ptr().addr() % PAGE, 0);
            let expected: Vec<f32> =
                lengths.iter().enumerate().flat_map(|(n, &len)| vec![n as f32; len]).collect();
            prop_assert_eq!(&values[..], &expected[..]);
        }
    }

    #[test]
    #[should_panic(expected = "nobody has given a value")]
    fn an_array_with_a_hole_is_none() {
        let mut room = Room::new(10);
        let mut rest = room.part();
        rest.split_off(4).take(3);
        rest.take(6);
        let _ = room.finish();
    }

    #[test]
    fn elements_that_could_not_be_filled_stay_without_values() {
        let mut room = Room::new(8);
        let failed = room.part().take_filled(8, |_| Err("the file has ended"));
        assert_eq!(failed, Err("the file has ended"));
        assert!(std::panic::catch_unwind(|| room.finish()).is_err());
    }

    #[test]
    fn memory_is_used_again() {
        let (large, small) = (zeros(5000), zeros(3));
        let (before, other) = (large.as_ptr(), small.as_ptr());
        let mut room = Room::reusing(large, 4000);
        room.part().take(4000).fill(2.0);
        let again = room.finish();
        assert_eq!((again.as_ptr(), again.len(), again[3999]), (before, 4000, 2.0));
        let mut room = Room::reusing(small, 4000);
        room.part().take(4000);
        assert_ne!(room.finish().as_ptr(), other);
    }

    #[test]
    fn copies_and_zeros() {
        assert_eq!(&copied(&[1.0, 2.0])[..], [1.0, 2.0]);
        assert_eq!(&zeros(3)[..], [0.0; 3]);
        assert!(zeros(0).is_empty());
    }
}
