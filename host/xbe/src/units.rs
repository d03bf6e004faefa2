//! Values of the command line: sizes, times, ports, files.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use xbee_api::PublishedPort;

/// `FILE:PATH`: a file that is copied into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageIn {
    /// Path or URI on this side.
    pub file: String,
    /// Absolute path in the guest.
    pub path: String,
}

/// `PATH:FILE`: a file that is copied out of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageOut {
    /// Absolute path in the guest.
    pub path: String,
    /// Path or URI on this side.
    pub file: String,
}

/// Parses `FILE:PATH`. Only FILE may have colons in it, as URIs have.
pub fn stage_in(text: &str) -> Result<StageIn, String> {
    match text.rsplit_once(':') {
        Some((file, path)) if !file.is_empty() && path.starts_with('/') => Ok(StageIn {
            file: file.to_owned(),
            path: path.to_owned(),
        }),
        _ => Err("expected FILE:PATH, PATH being absolute in the guest".to_owned()),
    }
}

/// Parses `PATH:FILE`. Only FILE may have colons in it, as URIs have.
pub fn stage_out(text: &str) -> Result<StageOut, String> {
    match text.split_once(':') {
        Some((path, file)) if path.starts_with('/') && !file.is_empty() => Ok(StageOut {
            path: path.to_owned(),
            file: file.to_owned(),
        }),
        _ => Err("expected PATH:FILE, PATH being absolute in the guest".to_owned()),
    }
}

/// Parses `NAME=VALUE`.
pub fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// Parses `HOST:GUEST`.
pub fn published_port(text: &str) -> Result<PublishedPort, String> {
    let ports = text.split_once(':').and_then(|(host, guest)| {
        Some(PublishedPort {
            host: host.parse().ok()?,
            guest: guest.parse().ok()?,
        })
    });
    match ports {
        Some(ports) if ports.guest != 0 => Ok(ports),
        _ => Err("expected HOST:GUEST, two TCP ports, as in 8080:80".to_owned()),
    }
}

/// Parses a size in bytes: `1073741824`, `512M`, `2GiB`. Units are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let parse = || {
        let digits = text
            .find(|char: char| !char.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return None,
        };
        number
            .parse::<u64>()
            .ok()?
            .checked_mul(1 << shift)
            .filter(|&bytes| bytes > 0)
    };
    parse().ok_or_else(|| "expected a size such as 512M or 2G".to_owned())
}

/// A moment, as it is written on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Milliseconds since the Unix epoch.
    At(u64),
    /// Seconds from now.
    In(u64),
}

/// Parses a moment: RFC 3339, `now`, or `+` and a time from now.
pub fn moment(text: &str) -> Result<Moment, String> {
    if text == "now" {
        return Ok(Moment::In(0));
    }
    if let Some(text) = text.strip_prefix('+') {
        return seconds(text).map(Moment::In);
    }
    OffsetDateTime::parse(text, &Rfc3339)
        .ok()
        .and_then(|at| u64::try_from(at.unix_timestamp_nanos() / 1_000_000).ok())
        .map(Moment::At)
        .ok_or_else(|| {
            "expected a moment such as 2026-01-31T08:00:00Z, 2026-01-31T09:00:00+01:00, +90m or now"
                .to_owned()
        })
}

/// Parses a time in seconds: `90`, `90s`, `10m`, `1h30m`, `2d`.
pub fn seconds(text: &str) -> Result<u64, String> {
    let parse = || {
        if let Ok(seconds) = text.parse::<u64>() {
            return Some(seconds);
        }
        let mut total = 0u64;
        for part in text.split_inclusive(|char: char| !char.is_ascii_digit()) {
            let (number, unit) = part.split_at_checked(part.len().checked_sub(1)?)?;
            let unit = match unit {
                "s" => 1,
                "m" => 60,
                "h" => 3600,
                "d" => 86400,
                _ => return None,
            };
            total = total.checked_add(number.parse::<u64>().ok()?.checked_mul(unit)?)?;
        }
        Some(total)
    };
    parse()
        .filter(|&seconds| seconds > 0)
        .ok_or_else(|| "expected a time such as 90s, 10m or 1h30m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files() {
        let parsed = stage_in("http://host:80/a:/data/a").unwrap();
        assert_eq!(
            (parsed.file.as_str(), parsed.path.as_str()),
            ("http://host:80/a", "/data/a")
        );
        let parsed = stage_out("/data/a:ftp://host:21/a").unwrap();
        assert_eq!(
            (parsed.path.as_str(), parsed.file.as_str()),
            ("/data/a", "ftp://host:21/a")
        );
        for text in ["", "a", ":/b", "a:b", "a:"] {
            stage_in(text).unwrap_err();
        }
        for text in ["", "/a", "/a:", "a:b", ":b"] {
            stage_out(text).unwrap_err();
        }
    }

    #[test]
    fn ports() {
        assert_eq!(
            published_port("0:80").unwrap(),
            PublishedPort { host: 0, guest: 80 }
        );
        for text in ["80", "80:0", "a:80", "80:65536", "1:2:3", "-1:80"] {
            published_port(text).unwrap_err();
        }
    }

    #[test]
    fn moments() {
        assert_eq!(moment("now"), Ok(Moment::In(0)));
        assert_eq!(moment("+90m"), Ok(Moment::In(5400)));
        let at = Moment::At(1_767_323_045_500);
        assert_eq!(moment("2026-01-02T03:04:05.5Z"), Ok(at));
        assert_eq!(moment("2026-01-02T04:04:05.5+01:00"), Ok(at));
        for text in ["", "+", "tomorrow", "2026-01-02", "1900-01-02T03:04:05Z"] {
            moment(text).unwrap_err();
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("1"), Ok(1));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2 GiB"), Ok(2 << 30));
        for text in [
            "",
            "M",
            "0",
            "1.5G",
            "-1",
            "1X",
            "18446744073709551615K",
            "1Ü",
        ] {
            size(text).unwrap_err();
        }
    }

    #[test]
    fn times() {
        assert_eq!(seconds("90"), Ok(90));
        assert_eq!(seconds("1h30m"), Ok(5400));
        assert_eq!(seconds("2d1s"), Ok(172_801));
        for text in [
            "",
            "0",
            "0s",
            "s",
            "1h30",
            "1.5h",
            "-1",
            "1ü",
            "99999999999999999999s",
        ] {
            seconds(text).unwrap_err();
        }
    }
}
