//! The date and time types of XML Schema part 2 (3.2.6 to 3.2.14).

use crate::datatypes::Builtin;

/// Whether `value`, without white space around it, is of the date or time type `builtin`.
pub(crate) fn accepts(builtin: Builtin, value: &str) -> bool {
    let mut reader = Reader { rest: value };
    let read = match builtin {
        Builtin::Duration => return duration(value),
        Builtin::DateTime => reader
            .date()
            .and_then(|()| reader.mark("T"))
            .and_then(|()| reader.time()),
        Builtin::Date => reader.date(),
        Builtin::Time => reader.time(),
        Builtin::GYear => reader.year().map(|_| ()),
        Builtin::GYearMonth => reader.year_month().map(|_| ()),
        Builtin::GMonth => reader
            .mark("--")
            .and_then(|()| reader.two(1, 12))
            // The first edition's form, which libxml2 takes too.
            .map(|_| reader.rest = reader.rest.strip_prefix("--").unwrap_or(reader.rest)),
        Builtin::GMonthDay => reader.mark("--").and_then(|()| {
            let month = reader.two(1, 12)?;
            reader.mark("-")?;
            reader.two(1, days_in(None, month)).map(|_| ())
        }),
        Builtin::GDay => reader
            .mark("---")
            .and_then(|()| reader.two(1, 31).map(|_| ())),
        _ => None,
    };
    read.and_then(|()| reader.zone()).is_some() && reader.rest.is_empty()
}

struct Reader<'v> {
    rest: &'v str,
}

impl Reader<'_> {
    fn mark(&mut self, mark: &str) -> Option<()> {
        self.rest = self.rest.strip_prefix(mark)?;
        Some(())
    }

    /// Two digits within bounds.
    fn two(&mut self, least: u32, most: u32) -> Option<u32> {
        let digits = self.rest.get(..2)?;
        if !digits.bytes().all(|c| c.is_ascii_digit()) {
            return None;
        }
        self.rest = &self.rest[2..];
        digits
            .parse()
            .ok()
            .filter(|number| (least..=most).contains(number))
    }

    /// Four or more digits, no leading zero beyond four, not the year zero.
    fn year(&mut self) -> Option<i64> {
        let negative = self.mark("-").is_some();
        let length = self.rest.bytes().take_while(u8::is_ascii_digit).count();
        let digits = &self.rest[..length];
        if length < 4 || (length > 4 && digits.starts_with('0')) {
            return None;
        }
        self.rest = &self.rest[length..];
        let year: i64 = digits.parse().ok().filter(|&year| year != 0)?;
        Some(if negative { -year } else { year })
    }

    fn year_month(&mut self) -> Option<(i64, u32)> {
        let year = self.year()?;
        self.mark("-")?;
        Some((year, self.two(1, 12)?))
    }

    fn date(&mut self) -> Option<()> {
        let (year, month) = self.year_month()?;
        self.mark("-")?;
        self.two(1, days_in(Some(year), month)).map(|_| ())
    }

    fn time(&mut self) -> Option<()> {
        let hour = self.two(0, 24)?;
        self.mark(":")?;
        let minute = self.two(0, 59)?;
        self.mark(":")?;
        let second = self.two(0, 59)?;
        let mut whole = true;
        if self.mark(".").is_some() {
            let length = self.rest.bytes().take_while(u8::is_ascii_digit).count();
            if length == 0 {
                return None;
            }
            whole = self.rest[..length].bytes().all(|c| c == b'0');
            self.rest = &self.rest[length..];
        }
        (hour < 24 || (minute == 0 && second == 0 && whole)).then_some(())
    }

    fn zone(&mut self) -> Option<()> {
        if self.rest.is_empty() || self.mark("Z").is_some() {
            return Some(());
        }
        self.mark("+").or_else(|| self.mark("-"))?;
        let hour = self.two(0, 14)?;
        self.mark(":")?;
        let minute = self.two(0, 59)?;
        (hour < 14 || minute == 0).then_some(())
    }
}

/// Days of a month; without a year, February may have 29.
fn days_in(year: Option<i64>, month: u32) -> u32 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 => {
            let leap = year.is_none_or(|y| (y % 4 == 0 && y % 100 != 0) || y % 400 == 0);
            28 + u32::from(leap)
        }
        _ => 31,
    }
}

fn duration(value: &str) -> bool {
    let Some(value) = value.strip_prefix('-').unwrap_or(value).strip_prefix('P') else {
        return false;
    };
    let (date, time) = match value.split_once('T') {
        Some((date, time)) if !time.is_empty() => (date, time),
        Some(_) => return false,
        None => (value, ""),
    };
    !value.is_empty() && fields(date, "YMD", false) && fields(time, "HMS", true)
}

/// Numbers, each behind it its unit, units in order; the last may have a fraction if it is seconds.
fn fields(mut text: &str, mut units: &str, fraction: bool) -> bool {
    while !text.is_empty() {
        let length = text
            .bytes()
            .take_while(|c| c.is_ascii_digit() || *c == b'.')
            .count();
        let (number, rest) = text.split_at(length);
        let Some(unit) = rest.chars().next() else {
            return false;
        };
        let Some(place) = units.find(unit) else {
            return false;
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let is_digits = |s: &str| !s.is_empty() && s.bytes().all(|c| c.is_ascii_digit());
        if !is_digits(whole)
            || !is_digits(part)
            || (number.contains('.') && !(fraction && unit == 'S'))
        {
            return false;
        }
        units = &units[place + 1..];
        text = &rest[unit.len_utf8()..];
    }
    true
}
