//! What stands before a document's element: XML declaration and document type (XML 1.0, 2.8).

use crate::chars::{is_name, is_space};

/// Whether these are the attributes of an XML declaration: version, encoding, standalone, in this
/// order.
pub(crate) fn is_declaration(attributes: &[(usize, &str, String)]) -> bool {
    let mut names = attributes.iter().map(|(_, name, _)| *name).peekable();
    let has_version = names.next() == Some("version");
    names.next_if_eq(&"encoding");
    names.next_if_eq(&"standalone");
    has_version
        && names.next().is_none()
        && attributes.iter().all(|(_, name, value)| match *name {
            "version" => value
                .strip_prefix("1.")
                .is_some_and(|minor| minor.bytes().all(|c| c.is_ascii_digit())),
            "standalone" => matches!(value.as_str(), "yes" | "no"),
            _ => {
                value.starts_with(|c: char| c.is_ascii_alphabetic())
                    && value
                        .chars()
                        .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
            }
        })
}

/// Checks a document type, the text between `<!DOCTYPE` and `>`; the error is its code and message.
///
/// One that declares nothing changes nothing: no external subset is ever read. Declarations are
/// refused, as entities could make a small document a huge one.
pub(crate) fn doctype(text: &str) -> Result<(), (&'static str, &'static str)> {
    const MALFORMED: (&str, &str) = ("not-well-formed", "malformed document type declaration");

    if text.contains("<!ENTITY") {
        return Err((
            "entity-declaration",
            "the document declares entities, expected none: they are not expanded",
        ));
    }
    let rest = space(text).ok_or(MALFORMED)?;
    let name = rest
        .split(|c| is_space(c) || c == '[')
        .next()
        .unwrap_or(rest);
    if !is_name(name) {
        return Err(MALFORMED);
    }
    let rest = external_id(&rest[name.len()..])
        .ok_or(MALFORMED)?
        .trim_matches(is_space);
    match rest.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        None if rest.is_empty() => Ok(()),
        Some(Some(subset)) if subset.chars().all(is_space) => Ok(()),
        Some(Some(_)) => Err((
            "document-type-subset",
            "the document type declares something, expected no declarations",
        )),
        _ => Err(MALFORMED),
    }
}

/// What follows the external identifier, if there is a well-formed one or none.
fn external_id(text: &str) -> Option<&str> {
    let Some(rest) = space(text) else {
        return Some(text);
    };
    if let Some(rest) = rest.strip_prefix("SYSTEM") {
        literal(rest)
    } else if let Some(rest) = rest.strip_prefix("PUBLIC") {
        literal(literal(rest)?)
    } else {
        Some(rest)
    }
}

/// What follows white space and a quoted string.
fn literal(text: &str) -> Option<&str> {
    let rest = space(text)?;
    let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    rest[1..].split_once(quote).map(|(_, rest)| rest)
}

/// What follows white space, of which there must be some.
fn space(text: &str) -> Option<&str> {
    let rest = text.trim_start_matches(is_space);
    (rest.len() < text.len()).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::doctype;

    #[test]
    fn document_types_that_declare_nothing_are_accepted() {
        let cases = [
            (" a", ""),
            (" a ", ""),
            (" a []", ""),
            (" a[ ]", ""),
            (" a SYSTEM 'b\"c'", ""),
            (" a PUBLIC \"b\" 'c' [\n]", ""),
            ("a", "not-well-formed"),
            (" ", "not-well-formed"),
            (" a b", "not-well-formed"),
            (" a SYSTEM", "not-well-formed"),
            (" a SYSTEM \"b", "not-well-formed"),
            (" a SYSTEM \"b\"c", "not-well-formed"),
            (" a PUBLIC \"b\"", "not-well-formed"),
            (" a [", "not-well-formed"),
            (" a [<!ELEMENT a ANY>]", "document-type-subset"),
            (" a [<!ENTITY b 'c'>]", "entity-declaration"),
        ];
        for (text, code) in cases {
            let found = doctype(text).map_or_else(|(code, _)| code, |()| "");
            assert_eq!(found, code, "{text}");
        }
    }
}
