//! Parses the headers of an answer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ureq::http::{HeaderMap, Uri};

/// A header's text; `None` if it is missing, or has characters other than printable ASCII.
pub(crate) fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

pub(crate) fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.parse().ok()
}

/// The pause that an answer asks for: in seconds, as the time at which it ends, or in the hub's form
/// `RateLimit: "api";r=0;t=55`.
pub(crate) fn asked_pause(headers: &HeaderMap) -> Option<Duration> {
    let limit =
        || text(headers, "ratelimit")?.split(';').find_map(|field| field.trim().strip_prefix("t=")?.parse().ok());
    if let Some(seconds) = number(headers, "retry-after").or_else(limit) {
        return Some(Duration::from_secs(seconds));
    }
    let until = seconds_of_date(text(headers, "retry-after")?)?;
    // By the server's clock, if the answer says what it shows.
    let now = text(headers, "date").and_then(seconds_of_date);
    let own = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Some(Duration::from_secs(until.saturating_sub(now.unwrap_or_else(own))))
}

/// Seconds since 1970 of a date as servers write it: `Wed, 21 Oct 2015 07:28:00 GMT` (RFC 9110, section 5.6.7, which allows
/// servers no other form).
fn seconds_of_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(str::parse::<u64>);
    let mut next = || clock.next()?.ok();
    let (hour, minute, second) = (next()?, next()?, next()?);
    let sound = (1970..10_000).contains(&year) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 61;
    if !sound || words.next() != Some("GMT") {
        return None;
    }
    // Days of a calendar whose years begin in March, so that a leap day is the last day of its year.
    let (year, month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    const UNTIL_1970: u64 = 719_468;
    Some((days - UNTIL_1970) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// First byte, last byte and length of the whole, of `bytes 0-9/100`.
pub(crate) fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((first.parse().ok()?, last.parse().ok()?, total))
}

/// The address behind `rel="next"`.
pub(crate) fn next_page(headers: &HeaderMap) -> Option<String> {
    let link = text(headers, "link")?.split(',').find(|link| link.contains("rel=\"next\""))?;
    let (_, rest) = link.split_once('<')?;
    Some(rest.split_once('>')?.0.to_owned())
}

/// Scheme, host and port of an address.
pub(crate) fn origin(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let (scheme, authority) = (uri.scheme_str()?, uri.authority()?.as_str().to_ascii_lowercase());
    // The server is the same, whether the address names its default port or not.
    let port = if scheme == "https" { ":443" } else { ":80" };
    Some(format!("{scheme}://{}", authority.strip_suffix(port).unwrap_or(&authority)))
}

/// The target of a redirect from an address. The error is the rest of a sentence about `from`.
pub(crate) fn redirected(from: &str, to: &str) -> Result<String, &'static str> {
    let scheme = |url: &str| Some(url.split_once("://")?.0.to_ascii_lowercase());
    let own = scheme(from).unwrap_or_default();
    let target = if to.starts_with("//") {
        format!("{own}:{to}")
    } else if to.starts_with('/') {
        format!("{}{to}", origin(from).ok_or("it is no address")?)
    } else if scheme(to).is_some_and(|scheme| matches!(scheme.as_str(), "https" | "http")) {
        to.to_owned()
    } else {
        return Err("it leads to something that is no address");
    };
    match own == "https" && scheme(&target).as_deref() != Some("https") {
        true => Err("it leads from an encrypted connection to one that is not"),
        false => Ok(target),
    }
}

#[cfg(test)]
mod tests {
    use ureq::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let field = |&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        fields.iter().map(field).collect()
    }

    #[test]
    fn headers_are_read() {
        assert_eq!(content_range("bytes 5-9/100"), Some((5, 9, Some(100))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, 9, None)));
        for text in ["", "bytes 5-/7", "bytes */7", "5-9/10", "bytes 5-99999999999999999999/1"] {
            assert_eq!(content_range(text), None, "{text}");
        }
        let next = headers(&[("link", "<https://x/y?cursor=1>; rel=\"next\"")]);
        assert_eq!(next_page(&next).as_deref(), Some("https://x/y?cursor=1"));
        assert_eq!(next_page(&headers(&[("link", "<https://x>; rel=\"prev\"")])), None);
    }

    #[test]
    fn pauses_are_read_in_every_form() {
        let asked =
            |fields: &[(&'static str, &'static str)]| asked_pause(&headers(fields)).map(|pause| pause.as_secs());
        assert_eq!(asked(&[("retry-after", "7")]), Some(7));
        assert_eq!(asked(&[("ratelimit", "\"api\";r=0;t=55")]), Some(55));
        let date = ("date", "Wed, 21 Oct 2015 07:28:00 GMT");
        assert_eq!(asked(&[("retry-after", "Wed, 21 Oct 2015 07:30:05 GMT"), date]), Some(125));
        assert_eq!(asked(&[("retry-after", "Fri, 21 Oct 2016 07:28:00 GMT"), date]), Some(366 * 86_400));
        assert_eq!(asked(&[("retry-after", "Tue, 20 Oct 2015 07:30:05 GMT"), date]), Some(0), "it is over");
        assert!(asked(&[("retry-after", "Fri, 31 Dec 9999 23:59:59 GMT")]).is_some_and(|pause| pause > 1 << 32));
        for text in ["soon", "-5", "Wed, 21 Oct 2015", "Wed, 99 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 1 07:28:00 GMT"] {
            assert_eq!(asked(&[("retry-after", text)]), None, "{text}");
        }
        assert_eq!(seconds_of_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(seconds_of_date("Thu, 29 Feb 2024 12:00:00 GMT"), Some(1_709_208_000));
    }

    #[test]
    fn origins_are_those_of_servers() {
        assert_eq!(origin("https://A.b:8/c?d"), Some("https://a.b:8".into()));
        assert_eq!(origin("https://a.b:443/c"), origin("https://a.b"));
        assert_ne!(origin("https://a.b:80/c"), origin("https://a.b"));
        assert_eq!(origin("/c"), None);
    }

    #[test]
    fn redirects_lead_where_a_browser_would_go() {
        let from = "https://a.b/c/d";
        for (to, want) in
            [("/x?y", "https://a.b/x?y"), ("//e.f/x", "https://e.f/x"), ("HTTPS://e.f/x", "HTTPS://e.f/x")]
        {
            assert_eq!(redirected(from, to).as_deref(), Ok(want));
        }
        assert_eq!(redirected("http://a.b", "http://e.f/x").as_deref(), Ok("http://e.f/x"));
        for to in ["http://a.b/x", "file:///etc/passwd", "ftp://x", "data:,x", "x", ""] {
            assert!(redirected(from, to).is_err(), "{to}");
        }
    }
}
