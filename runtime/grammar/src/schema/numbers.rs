//! Numbers in a range, as regular expressions of their numerals.

/// Decimal places of bounds.
pub(crate) const PLACES: u32 = 9;

/// The number one, in the unit of bounds.
pub(crate) const ONE: i128 = 1_000_000_000;

/// Most digits of an integer, so that it fits into 64 bits.
const DIGITS: usize = 18;

/// Highest integer.
pub(crate) const HIGHEST: i128 = 999_999_999_999_999_999;

/// Any integer.
pub(crate) const INTEGER: &str = "-?(?:0|[1-9][0-9]{0,17})";

/// Any number.
pub(crate) const NUMBER: &str = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,2})?";

/// Any number without an exponent.
pub(crate) const PLAIN: &str = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,15})?";

/// A number that is not an integer.
pub(crate) const FRACTION: &str = r"-?(?:0|[1-9][0-9]{0,8})\.[0-9]{0,5}[1-9]";

/// A JSON number in units of 10⁻⁹; `None` if it is too large or has more decimal places.
pub(crate) fn scaled(number: &serde_json::Number) -> Option<i128> {
    let text = number.to_string();
    let (negative, text) = text.strip_prefix('-').map_or((false, text.as_str()), |rest| (true, rest));
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let exponent: i32 = exponent.parse().ok()?;
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let fraction = fraction.trim_end_matches('0');
    let places = i32::try_from(fraction.len()).ok()? - exponent;
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let shift = i32::try_from(PLACES).ok()? - places;
    let value = match u32::try_from(shift) {
        Ok(shift) => digits.checked_mul(10_i128.checked_pow(shift)?)?,
        Err(_) if digits == 0 => 0,
        Err(_) => {
            let divisor = 10_i128.checked_pow(shift.unsigned_abs())?;
            (digits % divisor == 0).then(|| digits / divisor)?
        }
    };
    Some(if negative { -value } else { value })
}

/// Integers from `low` to `high`, as a regular expression; `None` if there are none.
pub(crate) fn integers(low: i128, high: i128) -> Option<String> {
    let (low, high) = (low.max(-HIGHEST), high.min(HIGHEST));
    if low == -HIGHEST && high == HIGHEST {
        return Some(INTEGER.to_owned());
    }
    let mut parts = Vec::new();
    if high >= 0 {
        parts.extend(naturals(low.max(0), high));
    }
    if low < 0 {
        parts.extend(naturals((-high).max(1), -low).into_iter().map(|part| format!("-{part}")));
    }
    select(parts)
}

/// Numbers from `low` to `high`, in units of 10⁻⁹, either of which may be missing, as a regular expression of their numerals
/// without exponents; `None` if there are none. `exclusive` bounds are not included themselves.
pub(crate) fn decimals(low: Option<(i128, bool)>, high: Option<(i128, bool)>) -> Option<String> {
    let largest = low.into_iter().chain(high).map(|(bound, _)| (bound.abs() / ONE).to_string().len()).max()?;
    // Few enough digits that a number of 64 bits distinguishes a bound from the values next to it.
    let places = 14_usize.saturating_sub(largest).min(PLACES as usize);
    let unit = 10_i128.pow(PLACES - places as u32);
    let low =
        low.map(|(bound, exclusive)| -(-bound).div_euclid(unit) + i128::from(exclusive && bound.rem_euclid(unit) == 0));
    let high =
        high.map(|(bound, exclusive)| bound.div_euclid(unit) - i128::from(exclusive && bound.rem_euclid(unit) == 0));
    let one = 10_i128.pow(places as u32);
    let limit = (HIGHEST + 1) * one - 1;
    let (low, high) = (low.unwrap_or(-limit).max(-limit), high.unwrap_or(limit).min(limit));
    let mut parts = Vec::new();
    if high >= 0 && low <= high {
        parts.extend(positive(low.max(0), high, places));
    }
    if low < 0 && low <= high {
        parts.extend(positive((-high).max(1), -low, places).into_iter().map(|part| format!("-{part}")));
    }
    select(parts)
}

fn select(parts: Vec<String>) -> Option<String> {
    (!parts.is_empty()).then(|| format!("(?:{})", parts.join("|")))
}

/// Numerals of the numbers from `low` to `high`, both in units of the last of `places`.
fn positive(low: i128, high: i128, places: usize) -> Vec<String> {
    let one = 10_i128.pow(places as u32);
    let ((low, low_part), (high, high_part)) = ((low / one, low % one), (high / one, high % one));
    let digits = |part: i128| if places == 0 { String::new() } else { format!("{part:0places$}") };
    let (zeros, nines) = (digits(0), digits(one - 1));
    let with = |whole: String, from: &str, to: &str| -> Vec<String> {
        let mut parts: Vec<String> =
            fractions(from, to).into_iter().filter(|f| !f.is_empty()).map(|f| format!("{whole}\\.{f}")).collect();
        if from.bytes().all(|digit| digit == b'0') {
            parts.push(whole);
        }
        parts
    };
    if low == high {
        return with(low.to_string(), &digits(low_part), &digits(high_part));
    }
    let mut parts = with(low.to_string(), &digits(low_part), &nines);
    if low + 1 < high {
        let any = if places == 0 { String::new() } else { format!("(?:\\.[0-9]{{1,{places}}})?") };
        parts.extend(naturals(low + 1, high - 1).into_iter().map(|whole| format!("{whole}{any}")));
    }
    parts.extend(with(high.to_string(), &zeros, &digits(high_part)));
    parts
}

/// Digits after a decimal point, at most as many as `low` and `high` have, whose value is between these. One of the alternatives
/// is empty if the value without digits is between them.
fn fractions(low: &str, high: &str) -> Vec<String> {
    let is_all = |text: &str, digit: u8| text.bytes().all(|d| d == digit);
    let count = low.len();
    if is_all(low, b'0') && is_all(high, b'9') && count > 0 {
        return vec![String::new(), format!("[0-9]{{1,{count}}}")];
    }
    let mut parts = Vec::new();
    if is_all(low, b'0') {
        parts.push(String::new());
    }
    let (Some(&first), Some(&last)) = (low.as_bytes().first(), high.as_bytes().first()) else { return parts };
    let (zeros, nines) = ("0".repeat(count - 1), "9".repeat(count - 1));
    let behind = |digit: u8, low: &str, high: &str| -> Vec<String> {
        fractions(low, high).into_iter().map(|rest| format!("{}{rest}", char::from(digit))).collect()
    };
    if first == last {
        parts.extend(behind(first, &low[1..], &high[1..]));
        return parts;
    }
    parts.extend(behind(first, &low[1..], &nines));
    if first + 1 < last {
        parts.push(format!("[{}-{}][0-9]{{0,{}}}", char::from(first + 1), char::from(last - 1), count - 1));
    }
    parts.extend(behind(last, &zeros, &high[1..]));
    parts
}

/// Natural numbers from `low` to `high`.
fn naturals(low: i128, high: i128) -> Vec<String> {
    if low > high {
        return Vec::new();
    }
    let mut parts = Vec::new();
    for count in low.to_string().len()..=high.to_string().len().min(DIGITS) {
        let (least, most) = (if count == 1 { 0 } else { 10_i128.pow(count as u32 - 1) }, 10_i128.pow(count as u32) - 1);
        parts.extend(of_one_length(&low.max(least).to_string(), &high.min(most).to_string()));
    }
    parts
}

/// Strings of digits of one length, from `low` to `high`.
fn of_one_length(low: &str, high: &str) -> Vec<String> {
    let is_all = |text: &str, digit: u8| text.bytes().all(|d| d == digit);
    let count = low.len();
    match (low.as_bytes().first(), high.as_bytes().first()) {
        (Some(_), Some(_)) if is_all(low, b'0') && is_all(high, b'9') => vec![format!("[0-9]{{{count}}}")],
        (Some(&first), Some(&last)) => {
            let (zeros, nines) = ("0".repeat(count - 1), "9".repeat(count - 1));
            let behind = |digit: u8, low: &str, high: &str| -> Vec<String> {
                of_one_length(low, high).into_iter().map(|rest| format!("{}{rest}", char::from(digit))).collect()
            };
            if first == last {
                return behind(first, &low[1..], &high[1..]);
            }
            let mut parts = behind(first, &low[1..], &nines);
            if first + 1 < last {
                parts.push(format!("[{}-{}][0-9]{{{}}}", char::from(first + 1), char::from(last - 1), count - 1));
            }
            parts.extend(behind(last, &zeros, &high[1..]));
            parts
        }
        _ => vec![String::new()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(regex: Option<String>, text: &str) -> bool {
        regex.is_some_and(|regex| regex::Regex::new(&format!("^(?:{regex})$")).unwrap().is_match(text))
    }

    #[test]
    fn numbers_are_read_exactly() {
        let of = |text: &str| scaled(&serde_json::from_str(text).unwrap());
        assert_eq!(of("1"), Some(ONE));
        assert_eq!(of("-0.5"), Some(-ONE / 2));
        assert_eq!(of("1e-9"), Some(1));
        assert_eq!(of("1e-10"), None);
        assert_eq!(of("1.50e2"), Some(150 * ONE));
        assert_eq!(of("0.0"), Some(0));
        assert_eq!(of("1e300"), None);
    }

    proptest! {
        #[test]
        fn integers_are_those_between(a in -1500_i128..1500, b in -1500_i128..1500, x in -1600_i128..1600) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert_eq!(matches(integers(low, high), &x.to_string()), low <= x && x <= high);
        }

        #[test]
        fn decimals_are_those_between(
            a in -3000_i128..3000, b in -3000_i128..3000, x in -3000_i128..3000,
            open in any::<(bool, bool)>(), sides in any::<(bool, bool)>(),
        ) {
            let hundredth = ONE / 100;
            let (low, high) = (a.min(b), a.max(b));
            prop_assume!(sides.0 || sides.1);
            let regex = decimals(
                sides.0.then_some((low * hundredth, open.0)),
                sides.1.then_some((high * hundredth, open.1)),
            );
            let above = !sides.0 || low < x || (low == x && !open.0);
            let below = !sides.1 || x < high || (x == high && !open.1);
            let sign = if x < 0 { "-" } else { "" };
            let (whole, part) = (x.abs() / 100, x.abs() % 100);
            prop_assert_eq!(matches(regex.clone(), &format!("{sign}{whole}.{part:02}")), above && below);
            prop_assert_eq!(matches(regex.clone(), &format!("{sign}{whole}.{part:02}00")), above && below);
            if part == 0 {
                prop_assert_eq!(matches(regex, &format!("{sign}{whole}")), above && below);
            }
        }
    }
}
