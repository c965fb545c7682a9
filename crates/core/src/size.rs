//! Answers for numbers as users type them: sizes and durations.
//!
//! Sizes: plain bytes, `k M G T P E` (either case) as powers of 1024, `s` for 512-byte sectors,
//! `0x` hexadecimal, `_` as separator. Durations: `ns`, `us`, `ms`, `s`, with decimals. Overflow
//! and trailing junk are refused.

/// Reads a size in bytes.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let clean: String = text.chars().filter(|c| *c != '_').collect();
    let bad = || format!("`{text}` is no size; examples: 4096, 64k, 10G, 8s (sectors), 0x1000");
    if text.starts_with('_') || text.ends_with('_') {
        return Err(bad());
    }
    if let Some(hex) = clean.strip_prefix("0x").or_else(|| clean.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        return u64::from_str_radix(hex, 16).map_err(|_| too_big(text));
    }
    let digits = clean.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor: u64 = match &clean[digits.len()..] {
        "" | "b" | "B" => 1,
        "s" | "S" => 512,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return Err(bad()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| too_big(text))?;
    number.checked_mul(factor).ok_or_else(|| too_big(text))
}

fn too_big(text: &str) -> String {
    format!("`{text}` does not fit 64 bits")
}

/// Reads a duration into nanoseconds. A number without a unit is refused: seconds or
/// milliseconds would be a guess.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_duration_ns(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no duration; examples: 10ms, 1.5s, 200us, 50ns");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ns: u64 = match &text[digits.len()..] {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err(bad()),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let is_number = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(part) || part.len() > 9 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| too_big(text))?;
    let whole_ns = whole.checked_mul(unit_ns).ok_or_else(|| too_big(text))?;
    if part.is_empty() {
        return if digits.ends_with('.') { Err(bad()) } else { Ok(whole_ns) };
    }
    let fraction: u64 = part.parse().map_err(|_| bad())?;
    // At most 9 digits times at most 10^9 stays below 2^63.
    let part_ns = fraction * unit_ns / 10_u64.pow(u32::try_from(part.len()).unwrap_or(9));
    whole_ns.checked_add(part_ns).ok_or_else(|| too_big(text))
}

/// Writes a size the way users read it: the largest unit that divides it, else bytes.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    let units = [(60, 'E'), (50, 'P'), (40, 'T'), (30, 'G'), (20, 'M'), (10, 'k')];
    for (shift, unit) in units {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let table = [
            ("0", 0),
            ("512", 512),
            ("8s", 4096),
            ("64k", 65_536),
            ("64K", 65_536),
            ("1M", 1 << 20),
            ("10G", 10 << 30),
            ("1_000", 1000),
            ("0x1000", 4096),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn junk_and_overflow_are_refused() {
        for text in [
            "",
            "k",
            "-1",
            "1kk",
            "1.5G",
            "1 k",
            "0x",
            "0xg",
            "16E",
            "_1",
            "1_",
            "1ki",
            "18446744073709551616",
            "99999999999999999999",
            "1\u{e9}",
            "0x1ffffffffffffffff",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration_ns("10ms"), Ok(10_000_000));
        assert_eq!(parse_duration_ns("1.2us"), Ok(1200));
        assert_eq!(parse_duration_ns("0.5s"), Ok(500_000_000));
        assert_eq!(parse_duration_ns("0s"), Ok(0));
        for text in ["", "10", "ms", "1.s", ".5s", "1h", "-1s", "99999999999999s", "1.0000000001s"]
        {
            assert!(parse_duration_ns(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_shown_size_reads_back() {
        for bytes in [0, 1, 511, 512, 1024, 65_536, 1 << 20, (1 << 30) + 1, 3 << 40, u64::MAX] {
            assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
        }
    }
}
