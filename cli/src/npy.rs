//! NumPy's array file, version 1.0: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

/// The bytes before the elements of a little-endian f32 array `[rows, cols]` in row-major order.
pub(crate) fn f32_header(rows: usize, cols: usize) -> Vec<u8> {
    const ALIGN: usize = 64;
    const FIXED: usize = 10;
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    // Spaces and a line end, so that the elements are aligned.
    let len = (FIXED + dict.len() + 1).next_multiple_of(ALIGN) - FIXED;
    dict.extend(std::iter::repeat_n(' ', len - dict.len() - 1));
    dict.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    // Two numbers of type usize cannot make it too long for a u16.
    header.extend((len as u16).to_le_bytes());
    header.extend(dict.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header() {
        for (rows, cols) in [(1, 1), (24, 160), (123_456_789, 987_654_321)] {
            let bytes = f32_header(rows, cols);
            assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
            assert_eq!(bytes.len() % 64, 0);
            assert_eq!(usize::from(u16::from_le_bytes([bytes[8], bytes[9]])), bytes.len() - 10);
            let dict = std::str::from_utf8(&bytes[10..]).unwrap();
            assert!(dict.contains(&format!("'shape': ({rows}, {cols}), ")) && dict.ends_with('\n'), "{dict}");
        }
    }
}
