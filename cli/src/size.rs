//! Numbers on the command line.

use std::num::{NonZeroU16, NonZeroUsize};
use std::time::Duration;

use sluice_storage::io::sim::DriveSpeed;

use crate::terminal::counted;

/// Parses a count that must be at least one.
pub(crate) fn parse_count(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "write a whole number, 1 or more".to_owned())
}

/// Parses how many experts a token may use at most in a layer.
pub(crate) fn parse_experts(text: &str) -> Result<NonZeroU16, String> {
    text.parse().map_err(|_| "a token uses at least one expert in a layer: write a whole number from 1 on".to_owned())
}

/// A number of bytes without a unit, below which the unit was forgotten: nothing large that an option could mean is so small.
const FORGOTTEN: u64 = 1 << 20;

/// Parses the size of something large, such as a budget: as [`parse_bytes`], but a small number without a unit is refused, since `64`
/// means 64GiB more likely than 64 bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    let number = text.trim();
    // Nothing is nothing in every unit.
    let is_clear = number.ends_with(|c: char| c.is_ascii_alphabetic()) || number.parse() == Ok(0.0);
    if is_clear || bytes >= FORGOTTEN {
        return Ok(bytes);
    }
    // Nobody has thousands of GiB, and whoever says MiB writes thousands of them.
    let unit = if bytes < 1024 { "GiB" } else { "MiB" };
    Err(format!(
        "`{number}` without a unit would be {}: write {number}{unit}, or the unit that you mean",
        counted(bytes, "byte")
    ))
}

/// Parses `4GiB`, `512MiB`, `3GB`, `1.5GiB`, `4G` (the same as `4GiB`) or a plain number of bytes.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
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

/// A rate such as `3GB/s`.
pub(crate) fn parse_speed(text: &str) -> Result<u64, String> {
    let size = text.trim().strip_suffix("/s").unwrap_or(text);
    // A speed of three bytes per second is never meant by `3`.
    let has_unit = size.trim().ends_with(|c: char| c.is_ascii_alphabetic());
    match parse_bytes(size).and_then(|speed| if has_unit { Ok(speed) } else { Err(String::new()) }) {
        Ok(0) => Err("nothing could ever be read at that speed".into()),
        Ok(speed) => Ok(speed),
        Err(_) => Err(format!("`{text}` is not a speed: write a number and a unit, such as 3GB/s or 800MB/s")),
    }
}

/// Default latency of a drive: that of a good NVMe drive.
const USUAL_LATENCY: Duration = Duration::from_micros(80);
/// Longest latency that is accepted, in seconds.
const LATENCY_MAX: f64 = 10.0;

/// A drive such as `7GB/s,80us` or `7GB/s`.
pub(crate) fn parse_drive(text: &str) -> Result<DriveSpeed, String> {
    let (speed, latency) = match text.split_once(',') {
        Some((speed, latency)) => (speed, parse_latency(latency)?),
        None => (text, USUAL_LATENCY),
    };
    Ok(DriveSpeed { bytes_per_second: parse_speed(speed)?, latency })
}

/// A short time such as `80us`, `0.1ms` or `500ns`.
fn parse_latency(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 5] = [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let text = text.trim();
    let seconds = UNITS.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        Some(number * factor)
    });
    let possible = seconds.filter(|seconds| (0.0..=LATENCY_MAX).contains(seconds));
    let nanoseconds = possible.map(|seconds| Duration::from_nanos((seconds * 1e9).round() as u64));
    nanoseconds.ok_or_else(|| format!("`{text}` is not a latency: write a number and a unit, such as 80us or 0.1ms"))
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
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn a_forgotten_unit_is_asked_for() {
        for (text, bytes) in
            [("0", 0), ("64b", 64), ("64GiB", 64 << 30), ("1048576", 1 << 20), ("68719476736", 64 << 30)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for (text, meant) in
            [("64", "write 64GiB"), (" 1 ", "write 1GiB"), ("0.5", "write 0.5GiB"), ("8192", "write 8192MiB")]
        {
            assert!(parse_size(text).is_err_and(|said| said.contains(meant)), "{text}");
        }
    }

    #[test]
    fn not_sizes() {
        for text in ["", "GiB", "-1GiB", "4 GiB extra", "4XB", "1.2.3k", ".", "1e9", "99999999999TiB", "9e99.9TiB"] {
            assert!(parse_bytes(text).is_err() && parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn speeds() {
        assert_eq!(parse_speed("3GB/s"), Ok(3_000_000_000));
        assert_eq!(parse_speed("800MB"), Ok(800_000_000));
        assert_eq!(parse_speed("3 GiB/s"), Ok(3 << 30));
        for wrong in ["0", "3", "3/s", "0GB/s", "3000000000", "fast", "3GB/h", ""] {
            assert!(parse_speed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn drives() {
        let drive = |bytes_per_second, us| Ok(DriveSpeed { bytes_per_second, latency: Duration::from_micros(us) });
        assert_eq!(parse_drive("7GB/s,80us"), drive(7_000_000_000, 80));
        assert_eq!(parse_drive("7GB/s"), drive(7_000_000_000, 80));
        assert_eq!(parse_drive(" 3GiB/s , 1.5 ms "), drive(3 << 30, 1500));
        assert_eq!(parse_drive("800MB/s,0us"), drive(800_000_000, 0));
        assert_eq!(parse_drive("1GB/s,20µs"), drive(1_000_000_000, 20));
        for wrong in
            ["", ",80us", "7", "0GB/s", "7GB/s,", "7GB/s,80", "7GB/s,fast", "7GB/s,80us,4", "7GB/s,-1us", "7GB/s,2m"]
        {
            assert!(parse_drive(wrong).is_err(), "{wrong}");
        }
        assert!(parse_drive("7GB/s,11s").is_err(), "no drive takes that long");
        assert!(parse_drive("7GB/s,80").unwrap_err().contains("80us"));
    }
}
