//! From bytes to text: which encoding a document has, and its decoding (XML 1.0, appendix F).

use crate::diagnostic::{Diagnostic, Position, quoted};
use crate::limits::MAX_DOCUMENT_BYTES;

/// How many bytes of a document are searched for its XML declaration.
const DECLARATION_BYTES: usize = 256;

/// Decodes a document and normalises its line ends to `\n` (XML 1.0, 2.11).
///
/// The encoding is that of the byte order mark or of an XML declaration in UTF-16, else the declared
/// one, else UTF-8.
pub(crate) fn decode(document: &[u8]) -> Result<String, Diagnostic> {
    if document.len() > MAX_DOCUMENT_BYTES {
        return Err(Position::START.diagnostic(
            "document-too-large",
            format!(
                "the document has {} bytes, expected at most {MAX_DOCUMENT_BYTES}",
                document.len()
            ),
        ));
    }
    let text = match document {
        [0xEF, 0xBB, 0xBF, rest @ ..] => utf8(rest)?,
        [0xFF, 0xFE, rest @ ..] => utf16(rest, u16::from_le_bytes)?,
        [0xFE, 0xFF, rest @ ..] => utf16(rest, u16::from_be_bytes)?,
        [b'<', 0, b'?', 0, ..] => utf16(document, u16::from_le_bytes)?,
        [0, b'<', 0, b'?', ..] => utf16(document, u16::from_be_bytes)?,
        _ => declared(document)?,
    };
    Ok(if text.contains('\r') {
        text.replace("\r\n", "\n").replace('\r', "\n")
    } else {
        text
    })
}

fn declared(document: &[u8]) -> Result<String, Diagnostic> {
    let Some(label) = declared_encoding(document) else {
        return utf8(document);
    };
    match label.to_ascii_lowercase().as_str() {
        "utf-8" | "utf8" => utf8(document),
        // The label's registry sends these two to windows-1252, which differs in 0x80 to 0x9F.
        "iso-8859-1" | "latin1" | "iso_8859-1" => {
            Ok(document.iter().map(|&byte| char::from(byte)).collect())
        }
        "us-ascii" | "ascii" if document.is_ascii() => utf8(document),
        // Declared but without the zero bytes of UTF-16, as tools leave it after re-encoding.
        // The declaration could be read, so the document is not what it says.
        "utf-16" | "utf-16le" | "utf-16be" | "us-ascii" | "ascii" => Err(wrong_encoding(&label)),
        _ => {
            let encoding = encoding_rs::Encoding::for_label(label.as_bytes()).ok_or_else(|| {
                Position::START.diagnostic(
                    "unknown-encoding",
                    format!(
                        "the encoding {} is not known, expected UTF-8, UTF-16, ISO-8859-1 or \
                         another registered one",
                        quoted(&label)
                    ),
                )
            })?;
            encoding
                .decode_without_bom_handling_and_without_replacement(document)
                .map(std::borrow::Cow::into_owned)
                .ok_or_else(|| wrong_encoding(&label))
        }
    }
}

fn wrong_encoding(label: &str) -> Diagnostic {
    Position::START.diagnostic(
        "not-well-formed",
        format!(
            "the bytes of the document are not in its declared encoding {}",
            quoted(label)
        ),
    )
}

/// The value of `encoding` in the XML declaration. Its syntax is checked later, on the text.
fn declared_encoding(document: &[u8]) -> Option<String> {
    let head = &document[..document.len().min(DECLARATION_BYTES)];
    let head = head.strip_prefix(b"<?xml")?;
    let end = head.windows(2).position(|pair| pair == b"?>")?;
    let declaration = std::str::from_utf8(&head[..end]).ok()?;
    let (_, value) = declaration.split_once("encoding")?;
    let value = value.trim_start().strip_prefix('=')?.trim_start();
    let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    value[1..]
        .split_once(quote)
        .map(|(label, _)| label.to_owned())
}

fn utf8(bytes: &[u8]) -> Result<String, Diagnostic> {
    std::str::from_utf8(bytes)
        .map(str::to_owned)
        .map_err(|error| {
            let before = &bytes[..error.valid_up_to()];
            let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
            let position = Position {
                line: u32::try_from(line).unwrap_or(u32::MAX),
                column: 1,
            };
            position.diagnostic(
                "not-well-formed",
                "the document has bytes that are not UTF-8, expected UTF-8 or an XML declaration \
                 that names another encoding",
            )
        })
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String, Diagnostic> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let text: Result<String, _> =
        char::decode_utf16(pairs.iter().map(|&pair| unit(pair))).collect();
    match text {
        Ok(text) if rest.is_empty() => Ok(text),
        _ => Err(wrong_encoding("UTF-16")),
    }
}
