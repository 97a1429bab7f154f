//! NumPy's `.npy` files (format versions 1 to 3), as NumPy's `lib/format.py` defines them.

use std::io::{ErrorKind, Read};

use half::f16;

/// A `.npy` file of floats: its header, and where its elements are.
#[derive(Debug, Clone, PartialEq)]
pub struct Npy<'a> {
    /// Its shape.
    pub shape: Vec<usize>,
    element: Element,
    fortran: bool,
    data: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    F16,
    F32,
    F64,
}

/// What a `.npy` file says of its elements, which follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// NumPy's name of the type, such as `<f4` and `|u1`.
    pub descr: String,
    /// Whether the first dimension runs fastest.
    pub fortran: bool,
    /// The shape.
    pub shape: Vec<usize>,
}

/// Longest header that is read; NumPy itself takes no more than 10,000 bytes unless told to.
const LONGEST_HEADER: usize = 1 << 20;

/// Reads the header of a `.npy` file of any type, up to the first element.
///
/// # Errors
/// What is wrong with it: no `.npy`, cut short, or of an unknown version; or why it cannot be read.
pub fn read_header(file: &mut impl Read) -> Result<Header, String> {
    let mut take = |bytes: &mut [u8]| match file.read_exact(bytes) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(format!("cannot be read: {error}")),
        Ok(()) => Ok(true),
    };
    let mut magic = [0; 6];
    if !take(&mut magic)? || &magic != b"\x93NUMPY" {
        return Err("is not a .npy file".to_owned());
    }
    let cut = || "is cut short within its header".to_owned();
    let (mut version, mut short, mut long) = ([0; 2], [0; 2], [0; 4]);
    if !take(&mut version)? {
        return Err(cut());
    }
    let length = match version[0] {
        1 => take(&mut short)?.then(|| usize::from(u16::from_le_bytes(short))),
        2 | 3 => take(&mut long)?.then(|| u32::from_le_bytes(long) as usize),
        major => return Err(format!("is a .npy file of the unknown version {major}")),
    };
    let mut header = vec![0; length.filter(|&length| length <= LONGEST_HEADER).ok_or_else(cut)?];
    if !take(&mut header)? {
        return Err(cut());
    }
    let header = String::from_utf8_lossy(&header);
    let unclear = |what: &str| format!("has a .npy header without {what}: {}", header.trim());
    let value = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, v)| v.trim_start());

    let descr = value("descr").and_then(|v| v.strip_prefix('\'')?.split('\'').next());
    let descr = descr.ok_or_else(|| unclear("a plain 'descr'"))?.to_owned();
    let fortran = match value("fortran_order") {
        Some(v) if v.starts_with("True") => true,
        Some(v) if v.starts_with("False") => false,
        _ => return Err(unclear("'fortran_order'")),
    };
    let shape = value("shape").and_then(|v| v.strip_prefix('(')?.split_once(')')).map(|(v, _)| v);
    let shape: Vec<usize> = shape
        .and_then(|v| v.split(',').map(str::trim).filter(|d| !d.is_empty()).map(|d| d.parse().ok()).collect())
        .ok_or_else(|| unclear("a 'shape'"))?;
    let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n < 1 << 40);
    count.ok_or_else(|| format!("claims the shape {shape:?}"))?;
    Ok(Header { descr, fortran, shape })
}

/// Reads a `.npy` file of float16, float32 or float64, in C or Fortran order.
///
/// # Errors
/// What is wrong with it: no `.npy`, cut short, or of another type.
pub fn parse(bytes: &[u8]) -> Result<Npy<'_>, String> {
    let mut data = bytes;
    let Header { descr, fortran, shape } = read_header(&mut data)?;
    let count: usize = shape.iter().product();
    let (element, size) = match descr.as_str() {
        "<f2" => (Element::F16, 2),
        "<f4" => (Element::F32, 4),
        "<f8" => (Element::F64, 8),
        _ => return Err(format!("holds {descr}, not little-endian floats (<f2, <f4 or <f8)")),
    };
    if data.len() != count * size {
        return Err(format!(
            "has {} bytes of data where {shape:?} of {descr} takes {}",
            data.len(),
            count * size
        ));
    }
    Ok(Npy { shape, element, fortran, data })
}

impl Npy<'_> {
    /// The elements as float32 in C order (the last dimension runs fastest).
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.iter().product()];
        self.read(&mut values);
        values
    }

    /// The elements as float64 in C order.
    #[must_use]
    pub fn values_f64(&self) -> Vec<f64> {
        let mut values = vec![0.0; self.shape.iter().product()];
        self.write(&mut values, f64::from, |v| v);
        values
    }

    /// Writes the elements as float32 in C order to `out`, which has as many.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn read(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.shape.iter().product::<usize>(), "the buffer for an array");
        self.write(out, |v| v, |v| v as f32);
    }

    fn write<T: Copy + Default>(&self, out: &mut [T], narrow: fn(f32) -> T, wide: fn(f64) -> T) {
        let write = |out: &mut [T]| match self.element {
            Element::F16 => fill(out, self.data.as_chunks().0, |b| narrow(f16::from_le_bytes(b).to_f32())),
            Element::F32 => fill(out, self.data.as_chunks().0, |b| narrow(f32::from_le_bytes(b))),
            Element::F64 => fill(out, self.data.as_chunks().0, |b| wide(f64::from_le_bytes(b))),
        };
        if self.fortran {
            let mut values = vec![T::default(); out.len()];
            write(&mut values);
            to_c_order(&self.shape, &values, out);
        } else {
            write(out);
        }
    }
}

fn fill<T, const N: usize>(out: &mut [T], elements: &[[u8; N]], read: impl Fn([u8; N]) -> T) {
    for (to, from) in out.iter_mut().zip(elements) {
        *to = read(*from);
    }
}

/// Reorders elements whose first dimension runs fastest.
fn to_c_order<T: Copy>(shape: &[usize], values: &[T], out: &mut [T]) {
    let mut strides = Vec::with_capacity(shape.len());
    let mut stride = 1;
    for &d in shape {
        strides.push(stride);
        stride *= d;
    }
    let mut position = vec![0; shape.len()];
    let mut from = 0;
    for to in out {
        *to = values[from];
        for d in (0..shape.len()).rev() {
            position[d] += 1;
            from += strides[d];
            if position[d] < shape[d] {
                break;
            }
            from -= strides[d] * shape[d];
            position[d] = 0;
        }
    }
}

/// The header of a C-order `.npy` file, version 1, of elements that NumPy calls `descr`; they follow it.
#[must_use]
pub fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    // As Python writes a tuple.
    let dims = match shape {
        [only] => format!("{only},"),
        several => several.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    // Magic, version, length and header fill a multiple of 64 bytes; a line feed ends it.
    let padding = (64 - (10 + header.len() + 1) % 64) % 64;
    header.push_str(&" ".repeat(padding));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&(header.len() as u16).to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    bytes
}

/// Writes a C-order float32 `.npy` file, version 1.
#[must_use]
pub fn to_bytes(shape: &[usize], values: &[f32]) -> Vec<u8> {
    [&header("<f4", shape), bytemuck::cast_slice(values)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file with this header and data, in version `major`.
    fn file(major: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = [b"\x93NUMPY".as_slice(), &[major, 0]].concat();
        match major {
            1 => bytes.extend_from_slice(&(header.len() as u16).to_le_bytes()),
            _ => bytes.extend_from_slice(&(header.len() as u32).to_le_bytes()),
        }
        [&bytes, header.as_bytes(), data].concat()
    }

    #[test]
    fn float_types_and_both_orders_are_read() {
        // np.asfortranarray(np.arange(6, dtype=...).reshape(2, 3)): column by column.
        let order = [0u8, 3, 1, 4, 2, 5];
        let expected: Vec<f32> = (0u8..6).map(f32::from).collect();
        let f16s: Vec<u8> = order.iter().flat_map(|&v| f16::from_f32(f32::from(v)).to_le_bytes()).collect();
        let f32s: Vec<u8> = order.iter().flat_map(|&v| f32::from(v).to_le_bytes()).collect();
        let f64s: Vec<u8> = order.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
        for (major, descr, data) in [(1, "<f2", f16s), (2, "<f4", f32s), (3, "<f8", f64s)] {
            let header = format!("{{'descr': '{descr}', 'fortran_order': True, 'shape': (2, 3), }}\n");
            let bytes = file(major, &header, &data);
            let npy = parse(&bytes).unwrap();
            assert_eq!((npy.shape.as_slice(), npy.values()), (&[2, 3][..], expected.clone()), "{descr}");
            assert!(npy.values_f64().iter().map(|&v| v as f32).eq(expected.clone()), "{descr}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(shape in prop::collection::vec(0usize..5, 0..4)) {
            let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| i as f32 / 3.0).collect();
            let bytes = to_bytes(&shape, &values);
            prop_assert_eq!((bytes.len() - values.len() * 4) % 64, 0);
            let npy = parse(&bytes).unwrap();
            prop_assert_eq!((npy.values(), npy.shape), (values, shape));
        }

        #[test]
        fn damaged_files_are_errors_not_panics(cut in 0usize..200, at in 0usize..200, to: u8) {
            let mut bytes = to_bytes(&[4, 2], &[1.0; 8]);
            let len = bytes.len();
            bytes[at % len] = to;
            // Either it is refused or it is a whole array: no other outcome.
            if let Ok(npy) = parse(&bytes) {
                prop_assert_eq!(npy.shape.iter().product::<usize>(), npy.values().len());
            }
            bytes = to_bytes(&[4, 2], &[1.0; 8]);
            bytes.truncate(cut % len);
            prop_assert!(parse(&bytes).is_err());
        }
    }

    #[test]
    fn other_types_are_named() {
        let header = "{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }";
        let error = parse(&file(1, header, &[0; 4])).unwrap_err();
        assert_eq!(error, "holds <i4, not little-endian floats (<f2, <f4 or <f8)");
        assert_eq!(parse(b"PNG").unwrap_err(), "is not a .npy file");
    }
}
