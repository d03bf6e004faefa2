//! Text from the other side, made fit for a person's terminal.

/// The text cut to `max_bytes` (an ellipsis shows the cut) with control characters, and those
/// that change the direction of writing, replaced by U+FFFD. Line feeds and tabs become blanks.
pub fn sanitise(text: &str, max_bytes: usize) -> String {
    let mut clean = String::with_capacity(text.len().min(max_bytes));
    for c in text.chars() {
        let c = match c {
            '\n' | '\t' => ' ',
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                '\u{fffd}'
            }
            c if c.is_control() => '\u{fffd}',
            c => c,
        };
        if clean.len() + c.len_utf8() > max_bytes {
            clean.push('…');
            break;
        }
        clean.push(c);
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::sanitise;

    #[test]
    fn escape_sequences_lose_their_power_and_length_is_bounded() {
        assert_eq!(
            sanitise("a\x1b[2Jb\r\nc\u{202e}", 100),
            "a\u{fffd}[2Jb\u{fffd} c\u{fffd}"
        );
        assert_eq!(sanitise("äöü", 4), "äö…");
        assert_eq!(sanitise("äöü", 6), "äöü");
    }
}
