//! `strftime_now`: the date for templates that tell the model what day it is.

use std::fmt::Write;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Formats a moment, in seconds since 1970 on the user's own clock, as C's `strftime` does in the
/// C locale. Unknown directives stay as they are.
pub(super) fn strftime(format: &str, now: i64) -> String {
    // Far beyond any calendar, but far from overflow as well.
    let now = now.clamp(-1 << 40, 1 << 40);
    let (days, seconds) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let weekday = (days + 4).rem_euclid(7) as usize;
    let month_name = MONTHS[month as usize - 1];
    let hour12 = (hour + 11) % 12 + 1;
    let yday = days - days_before(year) + 1;

    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let bare = chars.next_if_eq(&'-').is_some();
        let mut two = |n: i64| match bare {
            true => write!(out, "{n}"),
            false => write!(out, "{n:02}"),
        };
        // Writing to a string cannot fail.
        let _ = match chars.next() {
            Some('d') => two(day),
            Some('m') => two(month),
            Some('y') => two(year.rem_euclid(100)),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('j') if bare => write!(out, "{yday}"),
            Some('j') => write!(out, "{yday:03}"),
            Some('e') => write!(out, "{day:2}"),
            Some('Y') => write!(out, "{year}"),
            Some('B') => out.write_str(month_name),
            Some('b' | 'h') => out.write_str(&month_name[..3]),
            Some('A') => out.write_str(DAYS[weekday]),
            Some('a') => out.write_str(&DAYS[weekday][..3]),
            Some('w') => write!(out, "{weekday}"),
            Some('u') => write!(out, "{}", (weekday + 6) % 7 + 1),
            Some('p') => out.write_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('%') => out.write_str("%"),
            Some(other) => write!(out, "%{}{other}", if bare { "-" } else { "" }),
            None => out.write_str("%"),
        };
    }
    out
}

/// Days from 1970 to the first of January of a year.
fn days_before(year: i64) -> i64 {
    let y = year - 1;
    y * 365 + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) - 719_162
}

/// Year, month and day of a day counted from 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    // Never too late, and a few dozen years early at most.
    let mut year = 1970 + days.div_euclid(if days < 0 { 365 } else { 366 });
    while days_before(year + 1) <= days {
        year += 1;
    }
    let leap = days_before(year + 1) - days_before(year) == 366;
    let mut left = days - days_before(year);
    for month in 1..=12 {
        let len = match month {
            2 => 28 + i64::from(leap),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        if left < len {
            return (year, month, left + 1);
        }
        left -= len;
    }
    (year, 12, 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (now, want) in [
            (0, "1970-01-01 Thu 00:00:00 001"),
            (-1, "1969-12-31 Wed 23:59:59 365"),
            (951_782_400, "2000-02-29 Tue 00:00:00 060"),
            (1_709_208_000, "2024-02-29 Thu 12:00:00 060"),
            (1_798_761_599, "2026-12-31 Thu 23:59:59 365"),
            (4_107_542_400, "2100-03-01 Mon 00:00:00 060"),
        ] {
            assert_eq!(strftime("%F %a %T %j", now), want);
        }
        assert_eq!(strftime("%d %b %Y, %-I %p, %B %q 100%%%", 951_782_400), "29 Feb 2000, 12 AM, February %q 100%%");
        strftime("%F", i64::MIN);
        strftime("%F", i64::MAX);
    }
}
