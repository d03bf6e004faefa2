//! The grammar of URI references (RFC 3986), as far as `xsd:anyURI` asks for it.

/// Whether `value`, already collapsed, is an `xsd:anyURI` (XML Schema part 2, 3.2.17).
///
/// Characters that the type lets through by escaping them (XLink 5.4) count as ordinary ones.
pub(crate) fn is_any_uri(value: &str) -> bool {
    let escaped: Vec<u8> = value
        .bytes()
        .map(|byte| match byte {
            0..=32 | 127.. => b'_',
            b'<' | b'>' | b'"' | b'{' | b'}' | b'|' | b'\\' | b'^' | b'`' | b'\'' => b'_',
            other => other,
        })
        .collect();
    is_uri_reference(&escaped)
}

/// Whether `uri` is a URI reference as it stands (RFC 3986, 4.1).
pub(crate) fn is_uri_reference(uri: &[u8]) -> bool {
    absolute(uri) || relative(uri)
}

fn absolute(uri: &[u8]) -> bool {
    if !uri.first().is_some_and(u8::is_ascii_alphabetic) {
        return false;
    }
    let scheme = uri
        .iter()
        .take_while(|c| c.is_ascii_alphanumeric() || b"+-.".contains(c))
        .count();
    match uri.get(scheme) {
        Some(b':') => {}
        _ => return false,
    }
    let rest = &uri[scheme + 1..];
    let path = match rest {
        [b'/', b'/', after @ ..] => match authority(after) {
            Some(path) => path,
            None => return false,
        },
        // An absolute path whose first segment is empty is only possible behind an authority.
        _ => rest,
    };
    tail(path_end(path))
}

fn relative(uri: &[u8]) -> bool {
    let path = match uri {
        [b'/', b'/', after @ ..] => match authority(after) {
            Some(path) => path,
            None => return false,
        },
        [b'/', ..] => uri,
        // The first segment has no colon, or it would be a scheme.
        _ => {
            let segment = run(uri, |c| is_pchar(c) && c != b':');
            if segment == uri.len() || uri[segment] != b':' {
                uri
            } else {
                return false;
            }
        }
    };
    tail(path_end(path))
}

/// Reads an authority; the rest, if it is one.
fn authority(uri: &[u8]) -> Option<&[u8]> {
    let user = run(uri, |c| is_unreserved(c) || is_sub_delim(c) || c == b':');
    let host = match uri.get(user) {
        Some(b'@') => &uri[user + 1..],
        _ => uri,
    };
    let after = if host.first() == Some(&b'[') {
        let close = host.iter().position(|&c| c == b']')?;
        &host[close + 1..]
    } else {
        &host[run(host, |c| is_unreserved(c) || is_sub_delim(c))..]
    };
    let Some((b':', port)) = after.split_first() else {
        return empty_or_path(after);
    };
    let digits = port.iter().take_while(|c| c.is_ascii_digit()).count();
    let number: u32 = std::str::from_utf8(&port[..digits]).ok()?.parse().ok()?;
    i32::try_from(number).ok()?;
    empty_or_path(&port[digits..])
}

/// Behind an authority comes a path that is empty or begins with a slash.
fn empty_or_path(rest: &[u8]) -> Option<&[u8]> {
    matches!(rest.first(), None | Some(b'/' | b'?' | b'#')).then_some(rest)
}

fn path_end(path: &[u8]) -> &[u8] {
    &path[run(path, |c| is_pchar(c) || c == b'/')..]
}

/// Query and fragment, to the end.
fn tail(mut rest: &[u8]) -> bool {
    if let [b'?', query @ ..] = rest {
        rest = &query[run(query, |c| is_pchar(c) || b"/?".contains(&c))..];
    }
    if let [b'#', fragment @ ..] = rest {
        rest = &fragment[run(fragment, |c| is_pchar(c) || b"/?[]".contains(&c))..];
    }
    rest.is_empty()
}

/// Length of the longest prefix of allowed characters and percent-encoded octets.
fn run(uri: &[u8], allowed: impl Fn(u8) -> bool) -> usize {
    let mut length = 0;
    while let Some(&c) = uri.get(length) {
        length += match uri[length..] {
            [b'%', a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => 3,
            _ if allowed(c) => 1,
            _ => break,
        };
    }
    length
}

fn is_unreserved(c: u8) -> bool {
    c.is_ascii_alphanumeric() || b"-._~".contains(&c)
}

fn is_sub_delim(c: u8) -> bool {
    b"!$&'()*+,;=".contains(&c)
}

fn is_pchar(c: u8) -> bool {
    is_unreserved(c) || is_sub_delim(c) || b":@".contains(&c)
}
