//! Numbers on the command line.

use std::num::NonZeroUsize;

/// Parses how many there are to be, of what there must be one at least.
pub(crate) fn parse_count(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "write a whole number, 1 or more".to_owned())
}

/// Parses `4GiB`, `512MiB`, `3GB`, `1.5GiB`, `4G` (the same as `4GiB`) or a plain number of bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let malformed = || format!("`{text}` is not a size: write a number and a unit, such as 4GiB, 512MiB or 3GB");
    let unit = unit_bytes(unit.trim()).ok_or_else(malformed)?;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit).ok_or_else(|| format!("`{text}` is more than any machine has"));
    }
    let fraction: f64 = number.parse().map_err(|_| malformed())?;
    let bytes = fraction * unit as f64;
    if !(bytes.is_finite() && bytes < u64::MAX as f64) {
        return Err(format!("`{text}` is more than any machine has"));
    }
    Ok(bytes as u64)
}

fn unit_bytes(unit: &str) -> Option<u64> {
    const PREFIXES: [&str; 4] = ["k", "m", "g", "t"];
    let unit = unit.to_ascii_lowercase();
    if unit.is_empty() || unit == "b" {
        return Some(1);
    }
    PREFIXES.iter().zip(1..).find_map(|(prefix, power)| match unit.strip_prefix(prefix)? {
        "" | "i" | "ib" => Some(1024u64.pow(power)),
        "b" => Some(1000u64.pow(power)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("17b", 17),
            ("1k", 1024),
            ("1kB", 1000),
            ("512MiB", 512 << 20),
            ("512 mib", 512 << 20),
            ("3GB", 3_000_000_000),
            ("4GiB", 4 << 30),
            ("4G", 4 << 30),
            ("1.5GiB", 3 << 29),
            ("0.5k", 512),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn not_sizes() {
        for text in ["", "GiB", "-1GiB", "4 GiB extra", "4XB", "1.2.3k", ".", "1e9", "99999999999TiB", "9e99.9TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
