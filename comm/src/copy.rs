//! Copies past the caches: into memory that another processor reads next, or nobody soon.

/// Copies values into as many, past the caches where that pays. What is copied is better not read soon; a plain copy
/// reads all that it overwrites first, and leaves it in the caches in the place of what was there.
///
/// # Panics
/// The lengths differ.
pub fn past_caches<T: Copy>(from: &[T], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "a copy has as many elements");
    // SAFETY: both are slices of as many values, and apart, as one is borrowed mutably.
    unsafe { copy(from.as_ptr(), to.as_mut_ptr(), from.len(), pays(size_of_val(from))) };
}

/// Whether a piece of so many bytes is long enough for copies past the caches. A shorter one is over before
/// memory would be.
pub(crate) fn pays(bytes: usize) -> bool {
    bytes >= 32 << 10
}

/// Copies `len` values, past the caches where `past` says so (on x86-64; plainly elsewhere).
///
/// A plain store first takes the line from whoever read it last, and the reader then takes it from this
/// processor's cache: between processors that share no cache, that is a quarter of the speed of going through
/// memory. Between processors that share one, it is a little faster.
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`].
pub(crate) unsafe fn copy<T: Copy>(from: *const T, to: *mut T, len: usize, past: bool) {
    #[cfg(target_arch = "x86_64")]
    if past {
        // SAFETY: the caller's word; the same bytes.
        return unsafe { copy_past_caches(from.cast(), to.cast(), len * size_of::<T>()) };
    }
    // SAFETY: the caller's word.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
}

/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`].
#[cfg(target_arch = "x86_64")]
unsafe fn copy_past_caches(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const WIDTH: usize = 16;
    const LINE: usize = 64;
    // SAFETY: all offsets are below `bytes`. Streaming stores want addresses of whole vectors, so what lies before
    // the first and after the last line is copied plainly. SSE2 is part of x86-64. The fence puts the stores
    // before any later one, such as the counter that tells the reader.
    unsafe {
        let head = to.align_offset(LINE).min(bytes);
        std::ptr::copy_nonoverlapping(from, to, head);
        let end = head + (bytes - head) / LINE * LINE;
        for line in (head..end).step_by(LINE) {
            for i in (line..line + LINE).step_by(WIDTH) {
                let vector = _mm_loadu_si128(from.add(i).cast::<__m128i>());
                _mm_stream_si128(to.add(i).cast::<__m128i>(), vector);
            }
        }
        std::ptr::copy_nonoverlapping(from.add(end), to.add(end), bytes - end);
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slices_are_copied(len in 0usize..20_000) {
            let from: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let mut to = vec![-1.0; len];
            past_caches(&from, &mut to);
            prop_assert_eq!(from, to);
        }

        #[test]
        fn every_byte_is_copied_and_no_other(
            len in 0usize..3000,
            from_at in 0usize..70,
            to_at in 0usize..70,
            past: bool,
        ) {
            let from: Vec<u8> = (0..len + 70).map(|i| (i * 31 % 251) as u8).collect();
            let mut to = vec![7u8; len + 140];
            // SAFETY: both ranges lie within their vectors.
            unsafe { copy(from.as_ptr().add(from_at), to.as_mut_ptr().add(to_at), len, past) };
            prop_assert_eq!(&to[to_at..to_at + len], &from[from_at..from_at + len]);
            prop_assert!(to[..to_at].iter().chain(&to[to_at + len..]).all(|&b| b == 7));
        }
    }
}
