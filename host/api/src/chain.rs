use std::error::Error;

/// An error with its causes, outermost first: `cannot read a.toml: permission denied`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_cause_is_said_once() {
        let inner = std::io::Error::other("inner");
        let outer = std::io::Error::other(inner);
        // std prints the inner error as the outer one's text and gives no further source.
        assert_eq!(super::chain(&outer), "inner");
    }
}
